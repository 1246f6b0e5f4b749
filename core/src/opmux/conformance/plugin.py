# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin: the kit's options and its report. Every pytest run imports it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("opmux", "conformance of an opmux backend")
    group.addoption("--opmux-backend", metavar="NAME", help="the backend to test, or reference")
    group.addoption(
        "--opmux-op", metavar="OP", action="append", help="test this op only; may be repeated"
    )
    group.addoption(
        "--opmux-report", metavar="FILE", type=Path, help="write the result to FILE as JSON"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Start the report when one is wanted."""
    path, backend = config.getoption("--opmux-report"), config.getoption("--opmux-backend")
    if path and backend:
        from opmux.conformance.report import Recorder

        config.pluginmanager.register(Recorder(path, backend), "opmux-report")

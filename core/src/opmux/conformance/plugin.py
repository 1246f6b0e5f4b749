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
        "--opmux-level", metavar="N", type=int, choices=range(9),
        help="run levels 0 to N; default: all",
    )  # fmt: skip
    group.addoption(
        "--opmux-op", metavar="OP", action="append", help="test this op only; may be repeated"
    )
    group.addoption(
        "--opmux-report", metavar="FILE", type=Path, help="write the result to FILE as JSON"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Start the report when one is wanted."""
    for marker in (
        "opmux_level(n): the level of conformance that a test belongs to",
        "opmux_needs(*what): what a test needs of a kernel; it is not made for others",
        "opmux_nothing: made for no kernel",
    ):
        config.addinivalue_line("markers", marker)
    backend = config.getoption("--opmux-backend")
    if backend:
        from opmux.conformance.report import Recorder

        config.pluginmanager.register(Recorder(config, backend), "opmux-report")

# SPDX-License-Identifier: Apache-2.0
"""The cases, family by family, in the order of the report."""

from __future__ import annotations

from collections.abc import Iterator

from ..case import Case
from . import activation, attention, moe, norm, position, quantization, sampling


def everything() -> Iterator[Case]:
    """Yield every case."""
    for family in (activation, norm, position, quantization, moe, attention, sampling):
        yield from family.cases()

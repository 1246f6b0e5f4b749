# SPDX-License-Identifier: Apache-2.0
"""A kernel that is slower than the definition of its op serves nobody."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from opmux.conformance import calls
from opmux.conformance.cases import Case
from opmux.conformance.test_numerics import serve
from opmux.selection import REFERENCE

pytestmark = pytest.mark.opmux_level(8)
ROUNDS = 5
SLACK = 1.2  # what two runs of one kernel differ by on a machine that does other things, too
DISPATCH = 50e-6  # seconds: a Python kernel is checked by core before each call


@pytest.mark.opmux_needs("a backend")
def test_is_not_slower_than_the_reference(large_case: Case) -> None:
    """On the largest sample, in turns, the best of several rounds; tried again before it fails."""
    serve(large_case)
    call = calls.prepare(large_case)
    kernel = calls.runner(large_case.claim, call)
    op = large_case.claim.op
    runs: dict[str, Callable[[], Any]] = {
        "kernel": lambda: kernel(*call.args, *call.outs),
        "reference": lambda: op(*call.args, *call.outs, backend=REFERENCE),
    }
    for attempt in range(3):
        best = _best(runs, ROUNDS * (attempt + 1))
        if best["kernel"] <= best["reference"] * SLACK + DISPATCH:
            return
    took, wanted = best["kernel"] * 1e6, best["reference"] * 1e6
    pytest.fail(f"{large_case}: the kernel takes {took:.0f} us, the reference {wanted:.0f} us")


def _best(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the seconds of the fastest of several rounds of each, in turns."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            run()  # caches and allocator, for both alike
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()

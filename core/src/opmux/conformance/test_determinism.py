# SPDX-License-Identifier: Apache-2.0
"""What a kernel claims of its bits: the same again, with more threads, in a larger batch."""

from __future__ import annotations

import pytest
import torch

from opmux.conformance import calls
from opmux.conformance.buffers import bits
from opmux.conformance.cases import Case
from opmux.conformance.test_numerics import serve

pytestmark = pytest.mark.opmux_level(7)


@pytest.mark.opmux_needs("deterministic")
def test_gives_equal_bits_when_called_again(one_case: Case) -> None:
    """A kernel that claims to be deterministic is."""
    serve(one_case)
    first, second = calls.check(one_case), calls.check(one_case)
    for name, value in first.results().items():
        assert torch.equal(bits(value), bits(second.results()[name])), name


def test_gives_equal_bits_with_more_threads(one_case: Case) -> None:
    """How many threads share the work does not show in the result."""
    serve(one_case)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(calls.check(one_case).results())
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        assert torch.equal(bits(value), bits(found[1][name])), name


@pytest.mark.opmux_needs("batch_invariant")
def test_gives_equal_bits_in_larger_batches(one_case: Case) -> None:
    """A kernel that claims to be batch-invariant computes a row alike among any others."""
    serve(one_case)
    small, large = (calls.grown(one_case, times) for times in (1, 3))
    for call in (small, large):
        calls.runner(one_case.claim, call)(*call.args, *call.outs)
    for name, value in small.results().items():
        rows = large.results()[name][: value.shape[0]]
        assert torch.equal(bits(value), bits(rows)), name

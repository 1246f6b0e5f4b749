# SPDX-License-Identifier: Apache-2.0
"""What a kernel computes: within the op's tolerance of the reference, writing nothing else."""

from __future__ import annotations

import pytest
import torch

from opmux.conformance import calls
from opmux.conformance.buffers import DENSE, Layout, bits
from opmux.conformance.cases import Case, expected
from opmux.kernel import Property


def serve(case: Case, layout: Layout = DENSE) -> None:
    """Skip, with the kernel's own sentence, a case that it does not claim."""
    reason = calls.refusal(case.claim, calls.prepare(case, layout))
    if reason is not None:
        pytest.skip(str(reason))  # that it is refused soundly is tested in test_claims


def test_matches_the_reference(layout_case: tuple[Case, Layout]) -> None:
    """Every sample in every layout; outputs start as NaN, all tensors have guard zones."""
    case, layout = layout_case
    if calls.prepare(case, layout).allowed() is not None:
        pytest.skip(f"{case.claim.op.name} does not allow the layout {layout}")
    serve(case, layout)
    calls.check(case, layout)


def test_matches_the_reference_on_special_values(planted_case: tuple[Case, str]) -> None:
    """Tiny and huge values, NaN and infinities."""
    case, kind = planted_case
    serve(case)
    calls.check(case, kind=kind)


def test_allocates_its_result(case: Case) -> None:
    """The same call without out returns a fresh, right result."""
    if not case.claim.op.outs:
        pytest.skip("an in-place op allocates nothing")
    serve(case)
    call = calls.prepare(case)
    result = calls.runner(case.claim, call)(*call.args)
    results = result if isinstance(result, tuple) else (result,)
    named = dict(zip(case.claim.op.outs, results, strict=True))
    wanted = expected(case, "plain")[1]
    for name, value in named.items():
        assert (value.dtype, value.shape) == (wanted[name].dtype, wanted[name].shape)
        assert value.device.type == case.claim.target.device
        assert value.is_contiguous()
    calls.compare(case.claim.op, {**call.results(), **named}, wanted)


def test_gives_equal_bits_when_called_again(one_case: Case) -> None:
    """A kernel that claims to be deterministic is."""
    serve(one_case)
    if Property.DETERMINISTIC not in one_case.claim.kernel.properties:
        pytest.skip("the kernel does not claim to be deterministic")
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


def test_gives_equal_bits_in_larger_batches(one_case: Case) -> None:
    """A kernel that claims to be batch-invariant computes a row alike among any others."""
    serve(one_case)
    if Property.BATCH_INVARIANT not in one_case.claim.kernel.properties:
        pytest.skip("the kernel does not claim to be batch-invariant")
    small, large = (calls.grown(one_case, times) for times in (1, 3))
    for call in (small, large):
        calls.runner(one_case.claim, call)(*call.args, *call.outs)
    for name, value in small.results().items():
        rows = large.results()[name][: value.shape[0]]
        assert torch.equal(bits(value), bits(rows)), name

# SPDX-License-Identifier: Apache-2.0
"""What a kernel computes: within the op's tolerance of the reference, writing nothing else."""

from __future__ import annotations

import pytest

from opmux.conformance import calls
from opmux.conformance.buffers import DENSE, Layout
from opmux.conformance.cases import Case, expected

pytestmark = pytest.mark.opmux_level(3)


def serve(case: Case, layout: Layout = DENSE) -> None:
    """Skip, with the kernel's own sentence, a case that it does not claim."""
    reason = calls.refusal(case.claim, calls.prepare(case, layout))
    if reason is not None:
        pytest.skip(str(reason))  # that it is refused soundly is tested in test_claims


def test_matches_the_reference(layout_case: tuple[Case, Layout]) -> None:
    """Every sample in every layout; outputs start as NaN, all tensors have guard zones."""
    case, layout = layout_case
    serve(case, layout)
    calls.check(case, layout)


def test_matches_the_reference_on_special_values(planted_case: tuple[Case, str]) -> None:
    """Tiny and huge values, NaN and infinities."""
    case, kind = planted_case
    serve(case)
    calls.check(case, kind=kind)


@pytest.mark.opmux_needs("outs")
def test_allocates_its_result(case: Case) -> None:
    """The same call without out returns a fresh, right result."""
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

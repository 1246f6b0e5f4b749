# SPDX-License-Identifier: Apache-2.0
"""What a kernel does not claim is refused, with a reason, and nothing is written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from opmux import NoKernelError
from opmux.conformance import calls, misuse
from opmux.conformance.buffers import DENSE, LAYOUTS, Layout
from opmux.conformance.cases import Case, Claim, expected

pytestmark = pytest.mark.opmux_level(4)
# Beyond the dtypes of the op: wider than any kernel computes, and integers as wide as floats.
FOREIGN = (torch.float64, torch.int16, torch.int32, torch.complex64)


def test_claims_what_the_op_defines(claim: Claim) -> None:
    """A dtype that the definition does not allow could never be served."""
    allowed = claim.op.dtypes
    assert allowed is None or claim.dtype in allowed, f"{claim}: the op serves {allowed}"


def test_serves_a_sample(claim: Claim) -> None:
    """A claim that holds for no real shape is none."""
    reasons = []
    for case in claim.cases():
        reason = None if case.empty else calls.refusal(claim, calls.prepare(case))
        if not case.empty and reason is None:
            return
        reasons.append(f"{case}: {reason or 'empty'}")
    pytest.fail("every sample was refused\n" + "\n".join(reasons))


@pytest.mark.opmux_needs("a predicate")
def test_the_predicate_depends_on_the_signature_alone(claim: Claim) -> None:
    """Asked again in another order, it says the same: decisions are kept, also across processes."""
    found: list[list[str]] = []
    prepared = [calls.prepare(case) for case in claim.cases() if not case.empty]
    for order in (1, 1, -1):
        found.append([str(calls.refusal(claim, call)) for call in prepared[::order]][::order])
    assert found[0] == found[1] == found[2]


@pytest.mark.opmux_needs("refusals")
def test_refuses_samples_outside_the_claim(claim: Claim) -> None:
    """Where the predicate or the layout refuses, the call raises and writes nothing."""
    refused = 0
    for case, layout in _laid_out(claim):
        call = calls.prepare(case, layout)
        if call.allowed() is not None or calls.refusal(claim, call) is None:
            continue
        decision = claim.op.explain(*call.values.values(), backend=claim.target.name)
        if decision.winner is not None:  # another kernel of the backend serves it
            continue
        refused += 1
        _refuses(call, claim.target.name)
    if not refused:
        pytest.skip("another kernel of the backend serves what this one refuses")


def _laid_out(claim: Claim) -> Iterator[tuple[Case, Layout]]:
    for case in claim.cases():
        for layout in LAYOUTS:
            if case.differs(layout):
                yield case, layout


def test_refuses_dtypes_outside_the_claim(op_case: Case) -> None:
    """Dtypes that no kernel of the backend claims, among them some that the op does not define."""
    claim = op_case.claim
    name = claim.target.name
    served = {d for op, k in claim.target.kernels() if op is claim.op for d in k.dtypes}
    defined = claim.op.dtypes or ()
    for dtype in dict.fromkeys((*defined, *FOREIGN)):
        if dtype in served:
            continue
        foreign = Case(Claim(claim.target, claim.op, claim.kernel, dtype), op_case.sample)
        values, results = _foreign(foreign, op_case)
        call = calls.Prepared(claim.op, values, results, device=claim.target.device)
        if call.allowed() is None:
            assert claim.op.explain(*call.values.values(), backend=name).winner is None
        _refuses(call, name)


def _foreign(foreign: Case, good: Case) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """Return arguments in the foreign dtype, with results shaped like those of a good case."""
    _, results = expected(good, "plain")
    dtype, old = foreign.claim.dtype, good.claim.dtype
    outs = {
        name: value.to(dtype) if value.dtype == old else value for name, value in results.items()
    }
    return foreign.values(), outs


def _refuses(call: calls.Prepared, backend: str) -> None:
    op = call.op
    error = calls.check_refused(call, lambda *args: op(*args, backend=backend))
    assert isinstance(error, (NoKernelError, TypeError, ValueError)), repr(error)
    assert op.name in str(error), f"the message does not name the op: {error}"
    if isinstance(error, NoKernelError):
        assert backend in str(error), f"the message does not name the backend: {error}"


def test_refuses_calls_that_the_definition_forbids(op_case: Case) -> None:
    """Wrong shapes, dtypes, strides, devices and indices: an error, and not a byte written."""
    claim, name = op_case.claim, op_case.claim.target.name
    wrong, tried = [], 0
    for what, call, complaint in misuse.mistakes(op_case):
        tried += 1
        try:
            _refuses(call, name)
        except AssertionError as error:
            wrong.append(f"{what}: {error} (the definition says: {complaint})")
    assert not wrong, f"{len(wrong)} of {tried} mistakes\n" + "\n".join(wrong)
    assert tried > 3 * len(claim.op.tensors), f"only {tried} mistakes were tried"


def test_bound_calls_refuse_what_the_definition_forbids(op_case: Case) -> None:
    """bind() keeps its kernel, so the kernel's own checks are all that guards memory."""
    claim = op_case.claim
    good = calls.prepare(op_case, DENSE)
    if calls.refusal(claim, good) is not None:
        pytest.skip("the kernel does not serve the sample")
    bound = claim.op.bind(*good.args, *good.outs, backend=claim.target.name)
    wrong = []
    for what, call, complaint in misuse.mistakes(op_case):
        try:
            error = calls.check_refused(call, bound)
            assert isinstance(error, (TypeError, ValueError)), repr(error)
        except AssertionError as failure:
            wrong.append(f"{what}: {failure} (the definition says: {complaint})")
    assert not wrong, f"{len(wrong)} mistakes\n" + "\n".join(wrong)


@pytest.mark.opmux_needs("a backend")
def test_the_reference_is_not_the_backend(op_case: Case) -> None:
    """Naming the backend never runs anything else."""
    name = op_case.claim.target.name
    call = calls.prepare(op_case)
    decision = op_case.claim.op.explain(*call.values.values(), backend=name)
    assert decision.winner is None or decision.winner.backend == name

# SPDX-License-Identifier: Apache-2.0
"""One call on guarded tensors, and everything that must hold after it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from opmux import dispatch, selection
from opmux.conformance.buffers import DENSE, Guarded, Layout, bits, guarded
from opmux.conformance.cases import HUGE, Case, Claim, expected
from opmux.conformance.levels import ClaimFault
from opmux.kernel import Reason
from opmux.op import Op
from opmux.samples import TensorSpec

FLOATS = ("float32", "bfloat16", "float16")
LARGER = 4 * HUGE  # 4: the tail of gelu, 1 + erf(x), lies further out than at the usual scale


class Prepared:
    """A call whose tensors lie in guarded buffers; the outputs hold poison."""

    def __init__(
        self,
        op: Op,
        values: Mapping[str, Any],
        outs: Mapping[str, Tensor],
        layout: Layout = DENSE,
        device: str = "cpu",
    ) -> None:
        """Place the tensors. Of ``outs`` only shapes and dtypes are used."""
        self.op = op
        self.values = dict(values)
        self.buffers: dict[str, Guarded] = {}
        for name, value in values.items():
            if isinstance(value, Tensor):
                self.buffers[name] = guarded(name, value, layout, device)
        for name in op.outs:
            shape, dtype = outs[name].shape, outs[name].dtype
            self.buffers[name] = Guarded(name, shape, dtype, device, layout)
        self.values |= {name: buffer.view for name, buffer in self.buffers.items()}
        self.written = {*op.outs, *(p.name for p in op.params if p.mutated)}

    @property
    def args(self) -> list[Any]:
        """The arguments of the public call, without outs."""
        return [self.values[p.name] for p in self.op.params]

    @property
    def outs(self) -> list[Any]:
        """The outs."""
        return [self.values[name] for name in self.op.outs]

    def native(self) -> list[Any]:
        """Return the arguments of the torch op."""
        return dispatch.native_args(self.op, self.args, self.outs)

    def allowed(self) -> Exception | None:
        """Return why the op's definition forbids the call, or None."""
        try:
            self.op.check(self.args, self.outs)
        except (TypeError, ValueError) as error:
            return error
        return None

    def remember(self) -> None:
        """Take the present content of all buffers as what checks compare with."""
        for buffer in self.buffers.values():
            buffer.remember()

    def check_guards(self) -> None:
        """Raise AssertionError when a byte changed that the op does not write."""
        for name, buffer in self.buffers.items():
            buffer.check(written=name in self.written)

    def check_untouched(self) -> None:
        """Raise AssertionError when any byte changed."""
        for buffer in self.buffers.values():
            buffer.check(written=False)

    def results(self) -> dict[str, Tensor]:
        """Return what the op wrote."""
        return {name: b.view for name, b in self.buffers.items() if name in self.written}


def prepare(case: Case, layout: Layout = DENSE, kind: str = "plain") -> Prepared:
    """Place a case on the backend's device."""
    values, results = expected(case, kind)
    return Prepared(case.claim.op, values, results, layout, case.claim.target.device)


def refusal(claim: Claim, call: Prepared) -> Reason | None:
    """Return why the claim's kernel does not serve a call, or None."""
    return _candidate(claim, call)[1].refused


def served(case: Case) -> bool:
    """Whether the kernel serves a case."""
    try:
        return refusal(case.claim, prepare(case)) is None
    except (TypeError, ValueError):  # the definition forbids the dtype; test_claims says so
        return False


def runner(claim: Claim, call: Prepared) -> Callable[..., Any]:
    """Return the callable that runs the claim's kernel: the public op wherever it chooses it."""
    decision, candidate = _candidate(claim, call)
    if candidate.refused is not None:
        raise AssertionError(f"{claim} refused: {candidate.refused}")
    if decision.winner is candidate:
        name = claim.target.name
        return lambda *args: claim.op(*args, backend=name)
    make_bound = claim.op.make_bound
    bound: Callable[..., Any] = make_bound(candidate.call, candidate.name)
    return bound


def _candidate(claim: Claim, call: Prepared) -> tuple[selection.Decision, selection.Candidate]:
    decision = claim.op.explain(*call.values.values(), backend=claim.target.name)
    for candidate in decision.candidates:
        symbol = candidate.symbol or claim.op.name
        if candidate.backend == claim.target.name and symbol == claim.symbol:
            return decision, candidate
    raise AssertionError(f"{claim} is not among the candidates:\n{decision}")


def compare(
    op: Op, actual: Mapping[str, Tensor], wanted: Mapping[str, Tensor], kind: str = "plain"
) -> None:
    """Raise AssertionError where results are outside the op's tolerance, or not equal for bits."""
    tolerance = op.tolerance
    if kind == "huge":  # where a formula cancels, the error is relative to the inputs
        wide: dict[str, Any] = {
            n: (rtol, atol * LARGER) for n in FLOATS for rtol, atol in [getattr(tolerance, n)]
        }
        tolerance = dataclasses.replace(tolerance, **wide)
    for name, there in wanted.items():
        got, value = actual[name].cpu(), there.cpu()
        if tolerance.covers(value.dtype):
            tolerance.check(f"{op.name}: {name}", got, value)
        else:
            wrong = int((bits(got) != bits(value)).sum())
            if wrong:
                raise AssertionError(
                    f"{op.name}: {name}: {wrong} of {value.numel()} elements differ; "
                    f"{value.dtype} is compared bit for bit"
                )


def check(case: Case, layout: Layout = DENSE, kind: str = "plain") -> Prepared:
    """Run a case and raise AssertionError unless results, guards and read-only inputs are right."""
    call = prepare(case, layout, kind)
    run_claimed(case.claim, call)
    call.check_guards()
    compare(case.claim.op, call.results(), expected(case, kind)[1], kind)
    return call


def run_claimed(claim: Claim, call: Prepared) -> None:
    """Run a call that the kernel serves; raise ClaimFault when it raises after all."""
    run = runner(claim, call)
    call.remember()
    try:
        run(*call.args, *call.outs)
    except Exception as error:
        raise ClaimFault(f"{claim} serves this call, and raised {error!r}") from error


def check_refused(call: Prepared, run: Callable[..., Any]) -> Exception:
    """Run a call that must raise; raise AssertionError unless it does, with nothing written."""
    call.remember()
    try:
        run(*call.args, *call.outs)
    except (TypeError, ValueError, RuntimeError) as error:  # NoKernelError is a RuntimeError
        call.check_untouched()
        return error
    raise AssertionError("the call was accepted")


def twins(case: Case) -> list[tuple[str, str]]:
    """Return pairs of read-only tensors that may be one: same shape, both data of the dtype."""
    op = case.claim.op
    bound = inspect.signature(op.body).bind(*case.sample.args, **case.sample.kwargs).arguments
    mutated = {p.name for p in op.params if p.mutated}
    data = [
        name
        for name, spec in bound.items()
        if isinstance(spec, TensorSpec) and spec.dtype is None and name not in mutated
    ]
    return [
        (a, b)
        for i, a in enumerate(data)
        for b in data[i + 1 :]
        if bound[a].shape == bound[b].shape
    ]


def grown(case: Case, times: int, device: str | None = None) -> Prepared:
    """Return the case's call with its tokens repeated.

    Which dimension counts tokens is what the definition accepts: a first dimension that several
    tensors share may be repeated in all of them, the number that most tensors have first. Where the
    leading tensor's does not do alone, the first dimension of its size is repeated in each, as in
    positions (3, T).
    """
    values, results = expected(case, "plain")
    op, device = case.claim.op, device or case.claim.target.device
    sizes = [v.shape[0] for v in values.values() if isinstance(v, Tensor)]
    ranked = sorted(set(sizes), key=lambda s: (-sizes.count(s), sizes.index(s)))
    lead = values[op.leading].shape[0]
    tries = [(s, a) for s in ranked for a in (False, True) if not a or s == lead]
    for size, anywhere in tries:
        more = {
            name: _repeated(value, size, times, anywhere) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        try:
            op.check(list(more.values()))
        except (TypeError, ValueError):
            continue
        fresh = op.allocate(*more.values())
        outs = dict(zip(op.outs, fresh if isinstance(fresh, tuple) else (fresh,), strict=False))
        return Prepared(op, more, {**results, **outs}, device=device)
    raise AssertionError(f"{case}: no dimension counts tokens")


def _repeated(value: Tensor, size: int, times: int, anywhere: bool) -> Tensor:
    """Repeat the first dimension, if it has the size, or the first one that has it."""
    dims = range(value.dim() if anywhere else 1)
    dim = next((d for d in dims if value.shape[d] == size), None)
    if dim is None:
        return value
    return value.repeat(*(times if d == dim else 1 for d in range(value.dim())))

# SPDX-License-Identifier: Apache-2.0
"""The hot path: generated per op, so that a call costs a dict look-up over the chosen kernel.

For ``silu_and_mul(x)`` the generated call reads, in short::

    def silu_and_mul(x, out=None, *, backend=None):
        if tracing():
            return traced(x, out, backend)
        try:
            if out is None:
                out = allocate(x)
            table[scope() if backend is None else choice(backend), x.device, x.dtype](x, out)
        except Exception as error:
            diagnose(error, (x,), (out,), backend)
        return out

``table`` fills itself on a miss by asking :mod:`opmux.selection`. Checks that guard memory are the
kernel's; the sentence for the user is made here, after a call has failed.
"""

from __future__ import annotations

import difflib
import inspect
import linecache
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from opmux import loader, policy, selection
from opmux.kernel import NoKernelError, Signature

if TYPE_CHECKING:
    from opmux.op import Op

Call = Callable[..., Any]


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Return the message for a name that nobody knows."""
    close = difflib.get_close_matches(name, list(known), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(known))}"
    return f"unknown {what} {name!r}; {hint}"


class Table(dict[Any, Call]):
    """(scope, device, dtype) -> what runs. Emptied when the policy changes."""

    def __init__(self, op: Op) -> None:
        """Start empty."""
        super().__init__()
        self.op = op
        self.decisions: dict[Signature, selection.Decision] = {}

    def __missing__(self, key: tuple[Any, torch.device, torch.dtype]) -> Call:
        """Decide for a new key."""
        choice, device, dtype = key
        generation = policy.generation
        if any(kernel.needs_detail for _, kernel in loader.load().kernels(self.op.name)):
            call = _detailed(self.op, choice, device)
        else:
            signature = Signature(self.op.name, device, ((self.op.leading, dtype),))
            call = self.decide(signature, choice).call
        if generation == policy.generation:  # else another thread has changed the policy
            self[key] = call
        return call

    def decide(self, signature: Signature, choice: Any) -> selection.Decision:
        """Return the decision for a signature, or raise NoKernelError."""
        decision = selection.evaluate(self.op, signature, policy.effective(choice))
        if decision.winner is None:
            raise NoKernelError(str(decision), decision)
        selection.warn_reference(decision)
        self.decisions[signature] = decision
        return decision

    def clear(self) -> None:
        """Forget every decision."""
        super().clear()
        self.decisions.clear()


def _detailed(op: Op, choice: Any, device: torch.device) -> Call:
    """Return a second-level dispatcher for ops with kernels that look at shapes or layouts."""
    chosen: dict[Any, Call] = {}
    facts = op.facts

    def call(*args: Any) -> Any:
        key = facts(*args)
        kernel = chosen.get(key)
        if kernel is None:
            kernel = op.table.decide(signature_of(op, device, *key), choice).call
            chosen[key] = kernel
        return kernel(*args)

    return call


def signature_of(op: Op, device: torch.device, contiguous: bool, *facts: Any) -> Signature:
    """Build a signature from the flat facts that the generated code collects."""
    dtypes = zip(op.tensors, facts, strict=False)
    return Signature(
        op.name,
        device,
        tuple((name, dtype) for name, dtype in dtypes if dtype is not None),
        tuple(zip(op.axes, facts[len(op.tensors) :], strict=True)),
        contiguous,
    )


def resolve(
    name: str,
    generation: str,
    token: str,
    backend: str | None,
    device: torch.device,
    contiguous: Any,
    *facts: Any,
) -> str:
    """Return ``namespace.symbol`` of the chosen kernel, or ``reference``; runs while tracing.

    ``generation`` and ``token`` change with the policy, so that compiled code is guarded on them.
    An answer of ``?`` asks for the call again with the layout.
    """
    from opmux.op import find

    op = find(name)
    op.check_dtype(facts[0])
    if contiguous is None:
        if any(k.layout != "rows" for _, k in loader.load().kernels(name)):
            return "?"
        contiguous = True
    signature = signature_of(op, device, contiguous, *facts)
    winner = op.table.decide(signature, policy.choice(backend, token)).winner
    return winner.target if winner is not None else "reference"


# What torch.compiler.assume_constant_result sets; calling it would import torch._dynamo, which
# takes longer than importing torch. tests/test_compile.py holds it on every torch of the matrix.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def diagnose(
    op: Op,
    error: Exception,
    args: Sequence[Any],
    outs: Sequence[Any],
    backend: Any,
    bound: str = "",
) -> NoReturn:
    """Raise what the user should read about a failed call; ``bound`` names a bound kernel."""
    op.check(args, outs)  # raises when the call itself is at fault
    if type(error) in (RuntimeError, NotImplementedError):
        decision = _decision(op, args, outs, policy.choice(backend))
        ran = bound or (decision.winner and decision.winner.name)
        raise RuntimeError(
            f"{op.name}: backend {ran} failed on {decision.signature}: {error}"
        ) from error
    raise error


def _decision(op: Op, args: Sequence[Any], outs: Sequence[Any], choice: Any) -> selection.Decision:
    key = op.facts(*native_args(op, args, outs))
    device = args[[p.name for p in op.params].index(op.leading)].device
    signature = signature_of(op, device, *key)
    return selection.evaluate(op, signature, policy.effective(choice))


def native_args(op: Op, args: Sequence[Any], outs: Sequence[Any]) -> list[Any]:
    """Put public arguments into schema order."""
    flat: list[Any] = []
    for param, value in zip(op.params, args, strict=True):
        if param.per_row:
            flat += [value, 0] if isinstance(value, Tensor) else [None, value]
        else:
            flat.append(value)
    return [*flat, *outs]


def _bound(op: Op, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Return (arguments, outs) of a public call, or raise TypeError as Python would."""
    parameters = [
        inspect.Parameter(p.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=p.default)
        for p in op.params
    ]
    parameters += [
        inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for n in op.outs
    ]
    try:
        bound = inspect.Signature(parameters).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{op.name}: {error}") from None
    bound.apply_defaults()
    values = list(bound.arguments.values())
    return values[: len(op.params)], values[len(op.params) :]


def explain(
    op: Op, args: Sequence[Any], kwargs: dict[str, Any], backend: str | None
) -> selection.Decision:
    """Evaluate a call without running it."""
    values, outs = _bound(op, args, kwargs)
    op.check(values, outs)
    return _decision(op, values, outs, policy.choice(backend))


def bind(op: Op, args: Sequence[Any], kwargs: dict[str, Any], backend: str | None) -> Call:
    """Decide once and return the generated call over the chosen kernel."""
    values, outs = _bound(op, args, kwargs)
    op.check(values, outs)
    decision = _decision(op, values, outs, policy.choice(backend))
    if decision.winner is None:
        raise NoKernelError(str(decision), decision)
    selection.warn_reference(decision)
    kernel = _guarded(op, decision)
    bound: Call = op.make_bound(kernel, decision.winner.name)
    return bound


def _guarded(op: Op, decision: selection.Decision) -> Call:
    """Return the winner's call; one that would run what it does not claim gets its gates before it.

    The reference checks for itself, and so does a native kernel that states dtypes alone.
    """
    winner = decision.winner
    if winner is None or winner.kernel is None or winner.backend == selection.REFERENCE:
        return decision.call
    if winner.kernel.fn is None and not winner.kernel.needs_detail:
        return decision.call
    call, facts = decision.call, op.facts
    place = [name for name, _, _ in op.native].index(op.leading)
    served = set()

    def guarded(*args: Any) -> Any:
        key = (args[place].device, *facts(*args))
        if key not in served:
            signature = signature_of(op, *key)
            reason = selection.refusal(decision, op, signature)
            if reason is not None:
                raise NoKernelError(f"no kernel for {signature}: bound to {winner.name}: {reason}")
            served.add(key)
        return call(*args)

    return guarded


# ---- code generation ----

_TEMPLATE = """
def {name}({params}*, backend=None):
    if tracing():
        return traced({names}{outs}backend)
    try:
{allocate}
        table[
            scope() if backend is None else choice(backend), {lead}.device, {lead}.dtype
        ]({native})
    except Exception as error:
        diagnose(op, error, ({names}), ({outs}), backend)
    return {result}

def make_bound(kernel, bound):
    def {name}({bound_params}):
        try:
{allocate_deeper}
            kernel({native})
        except Exception as error:
            diagnose(op, error, ({names}), ({outs}), None, bound)
        return {result}
    return {name}

def traced({traced_params}):
{remember}
{allocate_shallow}
    policies = (policy.generation, policy.traced.token, backend)
    target = resolve({key_name!r}, *policies, {lead}.device, None, {facts})
    if target == "?":
        target = resolve({key_name!r}, *policies, {lead}.device, {contiguous}, {facts})
    if target == "reference":
{traced_reference}
    namespace, symbol = target.split(".")
    getattr(getattr(torch.ops, namespace), symbol).default({native})
    return {result}

def checked(fn):
    def {name}({schema_names}):
        check(({merged}), ({outs}))
        fn({schema_names})
    return {name}

def facts({schema_names}):
    return ({native_contiguous}, {native_facts})

def reference({schema_names}):
{merge}
    check(({names}), ({outs}))
{reference_body}
"""


def _lines(indent: int, *lines: str) -> str:
    return "\n".join(" " * indent + line for line in lines if line)


def _fact(name: str, optional: bool) -> str:
    return f"(None if {name} is None else {name}.dtype)" if optional else f"{name}.dtype"


def _allocation(op: Op, indent: int) -> str:
    names = "".join(f"{p.name}, " for p in op.params)
    if not op.outs:  # in place: what is wrong with the shapes is found by the kernel
        return _lines(indent, "")
    if len(op.outs) == 1:
        out = op.outs[0]
        return _lines(indent, f"if {out} is None:", f"    {out} = allocate({names})")
    missing = " or ".join(f"{out} is None" for out in op.outs)
    fresh = [f"    {o} = fresh[{i}] if {o} is None else {o}" for i, o in enumerate(op.outs)]
    return _lines(indent, f"if {missing}:", f"    fresh = allocate({names})", *fresh)


def _contiguous(names: Sequence[tuple[str, bool]]) -> str:
    tests = [f"({n} is None or {n}.is_contiguous())" if o else f"{n}.is_contiguous()"
             for n, o in names]  # fmt: skip
    return " and ".join(tests)


def source(op: Op) -> str:
    """Return the generated code of an op."""
    params = [p.name if p.default is inspect.Parameter.empty else f"{p.name}={p.default!r}"
              for p in op.params]  # fmt: skip
    params += [f"{out}=None" for out in op.outs]
    names = "".join(f"{p.name}, " for p in op.params)
    outs = "".join(f"{o}, " for o in op.outs)
    result = (op.outs[0] if len(op.outs) == 1 else f"({outs})") if op.outs else "None"
    per_row = {p.name for p in op.params if p.per_row}
    native = []
    for p in op.params:
        if p.per_row:
            is_tensor = f"isinstance({p.name}, Tensor)"
            native += [f"{p.name} if {is_tensor} else None", f"0 if {is_tensor} else {p.name}"]
        else:
            native.append(p.name)
    optional = {name: kind == "Tensor?" for name, kind, _ in op.native}

    def dtype_facts(traced: bool) -> list[str]:
        found = []
        for name in op.tensors:
            if name in per_row and traced:
                found.append(f"({name}.dtype if isinstance({name}, Tensor) else None)")
            elif name in per_row:
                found.append(_fact(f"{name}_per_row", True))
            else:
                found.append(_fact(name, optional[name]))
        return found

    # A symbolic size has no constant to decide by: index() makes torch.compile specialise on it.
    traced_axes = [f"index({op.leading}.shape[-1])", *op.scalars]
    merge = [
        f"{name} = {name} if {name}_per_row is None else {name}_per_row" for name in sorted(per_row)
    ]
    # explain() and bind() may come without outs
    tensors = [
        (n, optional[n] or n in op.outs) for n, kind, _ in op.native if kind.startswith("Tensor")
    ]
    traced_tensors = [
        (n, optional.get(n, True)) for n in (*op.tensors, *op.outs) if n not in per_row
    ]
    body = f"body({names})"
    if not op.outs:
        reference_body = [body]
        traced_reference = [body, "return None"]
    elif len(op.outs) == 1:
        reference_body = [f"{op.outs[0]}.copy_({body})"]
        traced_reference = [f"if fresh_out: return {body}", *reference_body, f"return {result}"]
    else:
        copies = [f"{o}.copy_(results[{i}])" for i, o in enumerate(op.outs)]
        reference_body = [f"results = {body}", *copies]
        traced_reference = [*reference_body, f"return {result}"]
    return _TEMPLATE.format(
        name=op.name,
        key_name=op.name,
        params="".join(f"{p}, " for p in params),
        bound_params=", ".join(params),
        traced_params=f"{names}{outs}backend",
        names=names,
        outs=outs,
        lead=op.leading,
        native=", ".join([*native, *op.outs]),
        result=result,
        allocate=_allocation(op, 8),
        allocate_deeper=_allocation(op, 12),
        allocate_shallow=_allocation(op, 4) if op.outs else _lines(4, f"allocate({names})"),
        remember=_lines(4, f"fresh_out = {op.outs[0]} is None" if op.outs else ""),
        facts=", ".join([*dtype_facts(True), *traced_axes]),
        contiguous=_contiguous(traced_tensors),
        native_contiguous=_contiguous(tensors),
        native_facts=", ".join([*dtype_facts(False), *traced_axes]),
        merged="".join(
            f"{n} if {n}_per_row is None else {n}_per_row, " if n in per_row else f"{n}, "
            for n in (p.name for p in op.params)
        ),
        schema_names=", ".join(name for name, _, _ in op.native),
        merge=_lines(4, *merge),
        traced_reference=_lines(8, *traced_reference),
        reference_body=_lines(4, *reference_body),
    )


def install(op: Op) -> None:
    """Generate the op's functions.

    The public call is a plain function: calling an instance costs 250 ns more, with keywords.
    """
    namespace: dict[str, Any] = {
        "Tensor": Tensor,
        "allocate": op.allocate,
        "body": op.body,
        "check": op.check,
        "choice": policy.choice,
        "diagnose": diagnose,
        "index": operator.index,
        # torch.export without dynamo runs the eager path on fake tensors, so this one is enough
        "tracing": torch.compiler.is_dynamo_compiling,
        "op": op,
        "policy": policy,
        "resolve": resolve,
        "scope": policy.scope,
        "table": op.table,
        "torch": torch,
    }
    text = source(op)
    filename = f"<opmux {op.name}>"
    exec(compile(text, filename, "exec"), namespace)
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    call = namespace[op.name]
    call.__doc__, call.__module__ = op.__doc__, "opmux"
    call.op, call.bind, call.explain = op, op.bind, op.explain
    op.call = call
    for name in ("facts", "reference", "checked", "make_bound"):
        setattr(op, name, namespace[name])

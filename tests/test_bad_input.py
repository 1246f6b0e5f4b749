# SPDX-License-Identifier: Apache-2.0
"""Wrong calls of every op, generated from its signature: refused in words, with nothing written.

In-place ops, and all ops that are given ``out``, reach the kernel first: its own check must throw
before it writes, and the sentence is made afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import fakes
import opmux
from opmux import loader
from opmux.op import Op, Param, all_ops

OPS = sorted(all_ops())
# Index arguments, and the tensor whose rows they count.
INDICES = {"positions": "cos_sin_cache", "slot_mapping": "k_cache", "indices": "logits"}


@dataclass
class Bad:
    """One wrong call: which argument is wrong, and what the message must show of it."""

    arg: str
    what: str
    args: dict[str, Any]
    shows: str


def _strided(t: Tensor) -> Tensor:
    """Return the same values with every second column left out."""
    wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
    wide[..., ::2] = t
    return wide[..., ::2]


def _grown(t: Tensor, dim: int) -> Tensor:
    return torch.cat([t, t.narrow(dim, 0, 1)], dim).contiguous()


def tensor_mistakes(op: Op, name: str, t: Tensor, others: bool) -> Iterator[tuple[str, Any, str]]:
    """Yield (what, wrong value, what the message shows)."""
    yield "a list", [1.0], "list"
    yield "an array's name", "x", "str"
    yield "int16", t.to(torch.int16), "int16"
    yield "complex", t.to(torch.complex64), "complex64"
    yield "a scalar tensor", t.flatten()[0], "scalar"
    yield "sparse", t.to_sparse(), "sparse"
    yield "strided columns", _strided(t), "2"
    if others:
        yield "meta", t.to("meta"), "meta"
    for what, dim in (("rows + 1", 0), ("columns + 1", -1)):
        # the sentence may be about another argument, but the wrong size is in it
        grown = _grown(t, dim)
        yield what, grown, str(grown.shape[dim])


def scalar_mistakes(param: Param) -> Iterator[tuple[str, Any, str]]:
    """Yield wrong values for a scalar argument."""
    yield "text", "3", "str"
    yield "a list", [1], "list"
    if not param.optional:
        yield "None", None, "None"
    if param.kind.startswith(("int", "float")):
        yield "a bool", True, "bool"
        yield "complex", 1j, "complex"
    if param.kind.startswith(("int", "bool")):
        yield "a float", 1.5, "float"
    if param.kind.startswith("bool"):
        yield "an int", 1, "int"
    if not param.per_row:
        yield "a tensor", torch.ones(1), "Tensor"


def index_mistakes(value: Tensor, end: int) -> Iterator[tuple[str, Any, str]]:
    """Yield indices with one outside of [0, end); only some arguments refuse negative ones."""
    for index in (end, end + 2**31, -1):
        for dtype in (torch.int64, torch.int32):
            if index < 2**31 or dtype == torch.int64:
                wrong = value.to(dtype, copy=True)
                wrong[-1] = index
                yield f"{index} in {dtype}", wrong, str(index)


def out_mistakes(out: Tensor) -> Iterator[tuple[str, Any, str]]:
    """Yield wrong values for a result that the caller gives."""
    yield "a list", [], "list"
    yield "shape", _grown(out, -1), str(out.shape[-1] + 1)
    yield "more dimensions", out[None].clone(), str(tuple(out[None].shape))
    other = torch.float16 if out.dtype != torch.float16 else torch.float32
    yield "dtype", out.to(other), str(other).removeprefix("torch.")
    yield "meta", out.to("meta"), "meta"
    if out.shape[0] > 1:  # of one dimension: said of its stride
        yield "expanded", out[:1].expand_as(out), "expanded" if out.dim() > 1 else "stride 0"
    if out.dim() > 1:
        yield "strided columns", _strided(out), "2"


def mistakes(op: Op) -> Iterator[Bad]:
    """Yield every wrong call of an op.

    Other sizes, strides, dtypes and indices are mistakes where the definition says so.
    """
    for case in _changed(op):
        sized = ("rows", "columns", "int16", "complex", "strided")
        if case.what.startswith(sized) or " in torch" in case.what:
            args = [case.args[p.name] for p in op.params]
            outs = [case.args[name] for name in op.outs]
            try:
                op.check(args, outs)
            except (ValueError, TypeError):
                yield case
        else:
            yield case


def _changed(op: Op) -> Iterator[Bad]:
    base = fakes.good(op)
    tensors = [p.name for p in op.params if isinstance(base[p.name], Tensor)]
    outs = _outs(op, base)

    def bad(arg: str, what: str, value: Any, shows: str, **also: Any) -> Bad:
        return Bad(arg, what, {**base, **outs, **also, arg: value}, shows)

    for p in op.params:
        value = base[p.name]
        if isinstance(value, Tensor):
            for what, wrong, shows in tensor_mistakes(op, p.name, value, len(tensors) > 1):
                yield bad(p.name, what, wrong, shows)
                if outs and what != "meta":  # without out, the allocator sees the mistake first
                    yield bad(p.name, f"{what}, no out", wrong, shows, **dict.fromkeys(outs))
        if p.is_tensor and not p.optional:
            yield bad(p.name, "None", None, "None")
        if not p.is_tensor:
            for what, wrong, shows in scalar_mistakes(p):
                yield bad(p.name, what, wrong, shows)
        if p.mutated and value.shape[0] > 1:
            yield bad(p.name, "expanded", value[:1].expand_as(value), "expanded")
        if INDICES.get(p.name) in base and isinstance(value, Tensor):
            for what, wrong, shows in index_mistakes(value, base[INDICES[p.name]].shape[0]):
                yield bad(p.name, what, wrong, shows)
    for name, out in outs.items():
        for what, wrong, shows in out_mistakes(out):
            yield bad(name, what, wrong, shows)


def _outs(op: Op, base: dict[str, Any]) -> dict[str, Tensor]:
    made = op.allocate(*(base[p.name] for p in op.params))
    if not op.outs:
        return {}
    made = made if isinstance(made, tuple) else (made,)
    return {n: torch.full_like(o, 7) for n, o in zip(op.outs, made, strict=True)}


def _memory(value: Any) -> Tensor | None:
    """Return a copy of the memory under a tensor, its gaps included."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        return None
    return torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).clone()


def _same(before: Tensor | None, after: Tensor | None) -> bool:
    return (before is None) == (after is None) and (
        before is None or after is None or torch.equal(before, after)
    )


def refused(op: Op, case: Bad, backend: str | None) -> str:
    """Make the wrong call; return what is wrong with how it was refused, or ""."""
    before = {name: _memory(v) for name, v in case.args.items()}
    try:
        getattr(opmux, op.name)(**case.args, backend=backend)
    except (ValueError, TypeError, opmux.NoKernelError) as error:
        text = str(error)
        wanted = [op.name, case.arg, case.shows]
        if case.what.startswith(("rows", "columns")):
            wanted = [op.name]  # what no longer fits may be another argument
            if not any(name in text for name in (*(p.name for p in op.params), *op.outs)):
                return f"names no argument: {text}"
        missing = [w for w in wanted if w not in text]
        if missing:
            return f"{type(error).__name__} without {missing}: {text}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    else:
        return "was accepted"
    touched = [name for name, v in case.args.items() if not _same(before[name], _memory(v))]
    return f"wrote to {touched}" if touched else ""


def harmless(op: Op, case: Bad) -> bool:
    """Whether a native kernel may run the call: torch's own parser converts the scalar.

    It makes ints, floats and bools of each other, and of tensors of one element.
    """
    what = case.what.removesuffix(", no out")
    param = next((p for p in op.params if p.name == case.arg), None)
    if param is None or param.is_tensor:
        return False
    if isinstance(case.args[case.arg], Tensor):
        return param.kind in ("float", "bool") and what == "a tensor"
    return param.kind == "bool" or what == "a bool"


@pytest.fixture(scope="module")
def installed() -> Iterator[set[str]]:
    loader.reset()
    yield {"reference"} | {b.name for b in opmux.load().backends}
    loader.reset()


@pytest.mark.parametrize("backend", ["reference", "cpu_amx"])
@pytest.mark.parametrize("name", OPS)
def test_wrong_calls(name: str, backend: str, installed: set[str]) -> None:
    """Each is refused with op, argument and value in the message; no byte changes."""
    if backend not in installed:
        pytest.skip(f"backend {backend} is not installed")
    op = all_ops()[name]
    if op.explain(**fakes.good(op), backend=backend).winner is None:
        pytest.skip(f"backend {backend} has no kernel for {name}")
    wrong = []
    for case in mistakes(op):
        complaint = refused(op, case, backend)
        if complaint == "was accepted" and backend != "reference" and harmless(op, case):
            continue
        if complaint:
            wrong.append(f"{case.arg}: {case.what}: {complaint}")
    assert not wrong, f"{len(wrong)} calls of {name}:\n" + "\n".join(wrong)


def test_there_are_enough_wrong_calls() -> None:
    """At least 200, and at least eight for every op."""
    counts = {name: sum(1 for _ in mistakes(all_ops()[name])) for name in OPS}
    assert min(counts.values()) >= 8, counts
    assert sum(counts.values()) >= 200, counts


@pytest.mark.parametrize("name", OPS)
def test_right_calls_pass(name: str, installed: set[str]) -> None:
    """The calls that the mistakes start from are accepted: the tests above test mistakes."""
    op = all_ops()[name]
    for backend in sorted(installed & {"reference", "cpu_amx"}):
        call = fakes.good(op)
        if op.explain(**call, backend=backend).winner is not None:
            getattr(opmux, name)(**call, **_outs(op, call), backend=backend)


@pytest.mark.parametrize("name", OPS)
def test_wrong_argument_lists(name: str) -> None:
    """Missing, unknown and surplus arguments: a TypeError that names op and argument."""
    op = all_ops()[name]
    call, function = fakes.good(op), getattr(opmux, name)
    for missing in [p.name for p in op.params if p.default is p_empty()]:
        rest = {k: v for k, v in call.items() if k != missing}
        for wrong in (function, op.explain, op.bind):
            with pytest.raises(TypeError, match=rf"{name}.*missing.*'{missing}'"):
                wrong(**rest)
    for wrong in (function, op.explain, op.bind):
        with pytest.raises(TypeError, match=rf"{name}.*unexpected keyword argument 'outt'"):
            wrong(**call, outt=None)
        with pytest.raises(TypeError, match=rf"{name}.*positional argument"):
            wrong(*call.values(), *[None] * (len(op.outs) + 1))


def p_empty() -> Any:
    import inspect

    return inspect.Parameter.empty


@pytest.mark.parametrize("name", OPS)
def test_explain_and_bind_refuse_the_same(name: str) -> None:
    """A call that is wrong is wrong for explain() and bind(), too."""
    op = all_ops()[name]
    for case in mistakes(op):
        for ask in (op.explain, op.bind):
            with pytest.raises((ValueError, TypeError), match=name):
                ask(**case.args)


def test_no_vocabulary(installed: set[str]) -> None:
    """Rows of zero columns have no mass: zeros, or token -1."""
    probs, uniform = torch.zeros(3, 0), torch.rand(3)
    for backend in sorted(installed & {"reference", "cpu_amx"}):
        assert opmux.top_k_renorm_prob(probs, 2, backend=backend).shape == (3, 0)
        assert opmux.top_p_renorm_prob(probs, 0.5, backend=backend).shape == (3, 0)
        for token in (
            opmux.top_k_top_p_sample(probs, 2, 0.5, uniform, backend=backend),
            opmux.min_p_sample(probs, 0.5, uniform, backend=backend),
        ):
            assert token.tolist() == [-1, -1, -1]

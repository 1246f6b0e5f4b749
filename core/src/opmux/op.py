# SPDX-License-Identifier: Apache-2.0
"""An op: one Python definition from which schema, reference, allocator, fake and samples follow."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from opmux import dispatch
from opmux.kernel import FLOATS
from opmux.samples import Sample, Tolerance

OPS: dict[str, Op] = {}
F = TypeVar("F", bound=Callable[..., Any])

_SCHEMA = {
    "Tensor": "Tensor", "Tensor | None": "Tensor?", "int": "int", "float": "float",
    "bool": "bool", "int | None": "int?", "float | None": "float?",
}  # fmt: skip
_ACCEPTS = {
    "int": (int,), "float": (float, int), "bool": (bool,), "int?": (int,), "float?": (float, int),
}  # fmt: skip


@dataclass(frozen=True)
class Param:
    """One argument of the public call.

    ``kind`` is its schema type; ``per_row`` marks ``Tensor | int`` and ``Tensor | float``, which
    become two schema arguments: ``Tensor? NAME_per_row`` and the scalar ``NAME``.
    """

    name: str
    kind: str
    default: Any
    mutated: bool = False
    per_row: bool = False

    @property
    def is_tensor(self) -> bool:
        """Whether it is a tensor or an optional tensor."""
        return self.kind.startswith("Tensor")

    @property
    def optional(self) -> bool:
        """Whether None is a value."""
        return self.kind.endswith("?")

    def native(self) -> list[tuple[str, str, bool]]:
        """Return its schema arguments as (name, type, mutated)."""
        per_row = [(f"{self.name}_per_row", "Tensor?", False)] if self.per_row else []
        return [*per_row, (self.name, self.kind, self.mutated)]


class Op:
    """A registered op: its definition and what follows from it.

    ``call`` is what users know as ``opmux.<name>``: a function that :mod:`opmux.dispatch` generates
    from the definition, with ``bind``, ``explain`` and ``op`` as attributes.
    """

    call: Callable[..., Any]
    facts: Callable[..., Any]
    reference: Callable[..., Any]
    checked: Callable[..., Any]
    make_bound: Callable[..., Any]

    def __init__(
        self,
        body: Callable[..., Any],
        mutates: Sequence[str],
        out: Sequence[str],
        leading: str | None,
        dtypes: tuple[torch.dtype, ...] | None,
        tolerance: Tolerance,
        version: int,
    ) -> None:
        """Take the definition apart; called by :func:`op`."""
        self.name = body.__name__
        self.__name__ = body.__name__
        self.__doc__ = body.__doc__
        self.__module__ = body.__module__
        self.__wrapped__ = body
        self.body = body
        self.version = version
        self.tolerance = tolerance
        self.dtypes = dtypes
        self.params = tuple(_params(body, mutates))
        tensors = [p.name for p in self.params if p.is_tensor]
        if not tensors:
            raise TypeError(f"{self.name}: an op needs a tensor argument")
        returns_value = body.__annotations__.get("return") not in (None, "None")
        self.outs = tuple(out) if returns_value else ()
        self.leading = leading or tensors[0]
        # The leading tensor comes first: a decision starts from its device and dtype.
        rest = [p.name for p in self.params if p.is_tensor or p.per_row]
        self.tensors = (self.leading, *(name for name in rest if name != self.leading))
        self.scalars = tuple(
            p.name for p in self.params if p.kind in ("int", "bool") and not p.per_row
        )
        self.axes = ("last_dim", *self.scalars)
        self._outputs: Callable[..., Any] | None = None
        self._samples: Callable[[], Iterator[Sample]] | None = None
        self.table = dispatch.Table(self)
        dispatch.install(self)

    # ---- what a definition file adds ----

    def outputs(self, function: F) -> F:
        """Register the function that checks shapes and allocates the result; also the fake."""
        self._outputs = function
        return function

    def samples(self, function: F) -> F:
        """Register the generator of samples."""
        self._samples = function
        return function

    def allocate(self, *args: Any) -> Any:
        """Check the arguments' shapes and return fresh outputs (None for in-place ops)."""
        if self._outputs is None:
            raise TypeError(f"{self.name}: the definition has no @{self.name}.outputs")
        return self._outputs(*args)

    def draw(self) -> list[Sample]:
        """Return the samples."""
        if self._samples is None:
            raise TypeError(f"{self.name}: the definition has no @{self.name}.samples")
        return list(self._samples())

    # ---- the schema, derived ----

    @cached_property
    def native(self) -> tuple[tuple[str, str, bool], ...]:
        """The schema's arguments in order: (name, type, mutated)."""
        ins = [arg for p in self.params for arg in p.native()]
        return (*ins, *((name, "Tensor", True) for name in self.outs))

    @cached_property
    def schema(self) -> str:
        """The torch schema without the name, e.g. ``(Tensor x, Tensor(a!) out) -> ()``."""
        alias = iter("abcdefghijklmnopqrstuvwxyz")
        args = []
        for name, kind, mutated in self.native:
            base = f"Tensor({next(alias)}!){kind.removeprefix('Tensor')}" if mutated else kind
            args.append(f"{base} {name}")
        return f"({', '.join(args)}) -> ()"

    @cached_property
    def interface(self) -> str:
        """What a native library must report for this op: ``silu_and_mul(Tensor,Tensor!)``."""
        kinds = [
            kind.replace("Tensor", "Tensor!") if mutated else kind
            for _, kind, mutated in self.native
        ]
        return f"{self.name}({','.join(kinds)})"

    @cached_property
    def schema_hash(self) -> str:
        """Digest of name, interface version and schema; part of the handshake."""
        text = f"{self.name} v{self.version} {self.schema}"
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    # ---- calls ----

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the op, as ``opmux.<name>`` does."""
        return self.call(*args, **kwargs)

    def explain(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        """Return the :class:`~opmux.selection.Decision` that this call would run by."""
        return dispatch.explain(self, args, kwargs, backend)

    def bind(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Callable[..., Any]:
        """Choose once for calls like this one and return the chosen kernel as a callable.

        The callable takes the op's arguments, costs no selection, and refuses what the kernel
        cannot run. It keeps its choice when the policy changes.
        """
        return dispatch.bind(self, args, kwargs, backend)

    def check(self, args: Sequence[Any], outs: Sequence[Tensor | None] = ()) -> None:
        """Raise ValueError or TypeError for a call that the definition does not allow."""
        for param, value in zip(self.params, args, strict=True):
            _check_type(self.name, param, value)
        values = {p.name: v for p, v in zip(self.params, args, strict=True)}
        tensors = {k: v for k, v in values.items() if isinstance(v, Tensor)}
        tensors |= {k: v for k, v in zip(self.outs, outs, strict=False) if v is not None}
        leading = values[self.leading]
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{self.name}: {name} must be a Tensor, got {_kind(tensor)}")
            if tensor.layout is not torch.strided:
                raise TypeError(f"{self.name}: {name} must be a dense tensor, got {tensor.layout}")
            if tensor.device != leading.device:
                raise ValueError(
                    f"{self.name}: {name} must be on {leading.device} like {self.leading}, "
                    f"got {tensor.device}"
                )
            if tensor.dim() == 0:
                raise ValueError(f"{self.name}: {name} must have a dimension, got a scalar tensor")
            if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
                raise ValueError(
                    f"{self.name}: last dimension of {name} must be contiguous, "
                    f"got stride {tensor.stride(-1)}"
                )
        self.check_dtype(leading.dtype)
        self._check_outs(args, outs)

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise TypeError for a dtype that the leading tensor may not have."""
        if self.dtypes and dtype not in self.dtypes:
            raise TypeError(
                f"{self.name}: dtype of {self.leading} must be one of {_names(self.dtypes)}, "
                f"got {_names((dtype,))}"
            )

    def _check_outs(self, args: Sequence[Any], outs: Sequence[Tensor | None]) -> None:
        expected = self.allocate(*args)
        wanted = expected if isinstance(expected, tuple) else (expected,)
        for name, want, got in zip(self.outs, wanted, outs, strict=False):
            if got is None:
                continue
            if got.shape != want.shape:
                raise ValueError(
                    f"{self.name}: {name} must have shape {tuple(want.shape)}, "
                    f"got {tuple(got.shape)}"
                )
            if got.dtype != want.dtype:
                raise TypeError(
                    f"{self.name}: {name} must have dtype {_names((want.dtype,))}, "
                    f"got {_names((got.dtype,))}"
                )
        for name, got in self._written(args, outs):
            if got.numel() and any(
                stride == 0 and size > 1
                for stride, size in zip(got.stride(), got.shape, strict=True)
            ):
                raise ValueError(f"{self.name}: {name} is written, so it must not be expanded")

    def _written(
        self, args: Sequence[Any], outs: Sequence[Tensor | None]
    ) -> Iterator[tuple[str, Tensor]]:
        for param, value in zip(self.params, args, strict=True):
            if param.mutated and value is not None:
                yield param.name, value
        for name, got in zip(self.outs, outs, strict=False):
            if got is not None:
                yield name, got

    def __repr__(self) -> str:
        """Return ``<opmux op NAME>``."""
        return f"<opmux op {self.name}>"


def _params(body: Callable[..., Any], mutates: Sequence[str]) -> Iterator[Param]:
    for name, p in inspect.signature(body).parameters.items():
        text = p.annotation
        if not isinstance(text, str):  # a file without the future import
            text = inspect.formatannotation(text)
        text = " ".join(text.replace("torch.Tensor", "Tensor").split())
        per_row = text in ("Tensor | int", "Tensor | float")
        kind = _SCHEMA.get(text.removeprefix("Tensor | ") if per_row else text)
        if kind is None:
            raise TypeError(
                f"{body.__name__}: annotation of {name} must be one of "
                f"{', '.join(_SCHEMA)}, Tensor | int, Tensor | float, got {text!r}"
            )
        yield Param(name, kind, p.default, name in mutates, per_row)
    unknown = set(mutates) - set(inspect.signature(body).parameters)
    if unknown:
        raise TypeError(f"{body.__name__}: mutates names no argument: {', '.join(unknown)}")


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _check_type(op_name: str, param: Param, value: Any) -> None:
    if value is None and param.optional:
        return
    if param.is_tensor:
        good = isinstance(value, Tensor)
        wanted = "a Tensor"
    elif param.per_row and isinstance(value, Tensor):
        return
    else:
        kinds = _ACCEPTS[param.kind]
        # bool is an int in Python, but True as a head_dim is a mistake
        good = isinstance(value, (*kinds, torch.SymInt, torch.SymFloat)) and (
            bool in kinds or not isinstance(value, bool)
        )
        wanted = f"a Tensor or {param.kind}" if param.per_row else param.kind.removesuffix("?")
    if not good:
        raise TypeError(f"{op_name}: {param.name} must be {wanted}, got {_kind(value)}")


@overload
def op(body: Callable[..., Any], /) -> Op: ...
@overload
def op(
    *,
    mutates: Sequence[str] = (),
    out: Sequence[str] = ("out",),
    leading: str | None = None,
    dtypes: tuple[torch.dtype, ...] | None = FLOATS,
    tolerance: Tolerance = ...,
    version: int = 1,
) -> Callable[[Callable[..., Any]], Op]: ...
def op(
    body: Callable[..., Any] | None = None,
    /,
    *,
    mutates: Sequence[str] = (),
    out: Sequence[str] = ("out",),
    leading: str | None = None,
    dtypes: tuple[torch.dtype, ...] | None = FLOATS,
    tolerance: Tolerance | None = None,
    version: int = 1,
) -> Any:
    """Define an op; the decorated function is its reference, in plain PyTorch.

    Args:
        body: the reference. Annotations give the schema; ``-> None`` makes the op in place.
        mutates: arguments that the op writes.
        out: names of the results, for an op that returns a tuple.
        leading: the tensor whose device and dtype lead the choice; default: the first.
        dtypes: dtypes that the leading tensor may have; None for any.
        tolerance: how far kernels may be from the reference, with the reason.
        version: interface version; raise it when the meaning changes but the schema does not.
    """

    def define(function: Callable[..., Any]) -> Op:
        made = Op(function, mutates, out, leading, dtypes, tolerance or Tolerance(), version)
        if OPS.setdefault(made.name, made) is not made:
            raise ValueError(f"op {made.name} is defined twice")
        return made

    return define if body is None else define(body)


def find(name: str) -> Op:
    """Return an op by name, or raise ValueError with suggestions."""
    ops = all_ops()
    if name not in ops:
        raise ValueError(dispatch.unknown("op", name, ops))
    return ops[name]


def all_ops() -> Mapping[str, Op]:
    """Import every definition of core and return all ops by name, also those of other packages."""
    from opmux import ops

    ops.load_all()
    return dict(sorted(OPS.items()))

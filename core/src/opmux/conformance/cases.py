# SPDX-License-Identifier: Apache-2.0
"""What is tested: the kernels of one backend, each with the samples of its op."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from opmux import loader
from opmux.conformance.buffers import DENSE, Guarded, Layout
from opmux.dispatch import unknown
from opmux.kernel import FLOATS, Kernel, Property
from opmux.op import Op, all_ops, find
from opmux.samples import Sample, TensorSpec
from opmux.selection import REFERENCE


@dataclass(frozen=True)
class Target:
    """The backend under test; ``loaded`` is None for the reference and for one that failed."""

    name: str
    device: str
    loaded: loader.Loaded | None
    ops: tuple[str, ...] = ()

    @property
    def present(self) -> bool:
        """Whether this machine has a device for the backend's tensors."""
        if self.device == "cpu":
            return True
        module = getattr(torch, self.device, None)
        return bool(module is not None and module.is_available())

    def kernels(self) -> Iterator[tuple[Op, Kernel]]:
        """Yield every kernel that is tested, by op name."""
        if self.name == REFERENCE:
            for name, op in sorted(all_ops().items()):
                if not self.ops or name in self.ops:
                    claim = frozenset({Property.COMPILE, Property.DETERMINISTIC})
                    yield op, Kernel(op.dtypes or FLOATS, properties=claim)
            return
        for name, kernel in sorted(self.loaded.backend.items() if self.loaded else (),
                                   key=lambda item: (item[0], item[1].symbol)):  # fmt: skip
            if (not self.ops or name in self.ops) and name in all_ops():
                yield find(name), kernel


def target(name: str, ops: Sequence[str] = ()) -> Target:
    """Return the backend to test, or raise ValueError for a name or an op that nobody knows."""
    for op in ops:
        find(op)
    registry = loader.load()
    known = {REFERENCE, *registry.names}
    if name not in known:
        raise ValueError(unknown("backend", name, known))
    loaded = next((b for b in registry.backends if b.name == name), None)
    return Target(name, loaded.backend.device if loaded else "cpu", loaded, tuple(ops))


@dataclass(frozen=True, eq=False)
class Claim:
    """One kernel at one dtype that it claims."""

    target: Target
    op: Op
    kernel: Kernel
    dtype: torch.dtype

    @property
    def symbol(self) -> str:
        """The name of the kernel's torch op."""
        return self.kernel.symbol or self.op.name

    def __str__(self) -> str:
        """Return a test id such as ``silu_and_mul-bfloat16``."""
        return f"{self.symbol}-{str(self.dtype).removeprefix('torch.')}"

    def cases(self) -> list[Case]:
        """Return a case for each sample."""
        return [Case(self, sample) for sample in self.op.draw()]


@dataclass(frozen=True, eq=False)
class Case:
    """One sample of a claim."""

    claim: Claim
    sample: Sample

    def __str__(self) -> str:
        """Return a test id such as ``silu_and_mul-bfloat16-17x8``."""
        return f"{self.claim}-{self.sample}"

    @property
    def shapes(self) -> list[torch.Size]:
        """The shapes of the sample's tensors."""
        items = [*self.sample.args, *self.sample.kwargs.values()]
        return [torch.Size(item.shape) for item in items if isinstance(item, TensorSpec)]

    @property
    def size(self) -> int:
        """How many elements the sample has."""
        return sum(shape.numel() for shape in self.shapes)

    @property
    def empty(self) -> bool:
        """Whether a tensor holds nothing."""
        return any(not shape.numel() for shape in self.shapes)

    def allows(self, layout: Layout) -> bool:
        """Whether the op's definition takes the sample in a layout; found out without data."""
        op = self.claim.op
        bound = inspect.signature(op.body).bind(*self.sample.args, **self.sample.kwargs)
        bound.apply_defaults()

        def place(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
            return Guarded(name, shape, dtype, "meta", layout).view

        values = {
            name: place(name, torch.Size(v.shape), v.dtype or self.claim.dtype)
            if isinstance(v, TensorSpec)
            else v
            for name, v in bound.arguments.items()
        }
        try:
            fresh = op.allocate(*values.values())
            outs = fresh if isinstance(fresh, tuple) else (fresh,)
            placed = [place("out", o.shape, o.dtype) for o in outs[: len(op.outs)]]
            op.check(list(values.values()), placed)
        except (TypeError, ValueError):
            return False
        except (RuntimeError, NotImplementedError):  # the definition looks at values
            return True
        return True

    def differs(self, layout: Layout) -> bool:
        """Whether a layout is another than dense for this sample."""
        return layout is DENSE or any(
            layout.offset or layout.strides(shape) != DENSE.strides(shape) for shape in self.shapes
        )

    def values(self) -> dict[str, Any]:
        """Return fresh arguments on the CPU, by name."""
        return arguments(self.claim.op, self.sample, self.claim.dtype)


def arguments(op: Op, sample: Sample, dtype: torch.dtype) -> dict[str, Any]:
    """Return a sample's arguments on the CPU, by name, defaults included."""
    args, kwargs = sample.make(dtype)
    bound = inspect.signature(op.body).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def claims(tested: Target) -> list[Claim]:
    """Return every (kernel, dtype) that the backend claims."""
    return [
        Claim(tested, op, kernel, dtype)
        for op, kernel in tested.kernels()
        for dtype in kernel.dtypes
    ]


# ---- inputs at which formulas break: each changes the tensors of the dtype under test ----

HUGE = 64.0  # exp(-x) overflows, and a product of two still fits float16
PLANTS = ("plain", "tiny", "huge", "nan", "inf")


def plant(case: Case, kind: str, values: dict[str, Any]) -> None:
    """Change the float inputs of a case in place.

    ``tiny`` shows a wrong epsilon, ``huge`` an exponential that overflows. Tensors whose dtype the
    definition fixes (random numbers, thresholds) are parameters, not data, and stay.
    """
    specs = inspect.signature(case.claim.op.body).bind(*case.sample.args, **case.sample.kwargs)
    for name, spec in specs.arguments.items():
        if not isinstance(spec, TensorSpec) or spec.dtype is not None:
            continue
        tensor: Tensor = values[name]
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1 or not tensor.numel():
            continue
        if kind in ("tiny", "huge"):
            tensor.mul_(2.0**-10 if kind == "tiny" else HUGE)
            continue
        flat = tensor.view(-1)
        for place, value in enumerate(_SPECIALS[kind]):
            flat[place * 7 % flat.numel()] = value  # into the first vector of the first row
        flat[-1] = _SPECIALS[kind][0]  # and into the tail of the last


_SPECIALS = {"nan": (float("nan"), -0.0), "inf": (float("inf"), float("-inf"))}


@lru_cache(maxsize=4)
def expected(case: Case, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a case's arguments and what the definition makes of them; neither may be changed.

    The reference runs on the CPU, so that one truth serves every device.
    """
    op = case.claim.op
    values = case.values()
    if kind != "plain":
        plant(case, kind, values)
    copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()}
    result = op(**copies, backend=REFERENCE)
    results = result if isinstance(result, tuple) else (result,)
    written = {p.name: copies[p.name] for p in op.params if p.mutated}
    found = {**written, **dict(zip(op.outs, results, strict=False))}
    return values, {name: value for name, value in found.items() if value is not None}

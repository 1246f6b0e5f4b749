# SPDX-License-Identifier: Apache-2.0
"""Samples: the calls that tests and benchmarks of an op draw from, and what counts as equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Fill = Callable[[torch.Generator], Tensor]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a sample, made when dtype, device and seed are known.

    ``dtype`` None means the dtype under test.
    """

    shape: tuple[int, ...]
    fill: Fill
    dtype: torch.dtype | None = None

    def make(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> Tensor:
        """Return the tensor; values are drawn on the CPU, so that every device sees the same."""
        return self.fill(generator).to(self.dtype or dtype).to(device)


def randn(*shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> TensorSpec:
    """Normally distributed values."""
    return TensorSpec(shape, lambda g: torch.randn(shape, generator=g) * scale, dtype)


def rand(*shape: int, dtype: torch.dtype | None = None) -> TensorSpec:
    """Values uniform in [0, 1)."""
    return TensorSpec(shape, lambda g: torch.rand(shape, generator=g), dtype)


def randint(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> TensorSpec:
    """Integers uniform in [low, high)."""
    return TensorSpec(shape, lambda g: torch.randint(low, high, shape, generator=g), dtype)


def permutation(n: int, count: int, dtype: torch.dtype = torch.int64) -> TensorSpec:
    """Return ``count`` different integers below ``n``."""
    return TensorSpec((count,), lambda g: torch.randperm(n, generator=g)[:count], dtype)


def probabilities(*shape: int, temperature: float = 1.0) -> TensorSpec:
    """Softmax of normal logits, in the dtype under test."""
    return TensorSpec(
        shape,
        lambda g: torch.softmax(torch.randn(shape, generator=g) * 3 / temperature, -1),
    )


@dataclass(frozen=True, init=False)
class Sample:
    """One call: the arguments of the op, with tensors as specs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the arguments as the op takes them."""
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "kwargs", kwargs)

    def make(
        self, dtype: torch.dtype, device: str = "cpu", seed: int = 0
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return fresh (args, kwargs)."""
        generator = torch.Generator().manual_seed(seed)

        def value(item: Any) -> Any:
            return item.make(dtype, device, generator) if isinstance(item, TensorSpec) else item

        return [value(a) for a in self.args], {k: value(v) for k, v in self.kwargs.items()}

    def __str__(self) -> str:
        """Return a short form for test ids: shapes and scalars."""

        def short(item: Any) -> str:
            if isinstance(item, TensorSpec):
                return "x".join(map(str, item.shape)) or "scalar"
            return str(item)

        parts = [short(a) for a in self.args]
        return "-".join(parts + [f"{k}={short(v)}" for k, v in self.kwargs.items()])


@dataclass(frozen=True)
class Tolerance:
    """How far a kernel may be from the reference, per dtype of the result, and why.

    The default: both sides compute in float32 and round once, so a 16-bit result may differ by one
    unit in the last place, and a float32 result by the order of a sum and the last bits of exp.
    """

    float32: tuple[float, float] = (2e-5, 2e-6)
    bfloat16: tuple[float, float] = (2**-7, 1e-5)
    float16: tuple[float, float] = (2**-10, 1e-5)
    reason: str = "computed in float32 and rounded once on both sides"

    def check(self, name: str, actual: Tensor, expected: Tensor) -> None:
        """Raise AssertionError where ``actual`` is outside the tolerance."""
        key = str(expected.dtype).removeprefix("torch.")
        rtol, atol = getattr(self, key, (0.0, 0.0))
        torch.testing.assert_close(
            actual,
            expected,
            rtol=rtol,
            atol=atol,
            equal_nan=True,
            msg=lambda text: f"{name}: {text}\ntolerance {rtol}, {atol}: {self.reason}",
        )

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


def randint(
    low: int, high: int, *shape: int, dtype: torch.dtype | None = torch.int64
) -> TensorSpec:
    """Integers uniform in [low, high); ``dtype`` None means the dtype under test."""
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

    ``quantized`` is (steps, fraction) for int8 and fp8 results: how many representable values a
    result may be away, and how many of a tensor's values may differ at all (one always may).
    """

    float32: tuple[float, float] = (2e-5, 2e-6)
    bfloat16: tuple[float, float] = (2**-7, 1e-5)
    float16: tuple[float, float] = (2**-10, 1e-5)
    quantized: tuple[int, float] = (0, 0.0)
    reason: str = "computed in float32 and rounded once on both sides"

    def covers(self, dtype: torch.dtype) -> bool:
        """Whether :meth:`check` compares values of a dtype, else bits are to be compared."""
        name = str(dtype).removeprefix("torch.")
        return name in _FLOATS or (dtype in _QUANTIZED and self.quantized[0] > 0)

    def check(self, name: str, actual: Tensor, expected: Tensor) -> None:
        """Raise AssertionError where ``actual`` is outside the tolerance."""
        if expected.dtype in _QUANTIZED and self.quantized[0]:
            self._check_quantized(name, actual, expected)
            return
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

    def _check_quantized(self, name: str, actual: Tensor, expected: Tensor) -> None:
        if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
            raise AssertionError(
                f"{name}: {actual.dtype} {tuple(actual.shape)}, "
                f"expected {expected.dtype} {tuple(expected.shape)}"
            )
        steps, fraction = self.quantized
        away = (_codes(actual) - _codes(expected)).abs()
        allowed = max(1, int(fraction * expected.numel()))
        differing = int((away > 0).sum())
        farthest = int(away.max()) if differing else 0
        if farthest > steps or differing > allowed:
            raise AssertionError(
                f"{name}: {differing} of {expected.numel()} values differ, by up to {farthest} "
                f"steps\ntolerance {steps} step for {allowed} values: {self.reason}"
            )


_FLOATS = ("float32", "bfloat16", "float16")
_QUANTIZED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
_NAN_CODE = 1 << 20  # far from every number, equal to itself


def _codes(tensor: Tensor) -> Tensor:
    """Return integers that count the representable values from zero, so that steps subtract."""
    if tensor.dtype == torch.int8:
        return tensor.int()
    raw = tensor.contiguous().view(torch.uint8).int()
    magnitude = raw & 0x7F
    codes = torch.where(raw > 0x7F, -magnitude, magnitude)
    return codes.masked_fill(tensor.float().isnan(), _NAN_CODE)

# SPDX-License-Identifier: Apache-2.0
"""A case: one shape of one op, how each library runs it, and what makes a result right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

BF16, F32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
LARGE = 0.93  # fraction of the copy bandwidth that a large case should reach
device = "cuda"  # the tests make their cases on the CPU


class Set(SimpleNamespace):
    """The tensors of one run, by name; every way of a case reads and writes the same names."""


Way = Callable[[Set], Any]
Ours = Callable[[Set, str | None], Any]


@dataclass
class Case:
    """Runs read and write the tensors of a Set by name.

    ``ours`` takes (set, backend), so that the reference of the definition is the same call. Results
    are compared as ``results`` gives them: dequantised, in an order that does not matter.
    """

    op: str
    shape: str
    bytes: int
    make: Callable[[], Set]
    ours: Ours
    results: Callable[[Set], tuple[Tensor, ...]]
    peers: Mapping[str, Way] = field(default_factory=dict)
    error: Callable[[Set, Set], float] | None = None
    bound: float = 1e-2  # bfloat16 carries 2**-9; peers that round twice stay below three of them
    goal: float = 0.0  # fraction of the floor, or with goal_us microseconds, of performance goals
    goal_us: float = 0.0

    @property
    def name(self) -> str:
        """Op and shape."""
        return f"{self.op} {self.shape}"

    def ways(self, backend: str | None) -> dict[str, Way]:
        """Return every way to run the case, ours first."""
        return {"opmux": lambda s: self.ours(s, backend), **self.peers}

    def difference(self, actual: Set, expected: Set) -> float:
        """Return how far a run's results are from the reference's; NaN never passes."""
        if self.error is not None:
            return self.error(actual, expected)
        pairs = zip(self.results(actual), self.results(expected), strict=True)
        return max(distance(a, b) for a, b in pairs)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Return ||actual - expected|| / ||expected||; infinities must be the same ones."""
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.float(), expected.float()
    infinite = expected.isinf()
    if not torch.equal(actual[infinite], expected[infinite]):
        return float("inf")
    actual, expected = actual.masked_fill(infinite, 0), expected.masked_fill(infinite, 0)
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def wrong(flags: Tensor) -> float:
    """Return the share of true flags."""
    return float(flags.float().mean())


def clone(s: Set) -> Set:
    """Copy a set, its tensors included."""
    copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(s).items()}
    return Set(**copies)


def randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Return normal random values."""
    return torch.randn(*shape, device=device, dtype=dtype)


def poison(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Return a tensor that no kernel has written: NaN, or a value that no result has."""
    if dtype.is_floating_point and dtype != FP8:
        return torch.full(shape, float("nan"), device=device, dtype=dtype)
    if dtype == FP8:
        return torch.full(shape, 0x7F, device=device, dtype=torch.uint8).view(FP8)
    return torch.full(shape, -77, device=device, dtype=dtype)


def randint(high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Return random integers below ``high``."""
    return torch.randint(0, high, shape, device=device, dtype=dtype)


def dequantised(q: Tensor, scale: Tensor) -> Tensor:
    """Return q times the scale of its group, rows of scales beside rows of q."""
    groups = q.float().view(*scale.shape, -1)
    return (groups * scale.unsqueeze(-1)).flatten(-2)

# SPDX-License-Identifier: Apache-2.0
"""What the sampling definitions share: which tokens stay, and how one is drawn."""

from __future__ import annotations

import torch
from torch import Tensor


def masses(probs: Tensor) -> Tensor:
    """Return the probabilities as float64 with NaN and negative values counted as 0."""
    value = probs.double()
    return torch.where(value > 0, value, 0.0)


def column(value: Tensor | float, like: Tensor) -> Tensor | float:
    """Return a per-row value as a column, a scalar as it is."""
    return value[:, None].to(like.device) if isinstance(value, Tensor) else value


def keep_top_k(mass: Tensor, top_k: Tensor | int) -> Tensor:
    """Mark every value that is at least the k-th largest; k < 1 or k >= V marks all."""
    size = mass.shape[-1]
    if not size:
        return mass > 0
    k = torch.as_tensor(column(top_k, mass), device=mass.device).long()
    k = torch.where(k < 1, size, k).clamp(max=size).expand(mass.shape[0], 1)
    ordered = mass.sort(dim=-1, descending=True).values
    return mass >= ordered.gather(-1, k - 1)


def keep_top_p(mass: Tensor, top_p: Tensor | float) -> Tensor:
    """Mark the values at or above the largest t whose sum of values >= t reaches p of the total."""
    if not mass.shape[-1]:
        return mass > 0
    p = torch.as_tensor(column(top_p, mass), device=mass.device, dtype=torch.float64)
    ordered = mass.sort(dim=-1, descending=True).values
    running = ordered.cumsum(-1)
    # the first position at which the running sum reaches p; p <= 0 keeps the maximum
    short = (running < p * running[:, -1:]).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)
    return (mass >= ordered.gather(-1, short)) | (p >= 1)


def renormalise(mass: Tensor, keep: Tensor) -> Tensor:
    """Return the kept masses over their sum, in float32; a row without mass stays zero."""
    kept = torch.where(keep, mass, 0.0)
    total = kept.sum(-1, keepdim=True)
    return torch.where(total > 0, kept / total, 0.0).float()


def draw(mass: Tensor, keep: Tensor, uniform: Tensor) -> Tensor:
    """Return the first index whose running kept mass exceeds ``uniform`` of the total, or -1."""
    if not mass.shape[-1]:
        return mass.new_full(mass.shape[:1], -1, dtype=torch.int32)
    kept = torch.where(keep, mass, 0.0)
    running = kept.cumsum(-1)
    total = running[:, -1:]
    # rounding must not push the target onto a token of zero probability
    passed = (running > uniform.double()[:, None] * total) & (kept > 0)
    index = torch.where(passed.any(-1), passed.to(torch.int8).argmax(-1), _last(kept))
    return torch.where(total[:, 0] > 0, index, -1).to(torch.int32)


def _last(kept: Tensor) -> Tensor:
    place = torch.arange(kept.shape[-1], device=kept.device)
    return torch.where(kept > 0, place, -1).amax(-1)

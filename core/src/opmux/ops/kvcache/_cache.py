# SPDX-License-Identifier: Apache-2.0
"""What the ops that write the KV cache share: the dtypes of a cache, its scales, the scatter."""

from __future__ import annotations

import torch
from torch import Tensor

from opmux.kernel import FLOATS

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def in_cache_dtype(rows: Tensor, dtype: torch.dtype, scale: Tensor | float) -> Tensor:
    """Return rows as a cache of the dtype holds them; only a float8 one has a scale."""
    if dtype not in FP8:
        return rows.to(dtype)
    if not isinstance(scale, Tensor):
        scale = torch.full((1,), scale, dtype=torch.float32, device=rows.device)
    top = torch.finfo(dtype).max
    return (rows.float() * scale.reciprocal()).clamp(-top, top).to(dtype)


def scatter(cache: Tensor, slot_mapping: Tensor, rows: Tensor) -> None:
    """Write rows in the cache's dtype to their slots, bit for bit; negative slots are skipped."""
    if not slot_mapping.numel():
        return
    slots = slot_mapping.long()
    # Padding tokens write their own slot's content back, which keeps the shapes static.
    keep = (slots >= 0).view(-1, *[1] * (rows.dim() - 1))
    # Slot 0 may be both real and the stand-in of padding: give it its real row in both cases.
    real = slots == 0
    first = real.to(torch.int32).argmax()
    raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[cache.element_size()]
    bits, new = cache.view(raw), rows.view(raw)
    # new[first] would ask for the value of first, which tracing cannot know
    zero = torch.where(real.any(), new.index_select(0, first[None]), bits[:1])
    bits[slots.clamp(min=0)] = torch.where(keep, new, zero)


def check_scale(op: str, name: str, scale: Tensor | float, quantized: bool) -> None:
    """Raise unless a scale is positive and, where nothing is quantised, left at 1."""
    if not quantized and (isinstance(scale, Tensor) or scale != 1.0):
        got = "a tensor" if isinstance(scale, Tensor) else scale
        raise ValueError(
            f"{op}: {name} must be left at 1 unless float rows go into a float8 cache, got {got}"
        )
    if isinstance(scale, Tensor):
        if scale.dtype != torch.float32:
            raise TypeError(f"{op}: {name} must be float32, got {scale.dtype}")
        if tuple(scale.shape) != (1,):
            raise ValueError(f"{op}: {name} must have shape (1,), got {tuple(scale.shape)}")
    elif not scale > 0.0:
        raise ValueError(f"{op}: {name} must be positive, got {scale}")


def quantizes(cache: Tensor, rows: Tensor) -> bool:
    """Whether rows are quantised on their way into a cache."""
    return cache.dtype in FP8 and rows.dtype in FLOATS

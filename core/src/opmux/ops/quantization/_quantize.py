# SPDX-License-Identifier: Apache-2.0
"""What the quantising definitions share: scales, rounding, and the layouts of group scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from opmux.samples import Tolerance

FP8 = torch.float8_e4m3fn
EPS = 1e-10  # the least amax, so that a row of zeros has a scale to divide by
LARGEST = torch.finfo(torch.float32).max

ROWS, COLUMNS, PACKED = 0, 1, 2  # scale_layout

TOLERANCE = Tolerance(
    float32=(2e-5, 0.0),
    quantized=(1, 2**-8),
    reason="scales follow the order of a sum and the last bits of exp; a quotient on the boundary "
    "of two quantised values, where a division and a product with the reciprocal part ways, may "
    "fall on either side",
)


def limit(int8: bool) -> float:
    """Return the largest quantised value."""
    return 127.0 if int8 else 448.0


def largest(value: Tensor) -> Tensor:
    """Return max(|value|, EPS) over the last dimension, kept; NaN does not count, inf is capped."""
    known = value.abs().nan_to_num(nan=0.0, posinf=LARGEST)
    return F.pad(known, (0, 1), value=EPS).amax(-1, keepdim=True)


def scales(amax: Tensor, int8: bool, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Return (scale, inverse), each rounded once; a power of two is rounded up."""
    top = torch.full_like(amax, limit(int8))
    scale = amax / top
    if not power_of_two:
        return scale, top / amax
    bits = scale.view(torch.int32)
    scale = ((bits + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)
    return scale, scale.reciprocal()


def rounded(value: Tensor, int8: bool) -> Tensor:
    """Return a float32 value in the quantised dtype: clamped, half to even, NaN is 0 in int8."""
    top = limit(int8)
    value = value.clamp(-top, top)
    if int8:
        return value.round().nan_to_num(nan=0.0).to(torch.int8)
    return value.to(FP8)


def quantize_rows(value: Tensor, int8: bool) -> tuple[Tensor, Tensor]:
    """Return (quantised, scale (..., 1)) with one scale for the last dimension."""
    scale, inverse = scales(largest(value), int8)
    return rounded(value * inverse, int8), scale


def quantize_groups(
    value: Tensor, group_size: int, int8: bool, scale_layout: int
) -> tuple[Tensor, Tensor]:
    """Return (quantised, scales in their layout) with one scale for every group of values."""
    groups = torch.unflatten(value, -1, (value.shape[-1] // group_size, group_size))
    scale, inverse = scales(largest(groups), int8, scale_layout == PACKED)
    return rounded(groups * inverse, int8).flatten(-2), _laid_out(scale.squeeze(-1), scale_layout)


def _laid_out(scale: Tensor, scale_layout: int) -> Tensor:
    """Return scales (..., T, G) as (..., T, G), (..., G, T4) or packed (..., W, T4)."""
    if scale_layout == ROWS:
        return scale
    padded = F.pad(scale, (0, 0, 0, _up(scale.shape[-2], 4) - scale.shape[-2])).mT
    if scale_layout == COLUMNS:
        return padded
    groups = padded.shape[-2]
    words = _up(groups, 4) // 4
    exponents = (padded.contiguous().view(torch.int32) >> 23).long()
    four = torch.unflatten(F.pad(exponents, (0, 0, 0, 4 * words - groups)), -2, (words, 4))
    shift = 8 * torch.arange(4, device=scale.device)[:, None]  # the first group is lowest
    word = (four << shift).sum(-2)
    return torch.where(word < 1 << 31, word, word - (1 << 32)).to(torch.int32)


def _up(n: int, multiple: int) -> int:
    return (n + multiple - 1) // multiple * multiple


def quantized_dtype(int8: bool) -> torch.dtype:
    """Return the dtype of the quantised values."""
    return torch.int8 if int8 else FP8


def row_outputs(x: Tensor, int8: bool) -> tuple[Tensor, Tensor]:
    """Allocate (quantised, scale (T, 1)) for rows x."""
    return (
        x.new_empty(x.shape, dtype=quantized_dtype(int8)),
        x.new_empty((x.shape[0], 1), dtype=torch.float32),
    )


def scale_shape(op: str, tokens: int, width: int, group_size: int, scale_layout: int) -> list[int]:
    """Check the group arguments and return the shape of the scales of (tokens, width) values."""
    if group_size < 1 or width % group_size:
        raise ValueError(
            f"{op}: group_size must be positive and divide the width {width}, got {group_size}"
        )
    if scale_layout not in (ROWS, COLUMNS, PACKED):
        raise ValueError(
            f"{op}: scale_layout must be 0 (rows), 1 (columns) or 2 (packed), got {scale_layout}"
        )
    groups = width // group_size
    if scale_layout == ROWS:
        return [tokens, groups]
    return [_up(groups, 4) // 4 if scale_layout == PACKED else groups, _up(tokens, 4)]


def scale_dtype(scale_layout: int) -> torch.dtype:
    """Return the dtype of group scales."""
    return torch.int32 if scale_layout == PACKED else torch.float32


def group_outputs(
    op: str, x: Tensor, width: int, group_size: int, int8: bool, scale_layout: int
) -> tuple[Tensor, Tensor]:
    """Allocate (quantised (T, width), scales in their layout) for rows x."""
    shape = scale_shape(op, x.shape[0], width, group_size, scale_layout)
    return (
        x.new_empty((x.shape[0], width), dtype=quantized_dtype(int8)),
        x.new_empty(shape, dtype=scale_dtype(scale_layout)),
    )

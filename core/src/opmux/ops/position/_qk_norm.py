# SPDX-License-Identifier: Apache-2.0
"""What the fused query and key norms share."""

from __future__ import annotations

import torch
from torch import Tensor

from opmux.checks import check_indices, check_range, check_rows
from opmux.ops.position._rotate import check_cache, rotated


def normed_rotated(
    heads: Tensor,
    weight: Tensor,
    eps: float,
    cos_sin_cache: Tensor,
    positions: Tensor,
    is_neox: bool,
) -> Tensor:
    """Return heads (T, H, head_dim) normed, weighted and rotated, in float32."""
    value = heads.float()
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps) * weight.float()
    cos, sin = cos_sin_cache[positions.long()].float().chunk(2, dim=-1)
    return rotated(value, cos, sin, is_neox)


def check_qkv(
    op: str,
    qkv: Tensor,
    heads: tuple[int, int, int],
    head_dim: int,
    weights: dict[str, Tensor],
    cos_sin_cache: Tensor,
    positions: Tensor,
) -> None:
    """Raise unless qkv holds the heads, and weights, cache and positions fit them."""
    check_rows(op, "qkv", qkv)
    if head_dim < 1 or min(heads) < 1:
        raise ValueError(
            f"{op}: numbers of heads and head_dim must be positive, got {heads} and {head_dim}"
        )
    if qkv.shape[1] != sum(heads) * head_dim:
        raise ValueError(
            f"{op}: last dimension of qkv must be ({' + '.join(map(str, heads))}) * {head_dim}, "
            f"got {qkv.shape[1]}"
        )
    for label, weight in weights.items():
        if tuple(weight.shape) != (head_dim,):
            raise ValueError(
                f"{op}: {label} must have shape ({head_dim},), got {tuple(weight.shape)}"
            )
        if weight.dtype != qkv.dtype:
            raise TypeError(f"{op}: {label} must be {qkv.dtype}, got {weight.dtype}")
    check_cache(op, cos_sin_cache, head_dim, qkv)
    check_indices(op, "positions", positions, (qkv.shape[0],))
    check_range(op, "positions", positions, 0, cos_sin_cache.shape[0])

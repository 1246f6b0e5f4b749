# SPDX-License-Identifier: Apache-2.0
"""What the rotary definitions share."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(heads: Tensor, cos: Tensor, sin: Tensor, is_neox: bool) -> Tensor:
    """Return float32 heads (T, H, head_dim) rotated by cos and sin (T, rot_dim / 2)."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    pairs, rest = heads[..., : 2 * half], heads[..., 2 * half :]
    if is_neox:
        a, b = pairs[..., :half], pairs[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)
    a, b = pairs[..., 0::2], pairs[..., 1::2]
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned.flatten(-2), rest), dim=-1)


def check_cache(op: str, cos_sin_cache: Tensor, head_dim: int, like: Tensor) -> None:
    """Raise unless the cache is (max_position, rot_dim), rot_dim even and at most head_dim."""
    if cos_sin_cache.dim() != 2:
        raise ValueError(
            f"{op}: cos_sin_cache must have two dimensions, got {tuple(cos_sin_cache.shape)}"
        )
    rot_dim = cos_sin_cache.shape[1]
    if rot_dim % 2 or rot_dim > head_dim:
        raise ValueError(
            f"{op}: rot_dim, the last dimension of cos_sin_cache, must be even and at most "
            f"head_dim {head_dim}, got {rot_dim}"
        )
    if cos_sin_cache.dtype not in (torch.float32, like.dtype):
        raise TypeError(
            f"{op}: cos_sin_cache must be float32 or {like.dtype}, got {cos_sin_cache.dtype}"
        )


def check_heads(op: str, label: str, tensor: Tensor, like: Tensor, head_dim: int) -> None:
    """Raise unless tensor holds whole heads of as many tokens as like, in its dtype."""
    if head_dim < 1:
        raise ValueError(f"{op}: head_dim must be positive, got {head_dim}")
    good = (tensor.dim() == 3 and tensor.shape[2] == head_dim) or (
        tensor.dim() == 2 and tensor.shape[1] % head_dim == 0
    )
    if not good:
        raise ValueError(
            f"{op}: {label} must be (T, heads * {head_dim}) or (T, heads, {head_dim}), "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.shape[0] != like.shape[0]:
        raise ValueError(
            f"{op}: {label} must have the {like.shape[0]} tokens of query, got {tensor.shape[0]}"
        )
    if tensor.dtype != like.dtype:
        raise TypeError(f"{op}: {label} must have dtype {like.dtype}, got {tensor.dtype}")

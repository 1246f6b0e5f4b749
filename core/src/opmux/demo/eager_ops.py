# SPDX-License-Identifier: Apache-2.0
"""The model's ops in plain torch: the yardstick that opmux is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(x: Tensor, out: Tensor | None = None) -> Tensor:
    """SwiGLU gate of the two halves of the last dimension."""
    gate, up = x.chunk(2, dim=-1)
    return torch.mul(F.silu(gate), up, out=out)


def rmsnorm(x: Tensor, weight: Tensor, eps: float = 1e-6, out: Tensor | None = None) -> Tensor:
    """Root-mean-square norm over the last dimension."""
    result = F.rms_norm(x, (x.shape[-1],), weight, eps)
    return result if out is None else out.copy_(result)


def fused_add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> None:
    """Add x to the residual stream and leave the normalised sum in x."""
    total = x.float() + residual.float()
    residual.copy_(total)
    x.copy_(F.rms_norm(total, (x.shape[-1],), weight.float(), eps))


def rotated(
    positions: Tensor, x: Tensor, head_dim: int, cos_sin_cache: Tensor, is_neox: bool = True
) -> Tensor:
    """Turn x, (tokens, heads * head_dim) or (tokens, heads, head_dim), by its positions."""
    heads = x.reshape(x.shape[0], -1, head_dim).float()
    rotary_dim = cos_sin_cache.shape[-1]
    turned, rest = heads[..., :rotary_dim], heads[..., rotary_dim:]
    cos, sin = cos_sin_cache[positions].float().unsqueeze(1).chunk(2, dim=-1)
    if is_neox:
        first, second = turned.chunk(2, dim=-1)
    else:
        first, second = turned[..., 0::2], turned[..., 1::2]
    halves = first * cos - second * sin, second * cos + first * sin
    mixed = torch.cat(halves, dim=-1) if is_neox else torch.stack(halves, dim=-1).flatten(-2)
    return torch.cat((mixed, rest), dim=-1).reshape(x.shape).to(x.dtype)


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_dim: int,
    cos_sin_cache: Tensor,
    is_neox: bool = True,
) -> None:
    """Rotate query and key in place."""
    query.copy_(rotated(positions, query, head_dim, cos_sin_cache, is_neox))
    if key is not None:
        key.copy_(rotated(positions, key, head_dim, cos_sin_cache, is_neox))


def store_kv_cache(
    k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, k: Tensor, v: Tensor
) -> None:
    """Write each token's key and value to its slot; every slot must be valid (none is skipped)."""
    # Skipping negative slots needs a boolean index, whose size only the device knows: it would
    # stall the stream and break full graphs. The model never passes one.
    slots = slot_mapping.long()
    k_cache.index_copy_(0, slots, k)
    v_cache.index_copy_(0, slots, v)


def _column(value: Tensor | float, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(like.dtype).unsqueeze(-1)
    return like.new_full((1, 1), value)


def top_k_top_p_sample(
    probs: Tensor,
    top_k: Tensor | int,
    top_p: Tensor | float,
    uniform: Tensor,
    joint: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Sample one token per row from its top-k, then top-p, probabilities."""
    vocab = probs.shape[-1]
    mass = probs.double().nan_to_num(0.0).clamp_min(0.0)
    ranked = mass.sort(dim=-1, descending=True).values
    k = _column(top_k, mass).long()
    last = torch.where(k < 1, vocab, k).clamp_max(vocab) - 1
    kth = ranked.gather(-1, last.expand(len(ranked), 1))
    nucleus = ranked if joint else ranked.masked_fill(ranked < kth, 0.0)
    running = nucleus.cumsum(dim=-1)
    needed = _column(top_p, mass) * running[:, -1:]
    cut = (running < needed).sum(dim=-1, keepdim=True).clamp_max(vocab - 1)
    threshold = torch.maximum(kth, nucleus.gather(-1, cut))
    kept = mass.masked_fill(mass < threshold, 0.0).cumsum(dim=-1)
    token = torch.searchsorted(kept, uniform.double().unsqueeze(-1) * kept[:, -1:], right=True)
    result = torch.where(token < vocab, token, -1).squeeze(-1).int()
    return result if out is None else out.copy_(result)

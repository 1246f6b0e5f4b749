# SPDX-License-Identifier: Apache-2.0
"""Per-head norm of query and key with rotary embedding, in place."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.op import op
from opmux.ops.position._qk_norm import check_qkv, normed_rotated
from opmux.samples import Sample, randint, randn


@op(mutates=("qkv",))
def fused_qk_norm_rope(
    qkv: Tensor,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_dim: int,
    eps: float,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin_cache: Tensor,
    is_neox: bool,
    positions: Tensor,
) -> None:
    """Norm each query and key head, then rotate it, in place; the value heads stay.

    ``x / sqrt(mean(x**2) + eps) * weight`` over each head, then its first rot_dim values rotated by
    the token's position: pairs (a, b), at (i, i + rot_dim / 2) in the neox style and (2i, 2i + 1)
    otherwise, become ``(a*cos - b*sin, b*cos + a*sin)``. In float32, rounded once. On other devices
    than the CPU a token whose position is outside of the cache stays as it is.

    Shapes:
        qkv: (T, (num_heads_q + num_heads_k + num_heads_v) * head_dim), float32, bfloat16 or
            float16; last dimension contiguous; written
        q_weight: (head_dim,), dtype of qkv
        k_weight: (head_dim,), dtype of qkv
        cos_sin_cache: (max_position, rot_dim), cosines then sines, float32 or dtype of qkv; rot_dim
            is even and at most head_dim
        positions: (T,), int32 or int64, each below max_position

    Raises:
        ValueError: a shape, or on the CPU a position, does not fit.
        TypeError: dtypes differ, or positions are not integers.

    Source: Qwen3 Technical Report, arXiv:2505.09388
    """
    widths = [num_heads_q * head_dim, num_heads_k * head_dim, num_heads_v * head_dim]
    query, key, _ = torch.split(qkv, widths, dim=-1)
    for part, count, weight in ((query, num_heads_q, q_weight), (key, num_heads_k, k_weight)):
        heads = torch.unflatten(part, -1, (count, head_dim))
        heads.copy_(normed_rotated(heads, weight, eps, cos_sin_cache, positions, is_neox))


@fused_qk_norm_rope.outputs
def _(
    qkv: Tensor,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_dim: int,
    eps: float,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin_cache: Tensor,
    is_neox: bool,
    positions: Tensor,
) -> None:
    name = "fused_qk_norm_rope"
    heads = (num_heads_q, num_heads_k, num_heads_v)
    check_qkv(
        name, qkv, heads, head_dim, {"q_weight": q_weight, "k_weight": k_weight}, cos_sin_cache,
        positions,
    )  # fmt: skip


@fused_qk_norm_rope.samples
def _() -> Iterator[Sample]:
    for tokens in (1, 17, 0):  # decode, ragged, empty
        yield Sample(  # Qwen3 8B
            randn(tokens, 48 * 128), 32, 8, 8, 128, 1e-6, randn(128), randn(128),
            randn(64, 128, dtype=torch.float32), True, randint(0, 64, tokens),
        )  # fmt: skip
    # partial, pairs side by side, odd head counts, int32, cache in the dtype
    yield Sample(
        randn(5, 6 * 80), 3, 2, 1, 80, 1e-5, randn(80), randn(80), randn(9, 32), False,
        randint(0, 9, 5, dtype=torch.int32),
    )  # fmt: skip
    for head_dim, is_neox in ((64, False), (256, True)):  # partial in whole vectors
        yield Sample(
            randn(9, 5 * head_dim), 3, 1, 1, head_dim, 1e-6, randn(head_dim), randn(head_dim),
            randn(9, head_dim // 2, dtype=torch.float32), is_neox, randint(0, 9, 9),
        )  # fmt: skip
    yield Sample(  # scalar tail
        randn(3, 4 * 6), 2, 1, 1, 6, 1e-6, randn(6), randn(6), randn(5, 6), True, randint(0, 5, 3),
    )  # fmt: skip

# SPDX-License-Identifier: Apache-2.0
"""Per-head norm of query and key, rotary embedding, and the write to the KV cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.checks import check_indices, check_range
from opmux.op import op
from opmux.ops.kvcache._cache import FP8, check_scale, in_cache_dtype, scatter
from opmux.ops.position._qk_norm import check_qkv, normed_rotated
from opmux.samples import Sample, TensorSpec, Tolerance, permutation, randint, randn


@op(
    mutates=("qkv", "k_cache", "v_cache"),
    tolerance=Tolerance(
        quantized=(1, 2**-8),
        reason="the order of the norm's sum may show in the last bit, of a float8 key too",
    ),
)
def fused_qk_norm_rope_store_kv(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
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
    k_scale: Tensor | float = 1.0,
    v_scale: Tensor | float = 1.0,
) -> None:
    """Norm and rotate the query in place; write normed and rotated keys, and values, to the cache.

    Query and key heads as in fused_qk_norm_rope: ``x / sqrt(mean(x**2) + eps) * weight``, then the
    first rot_dim values rotated by the token's position, in float32, rounded once. Only the query
    is written back to qkv; the key goes to ``k_cache[slot_mapping[t]]`` and the value, bit for bit,
    to ``v_cache[slot_mapping[t]]``. Into float8 caches they go as ``key * (1 / k_scale)``, clamped
    to the type's largest value and rounded once. A negative slot marks a padding token, which is
    not stored; of tokens that share a slot one wins, unspecified which. On other devices than the
    CPU a token whose position is outside of the cache of angles is left as it is and not stored,
    and one whose slot is beyond the cache is not stored.

    Shapes:
        qkv: (T, (num_heads_q + num_heads_k + num_heads_v) * head_dim), float32, bfloat16 or
            float16; last dimension contiguous; its query part is written
        k_cache: (slots, num_heads_k * head_dim) or (slots, num_heads_k, head_dim), dtype of qkv,
            float8_e4m3fn or float8_e5m2, rows dense, row stride free; written
        v_cache: the same with num_heads_v, dtype of k_cache; written
        slot_mapping: (T,), int32 or int64, each below slots
        q_weight: (head_dim,), dtype of qkv
        k_weight: (head_dim,), dtype of qkv
        cos_sin_cache: (max_position, rot_dim), cosines then sines, float32 or dtype of qkv; rot_dim
            is even and at most head_dim
        positions: (T,), int32 or int64, each below max_position
        k_scale: one float, or (1,) float32, positive; only with float8 caches
        v_scale: the same for the value

    Raises:
        ValueError: a shape, a scale, or on the CPU a position or slot, does not fit.
        TypeError: dtypes differ, or positions or slot_mapping hold no integers.

    Source: Qwen3 Technical Report, arXiv:2505.09388
    """
    widths = [num_heads_q * head_dim, num_heads_k * head_dim, num_heads_v * head_dim]
    query, key, value = torch.split(qkv, widths, dim=-1)
    place = (cos_sin_cache, positions, is_neox)
    keys = torch.unflatten(key, -1, (num_heads_k, head_dim))
    rows = normed_rotated(keys, k_weight, eps, *place)
    heads = torch.unflatten(query, -1, (num_heads_q, head_dim))
    heads.copy_(normed_rotated(heads, q_weight, eps, *place))
    for cache, new, scale in ((k_cache, rows, k_scale), (v_cache, value, v_scale)):
        shaped = new.reshape(qkv.shape[0], *cache.shape[1:])
        scatter(cache, slot_mapping, in_cache_dtype(shaped, cache.dtype, scale))


@fused_qk_norm_rope_store_kv.outputs
def _(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
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
    k_scale: Tensor | float,
    v_scale: Tensor | float,
) -> None:
    name = "fused_qk_norm_rope_store_kv"
    heads = (num_heads_q, num_heads_k, num_heads_v)
    check_qkv(
        name, qkv, heads, head_dim, {"q_weight": q_weight, "k_weight": k_weight}, cos_sin_cache,
        positions,
    )  # fmt: skip
    for label, cache, count in (
        ("k_cache", k_cache, num_heads_k),
        ("v_cache", v_cache, num_heads_v),
    ):
        if tuple(cache.shape[1:]) not in ((count * head_dim,), (count, head_dim)):
            raise ValueError(
                f"{name}: {label} must have rows of {count} * {head_dim} values, "
                f"got {tuple(cache.shape)}"
            )
        if cache.dtype not in (qkv.dtype, *FP8) or cache.dtype != k_cache.dtype:
            wanted = f"{qkv.dtype}, float8_e4m3fn or float8_e5m2, both caches alike"
            raise TypeError(f"{name}: {label} must be {wanted}, got {cache.dtype}")
        if cache.shape[0] and not cache[0].is_contiguous():
            raise ValueError(f"{name}: rows of {label} must be dense, got {cache.stride()}")
    if v_cache.shape[0] != k_cache.shape[0]:
        raise ValueError(
            f"{name}: v_cache must have {k_cache.shape[0]} slots like k_cache, "
            f"got {v_cache.shape[0]}"
        )
    check_scale(name, "k_scale", k_scale, k_cache.dtype in FP8)
    check_scale(name, "v_scale", v_scale, k_cache.dtype in FP8)
    check_indices(name, "slot_mapping", slot_mapping, (qkv.shape[0],))
    check_range(name, "slot_mapping", slot_mapping, None, k_cache.shape[0])


@fused_qk_norm_rope_store_kv.samples
def _() -> Iterator[Sample]:
    for tokens in (1, 17, 0):  # decode, ragged, empty
        yield Sample(  # Qwen3 8B
            randn(tokens, 48 * 128), randn(40, 8, 128), randn(40, 8, 128), permutation(40, tokens),
            32, 8, 8, 128, 1e-6, randn(128), randn(128),
            randn(64, 128, dtype=torch.float32), True, randint(0, 64, tokens),
        )  # fmt: skip
    # partial, pairs side by side, odd head counts, int32, cache in the dtype, some padding
    yield Sample(
        randn(5, 6 * 80), randn(9, 160), randn(9, 80), _some_padding(),
        3, 2, 1, 80, 1e-5, randn(80), randn(80), randn(9, 32), False,
        randint(0, 9, 5, dtype=torch.int32),
    )  # fmt: skip
    for head_dim, dtype, scale in (  # float8 caches
        (64, torch.float8_e4m3fn, 0.02), (128, torch.float8_e5m2, _one(0.5)),
        (256, torch.float8_e4m3fn, _one(3.0)), (80, torch.float8_e4m3fn, 0.1),
    ):  # fmt: skip
        yield Sample(
            randn(3, 8 * head_dim), randn(7, 2 * head_dim, dtype=dtype),
            randn(7, 2, head_dim, dtype=dtype), permutation(7, 3), 4, 2, 2, head_dim, 1e-6,
            randn(head_dim), randn(head_dim), randn(9, head_dim // 2, dtype=torch.float32), True,
            randint(0, 9, 3), scale, 0.03,
        )  # fmt: skip
    yield Sample(  # scalar tail
        randn(3, 4 * 6), randn(4, 1, 6), randn(4, 1, 6), permutation(4, 3),
        2, 1, 1, 6, 1e-6, randn(6), randn(6), randn(5, 6), True, randint(0, 5, 3),
    )  # fmt: skip


def _some_padding() -> TensorSpec:
    slots = torch.tensor([4, -1, 0, -1, 8], dtype=torch.int32)
    return TensorSpec((5,), lambda g: slots.clone(), torch.int32)


def _one(value: float) -> TensorSpec:
    return TensorSpec((1,), lambda g: torch.full((1,), value), torch.float32)

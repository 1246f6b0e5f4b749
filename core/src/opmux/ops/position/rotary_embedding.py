# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding, in place."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.checks import check_indices, check_range
from opmux.op import op
from opmux.samples import Sample, randint, randn


@op(mutates=("query", "key"), leading="query")
def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_dim: int,
    cos_sin_cache: Tensor,
    is_neox: bool = True,
) -> None:
    """Rotate pairs ``(a, b)`` of each head to ``(a*cos - b*sin, b*cos + a*sin)``, in place.

    Computed in float32 and rounded once. A pair is (i, i + rot_dim / 2) in the neox style and
    (2i, 2i + 1) otherwise; the rest of a head behind rot_dim stays as it is, and so does on other
    devices than the CPU a token whose position is outside of the cache.

    Shapes:
        positions: (T,), int32 or int64, each below max_position
        query: (T, heads * head_dim) or (T, heads, head_dim), float32, bfloat16 or float16; written
        key: like query with its own number of heads, or None; written
        cos_sin_cache: (max_position, rot_dim), cosines then sines, float32 or dtype of query
        rot_dim is even and at most head_dim

    Raises:
        ValueError: a shape, or on the CPU a position, does not fit.
        TypeError: positions are not integers, or key or the cache has another dtype.

    Source: RoFormer, arXiv:2104.09864
    """
    half = cos_sin_cache.shape[-1] // 2
    cos, sin = cos_sin_cache[positions.long()].float()[:, None].split(half, dim=-1)
    for tensor in (query, key):
        if tensor is None:
            continue
        heads = tensor.unflatten(-1, (-1, head_dim)) if tensor.dim() == 2 else tensor
        pairs = heads[..., : 2 * half]
        if is_neox:
            a, b = pairs[..., :half], pairs[..., half:]
        else:
            a, b = pairs[..., 0::2], pairs[..., 1::2]
        x, y = a.float(), b.float()  # views of a and b when they are float32
        first, second = x * cos - y * sin, y * cos + x * sin
        a.copy_(first)
        b.copy_(second)


@rotary_embedding.outputs
def _(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_dim: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
) -> None:
    name = "rotary_embedding"
    check_indices(name, "positions", positions, (query.shape[0],))
    for label, tensor in (("query", query), ("key", key)):
        if tensor is not None:
            _check_heads(label, tensor, query, head_dim)
    if cos_sin_cache.dim() != 2:
        raise ValueError(
            f"{name}: cos_sin_cache must have two dimensions, got {tuple(cos_sin_cache.shape)}"
        )
    rot_dim = cos_sin_cache.shape[1]
    if rot_dim % 2 or rot_dim > head_dim:
        raise ValueError(
            f"{name}: rot_dim, the last dimension of cos_sin_cache, must be even and at most "
            f"head_dim {head_dim}, got {rot_dim}"
        )
    if cos_sin_cache.dtype not in (torch.float32, query.dtype):
        raise TypeError(
            f"{name}: cos_sin_cache must be float32 or {query.dtype}, got {cos_sin_cache.dtype}"
        )
    check_range(name, "positions", positions, 0, cos_sin_cache.shape[0])


def _check_heads(label: str, tensor: Tensor, query: Tensor, head_dim: int) -> None:
    name = "rotary_embedding"
    if head_dim < 1:
        raise ValueError(f"{name}: head_dim must be positive, got {head_dim}")
    good = (tensor.dim() == 3 and tensor.shape[2] == head_dim) or (
        tensor.dim() == 2 and tensor.shape[1] % head_dim == 0
    )
    if not good:
        raise ValueError(
            f"{name}: {label} must be (T, heads * {head_dim}) or (T, heads, {head_dim}), "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.shape[0] != query.shape[0]:
        raise ValueError(
            f"{name}: {label} must have the {query.shape[0]} tokens of query, got {tensor.shape[0]}"
        )
    if tensor.dtype != query.dtype:
        raise TypeError(f"{name}: {label} must have dtype {query.dtype}, got {tensor.dtype}")


@rotary_embedding.samples
def _() -> Iterator[Sample]:
    for tokens in (1, 17, 0):  # decode, ragged, empty
        for is_neox in (True, False):
            yield Sample(  # Llama 3 8B
                randint(0, 64, tokens), randn(tokens, 32 * 128), randn(tokens, 8 * 128), 128,
                randn(64, 128, dtype=torch.float32), is_neox,
            )  # fmt: skip
            yield Sample(  # partial rotary, odd head count, cache in the input's dtype, int32
                randint(0, 9, tokens, dtype=torch.int32), randn(tokens, 3, 80),
                randn(tokens, 1, 80), 80, randn(9, 32), is_neox,
            )  # fmt: skip
    yield Sample(
        randint(0, 5, 3), randn(3, 2, 6), None, 6, randn(5, 6), True
    )  # no key, scalar tail

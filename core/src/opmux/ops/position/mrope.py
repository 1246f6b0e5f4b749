# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding with positions in time, height and width, in place."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.checks import check_indices, check_range
from opmux.op import op
from opmux.ops.position._rotate import check_cache, check_heads, rotated
from opmux.samples import Sample, randint, randn


@op(mutates=("query", "key"), leading="query")
def mrope(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_dim: int,
    cos_sin_cache: Tensor,
    section_t: int,
    section_h: int,
    section_w: int,
    mrope_interleaved: bool = False,
    is_neox: bool = True,
) -> None:
    """Rotate as rotary_embedding does, by a time, height or width position for each pair, in place.

    Pair i of the rot_dim / 2 takes its position from row 0 (time), 1 (height) or 2 (width) of
    positions. In sections (Qwen2-VL) the first section_t pairs take time, the next section_h
    height, the last section_w width. With mrope_interleaved (Qwen3-VL) height takes the pairs
    i < 3 * section_h with i % 3 == 1, width those i < 3 * section_w with i % 3 == 2, time the rest.
    Pairs (a, b), at (i, i + rot_dim / 2) in the neox style and (2i, 2i + 1) otherwise, become
    ``(a*cos - b*sin, b*cos + a*sin)``, in float32, rounded once; behind rot_dim a head stays as it
    is, and so does on other devices than the CPU a token with a position outside of the cache.

    Shapes:
        positions: (3, T), int32 or int64, each below max_position
        query: (T, heads * head_dim) or (T, heads, head_dim), float32, bfloat16 or float16; written
        key: like query with its own number of heads, or None; written
        cos_sin_cache: (max_position, rot_dim), cosines then sines, float32 or dtype of query
        section_t + section_h + section_w is rot_dim / 2; rot_dim is at most head_dim

    Raises:
        ValueError: a shape, the sections, or on the CPU a position, does not fit.
        TypeError: positions are not integers, or key or the cache has another dtype.

    Source: Qwen2-VL, arXiv:2409.12191
    """
    half = cos_sin_cache.shape[-1] // 2
    pair = torch.arange(half, device=query.device)
    if mrope_interleaved:
        row = torch.where((pair % 3 == 1) & (pair < 3 * section_h), 1, 0)
        row = torch.where((pair % 3 == 2) & (pair < 3 * section_w), 2, row)
    else:
        row = (pair >= section_t).long() + (pair >= section_t + section_h).long()
    place = positions.long()[row].T  # (T, rot_dim / 2)
    table = cos_sin_cache.float()
    cos, sin = table[place, pair], table[place, pair + half]
    for tensor in (query, key):
        if tensor is None:
            continue
        heads = torch.unflatten(tensor, -1, (-1, head_dim)) if tensor.dim() == 2 else tensor
        heads.copy_(rotated(heads.float(), cos, sin, is_neox))


@mrope.outputs
def _(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_dim: int,
    cos_sin_cache: Tensor,
    section_t: int,
    section_h: int,
    section_w: int,
    mrope_interleaved: bool,
    is_neox: bool,
) -> None:
    check_indices("mrope", "positions", positions, (3, query.shape[0]))
    for label, tensor in (("query", query), ("key", key)):
        if tensor is not None:
            check_heads("mrope", label, tensor, query, head_dim)
    check_cache("mrope", cos_sin_cache, head_dim, query)
    sections = (section_t, section_h, section_w)
    if min(sections) < 0 or 2 * sum(sections) != cos_sin_cache.shape[1]:
        raise ValueError(
            f"mrope: section_t + section_h + section_w must be rot_dim / 2 = "
            f"{cos_sin_cache.shape[1] // 2}, got {' + '.join(map(str, sections))}"
        )
    check_range("mrope", "positions", positions, 0, cos_sin_cache.shape[0])


@mrope.samples
def _() -> Iterator[Sample]:
    for tokens in (1, 17, 0):  # decode, ragged, empty
        for interleaved, sections in ((False, (16, 24, 24)), (True, (24, 20, 20))):
            yield Sample(  # Qwen2-VL 7B, Qwen3-VL
                randint(0, 64, 3, tokens), randn(tokens, 28 * 128), randn(tokens, 4 * 128), 128,
                randn(64, 128, dtype=torch.float32), *sections, interleaved,
            )  # fmt: skip
    for interleaved in (False, True):  # partial, pairs side by side, int32, cache in the dtype
        yield Sample(
            randint(0, 9, 3, 5, dtype=torch.int32), randn(5, 3, 80), randn(5, 1, 80), 80,
            randn(9, 22), 4, 4, 3, interleaved, False,
        )  # fmt: skip
    yield Sample(randint(0, 5, 3, 4), randn(4, 2, 6), None, 6, randn(5, 6), 1, 1, 1)  # no key

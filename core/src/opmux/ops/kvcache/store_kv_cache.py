# SPDX-License-Identifier: Apache-2.0
"""Scatter new keys and values into the KV cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.checks import check_indices, check_range
from opmux.op import op
from opmux.samples import Sample, Tolerance, permutation, randn

_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8,
    torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


@op(
    mutates=("k_cache", "v_cache"),
    dtypes=_DTYPES,
    tolerance=Tolerance((0, 0), (0, 0), (0, 0), reason="copied bit for bit"),
)
def store_kv_cache(
    k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, k: Tensor, v: Tensor
) -> None:
    """In place: ``k_cache[slot_mapping[t]] = k[t]`` and the same for v.

    Copied bit for bit. A negative slot marks a padding token, which is skipped; of tokens that
    share a slot one wins, unspecified which.

    Shapes:
        k_cache: (slots, ...), rows dense, row stride free; written
        v_cache: (slots, ...), dtype of k_cache; written
        slot_mapping: (T,), int32 or int64, each below slots
        k: (T, ...) with the row shape and dtype of k_cache
        v: (T, ...) with the row shape and dtype of v_cache

    Raises:
        ValueError: a shape, or on the CPU a slot, does not fit.
        TypeError: dtypes differ, or slot_mapping holds no integers.

    Source: Efficient Memory Management for LLM Serving with PagedAttention, arXiv:2309.06180
    """
    slots = slot_mapping.long()
    for cache, rows in ((k_cache, k), (v_cache, v)):
        # Padding tokens write their own slot's content back, which keeps the shapes static.
        safe = slots.clamp(min=0)
        keep = (slots >= 0).view(-1, *[1] * (rows.dim() - 1))
        _scatter(cache, safe, rows, keep)


def _scatter(cache: Tensor, slots: Tensor, rows: Tensor, keep: Tensor) -> None:
    # Slot 0 may be both real and the stand-in of padding: give it its real row in both cases.
    if not slots.numel():
        return
    real = (slots == 0) & keep.flatten()
    first = real.to(torch.int32).argmax()
    raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[cache.element_size()]
    bits, new = cache.view(raw), rows.view(raw)
    # new[first] would ask for the value of first, which tracing cannot know
    zero = torch.where(real.any(), new.index_select(0, first[None]), bits[:1])
    bits[slots] = torch.where(keep, new, zero)


@store_kv_cache.outputs
def _(k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, k: Tensor, v: Tensor) -> None:
    name = "store_kv_cache"
    check_indices(name, "slot_mapping", slot_mapping, None)
    for label, cache, rows in (("k", k_cache, k), ("v", v_cache, v)):
        wanted = (slot_mapping.shape[0], *cache.shape[1:])
        if cache.dim() < 2 or tuple(rows.shape) != wanted:
            raise ValueError(
                f"{name}: {label} must have shape {wanted} to fit {label}_cache "
                f"{tuple(cache.shape)}, got {tuple(rows.shape)}"
            )
        for what, tensor in ((f"{label}_cache", cache), (label, rows)):
            if tensor.dtype != k_cache.dtype:
                raise TypeError(f"{name}: {what} must be {k_cache.dtype}, got {tensor.dtype}")
            if tensor.shape[0] and not tensor[0].is_contiguous():
                raise ValueError(
                    f"{name}: rows of {what} must be dense, got strides {tensor.stride()}"
                )
    if v_cache.shape[0] != k_cache.shape[0]:
        raise ValueError(
            f"{name}: v_cache must have {k_cache.shape[0]} slots like k_cache, "
            f"got {v_cache.shape[0]}"
        )
    check_range(name, "slot_mapping", slot_mapping, None, k_cache.shape[0])


@store_kv_cache.samples
def _() -> Iterator[Sample]:
    for tokens in (1, 17, 0):  # decode, ragged, empty
        shape = (8, 128)  # Llama 3 8B
        yield Sample(
            randn(40, *shape), randn(40, *shape), permutation(40, tokens), randn(tokens, *shape),
            randn(tokens, *shape),
        )  # fmt: skip
    # value heads of another width, odd sizes, int32 slots
    yield Sample(
        randn(9, 1, 7), randn(9, 3, 5), permutation(9, 4, torch.int32), randn(4, 1, 7),
        randn(4, 3, 5),
    )  # fmt: skip

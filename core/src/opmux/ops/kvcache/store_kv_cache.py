# SPDX-License-Identifier: Apache-2.0
"""Scatter new keys and values into the KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opmux.checks import check_indices, check_range
from opmux.op import op
from opmux.ops.kvcache._cache import FP8, check_scale, in_cache_dtype, quantizes, scatter
from opmux.samples import Sample, TensorSpec, Tolerance, permutation, randn

_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8,
    torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


@op(
    mutates=("k_cache", "v_cache"),
    dtypes=_DTYPES,
    tolerance=Tolerance((0, 0), (0, 0), (0, 0), reason="copied, or one product rounded once"),
)
def store_kv_cache(
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | float = 1.0,
    v_scale: Tensor | float = 1.0,
) -> None:
    """In place: ``k_cache[slot_mapping[t]] = k[t]`` and the same for v; float8 caches quantise.

    Rows of the caches' dtype are copied bit for bit and take no scale. Float rows go into float8
    caches as ``k * (1 / k_scale)``, in float32, clamped to the type's largest value and rounded
    once, half to even; NaN stays NaN. A negative slot marks a padding token, which is skipped, as
    is on other devices than the CPU a slot beyond the cache; of tokens that share a slot one wins,
    unspecified which.

    Shapes:
        k_cache: (slots, ...), rows dense, row stride free; written
        v_cache: (slots, ...), dtype of k_cache; written
        slot_mapping: (T,), int32 or int64, each below slots
        k: (T, ...) with the row shape of k_cache and its dtype, or float32, bfloat16 or float16
            where k_cache is float8_e4m3fn or float8_e5m2
        v: (T, ...) with the row shape of v_cache, dtype of k
        k_scale: one float, or (1,) float32, positive; only where k is quantised
        v_scale: the same for v

    Raises:
        ValueError: a shape, a scale, or on the CPU a slot, does not fit.
        TypeError: dtypes do not go together, or slot_mapping holds no integers.

    Source: Efficient Memory Management for LLM Serving with PagedAttention, arXiv:2309.06180
    """
    for cache, rows, scale in ((k_cache, k, k_scale), (v_cache, v, v_scale)):
        new = in_cache_dtype(rows, cache.dtype, scale) if quantizes(cache, rows) else rows
        scatter(cache, slot_mapping, new)


@store_kv_cache.outputs
def _(
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | float,
    v_scale: Tensor | float,
) -> None:
    name = "store_kv_cache"
    check_indices(name, "slot_mapping", slot_mapping, None)
    quantized = quantizes(k_cache, k)
    if k.dtype != k_cache.dtype and not quantized:
        float8 = ", or for float rows float8_e4m3fn or float8_e5m2"
        raise TypeError(f"{name}: k_cache must be {k.dtype} like k{float8}, got {k_cache.dtype}")
    for what, tensor, like, other in (("v_cache", v_cache, "k_cache", k_cache), ("v", v, "k", k)):
        if tensor.dtype != other.dtype:
            raise TypeError(f"{name}: {what} must be {other.dtype} like {like}, got {tensor.dtype}")
    for label, cache, rows in (("k", k_cache, k), ("v", v_cache, v)):
        wanted = (slot_mapping.shape[0], *cache.shape[1:])
        if cache.dim() < 2 or tuple(rows.shape) != wanted:
            raise ValueError(
                f"{name}: {label} must have shape {wanted} to fit {label}_cache "
                f"{tuple(cache.shape)}, got {tuple(rows.shape)}"
            )
        for what, tensor in ((f"{label}_cache", cache), (label, rows)):
            if tensor.shape[0] and not tensor[0].is_contiguous():
                raise ValueError(
                    f"{name}: rows of {what} must be dense, got strides {tensor.stride()}"
                )
    if v_cache.shape[0] != k_cache.shape[0]:
        raise ValueError(
            f"{name}: v_cache must have {k_cache.shape[0]} slots like k_cache, "
            f"got {v_cache.shape[0]}"
        )
    check_scale(name, "k_scale", k_scale, quantized)
    check_scale(name, "v_scale", v_scale, quantized)
    check_range(name, "slot_mapping", slot_mapping, None, k_cache.shape[0])


@dataclass(frozen=True)
class _Quantized(TensorSpec):
    """Rows of a wider dtype where the dtype under test is a float8 one."""

    wide: torch.dtype = torch.bfloat16

    def make(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> Tensor:
        return super().make(self.wide if dtype in FP8 else dtype, device, generator)


@dataclass(frozen=True)
class _Scale(TensorSpec):
    """A scale, as a float or a tensor, where the dtype under test is a float8 one, else 1."""

    value: float | None = None

    def make(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> Any:
        if dtype not in FP8:
            return 1.0
        return self.value or super().make(dtype, device, generator)


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
    # quantised: scales as floats and as tensors, some values beyond the largest, odd sizes
    for wide, shape in (
        (torch.bfloat16, (8, 128)), (torch.float16, (2, 576)), (torch.float32, (4, 64)),
        (torch.bfloat16, (3, 5)), (torch.float32, (1, 9)),
    ):  # fmt: skip
        for tensor in (False, True):
            yield Sample(
                randn(40, *shape), randn(40, *shape), permutation(40, 5), _rows(wide, 5, *shape),
                _rows(wide, 5, *shape), _scale(3e-3, tensor), _scale(0.37, tensor),
            )  # fmt: skip


def _rows(wide: torch.dtype, *shape: int) -> TensorSpec:
    return _Quantized(shape, lambda g: torch.randn(shape, generator=g), wide=wide)


def _scale(value: float, tensor: bool) -> TensorSpec:
    return _Scale((1,), lambda g: torch.full((1,), value), torch.float32, None if tensor else value)

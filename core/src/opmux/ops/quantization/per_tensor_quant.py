# SPDX-License-Identifier: Apache-2.0
"""Quantise a tensor with one scale."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.op import op
from opmux.ops.quantization._quantize import (
    TOLERANCE,
    largest,
    quantized_dtype,
    rounded,
    scales,
)
from opmux.samples import Sample, rand, randn


@op(out=("out_q", "out_scale"), tolerance=TOLERANCE)
def per_tensor_quant(
    x: Tensor, scale: Tensor | None = None, int8: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantise a whole tensor: ``out_q = round(x / out_scale)``.

    Static with a scale, which is copied to out_scale; dynamic without one: out_scale is
    ``max(amax(|x|), 1e-10) / top``. top is 448 for fp8 e4m3 and, with int8, 127. In float32: x is
    multiplied by the inverse scale (``top / amax``, or ``1 / scale``), clamped to +-top and rounded
    half to even. NaN does not count for amax and an infinity counts as the largest float32; NaN
    becomes NaN in fp8 and 0 in int8.

    Shapes:
        x: (T, h), float32, bfloat16 or float16; last dimension contiguous
        scale: (1,), float32, positive; None finds it
        out_q: (T, h), float8_e4m3fn, or int8 with int8
        out_scale: (1,), float32

    Raises:
        ValueError: x does not have two dimensions or scale more than one value.
        TypeError: scale is not float32.

    Source: FP8 Formats for Deep Learning, arXiv:2209.05433
    """
    value = x.float()
    if scale is not None:
        return rounded(value * scale.reciprocal(), int8), scale.clone()
    found, inverse = scales(largest(value.flatten()), int8)
    return rounded(value * inverse, int8), found


@per_tensor_quant.outputs
def _(x: Tensor, scale: Tensor | None, int8: bool) -> tuple[Tensor, Tensor]:
    if x.dim() != 2:
        raise ValueError(f"per_tensor_quant: x must have two dimensions, got {tuple(x.shape)}")
    if scale is not None:
        if scale.dtype != torch.float32:
            raise TypeError(f"per_tensor_quant: scale must be float32, got {scale.dtype}")
        if tuple(scale.shape) != (1,):
            raise ValueError(
                f"per_tensor_quant: scale must have shape (1,), got {tuple(scale.shape)}"
            )
    return (
        x.new_empty(x.shape, dtype=quantized_dtype(int8)),
        x.new_empty(1, dtype=torch.float32),
    )


@per_tensor_quant.samples
def _() -> Iterator[Sample]:
    scale = rand(1, dtype=torch.float32)
    for int8 in (False, True):
        for tokens, h in ((1, 1), (17, 4096), (0, 64), (3, 1001)):  # tail, Llama 3 8B, empty, odd
            yield Sample(randn(tokens, h), None, int8)
            yield Sample(randn(tokens, h), scale, int8)
    yield Sample(randn(64, 8192))  # Llama 3 70B, many blocks share one maximum

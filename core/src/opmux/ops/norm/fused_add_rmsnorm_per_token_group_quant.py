# SPDX-License-Identifier: Apache-2.0
"""Residual addition and root mean square norm fused with group quantisation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.checks import check_rows
from opmux.op import op
from opmux.ops.norm._checks import check_residual, check_weight
from opmux.ops.quantization._quantize import TOLERANCE, group_outputs, quantize_groups
from opmux.samples import Sample, randn


@op(mutates=("residual",), out=("out_q", "out_scale"), tolerance=TOLERANCE)
def fused_add_rmsnorm_per_token_group_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    group_size: int = 128,
    int8: bool = False,
    scale_layout: int = 0,
) -> tuple[Tensor, Tensor]:
    """Add into residual, in place, and quantise its rmsnorm by :func:`per_token_group_quant`.

    ``residual += x``, rounded once; x is not written. Of the unrounded sum s, the normalised value
    ``s / sqrt(mean(s**2) + eps) * weight`` stays in float32 until it is quantised. The scale
    of a group of values is ``max(amax, 1e-10) / top``, top is 448 for fp8 e4m3 and, with int8, 127.

    Shapes:
        x: (T, h), float32, bfloat16 or float16; last dimension contiguous
        residual: shape and dtype of x; written
        weight: (h,), dtype of x
        out_q: (T, h), float8_e4m3fn, or int8 with int8
        out_scale: of G = h / group_size groups and T4 = T rounded up to 4: for scale_layout 0
            (T, G) float32, 1 (G, T4) float32, 2 (ceil(G / 4), T4) int32 with four exponents each

    Raises:
        ValueError: a shape does not fit, group_size does not divide h, or scale_layout is none of
            0, 1, 2.
        TypeError: residual or weight has another dtype than x.

    Source: Root Mean Square Layer Normalization, arXiv:1910.07467
    """
    total = x.float() + residual.float()
    residual.copy_(total)
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return quantize_groups(total * scale * weight.float(), group_size, int8, scale_layout)


@fused_add_rmsnorm_per_token_group_quant.outputs
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int,
    int8: bool,
    scale_layout: int,
) -> tuple[Tensor, Tensor]:
    name = "fused_add_rmsnorm_per_token_group_quant"
    check_rows(name, "x", x)
    check_weight(name, x, weight)
    check_residual(name, x, residual)
    return group_outputs(name, x, x.shape[1], group_size, int8, scale_layout)


@fused_add_rmsnorm_per_token_group_quant.samples
def _() -> Iterator[Sample]:
    for layout in (0, 1, 2):
        for tokens in (1, 0):  # decode, empty
            yield Sample(
                randn(tokens, 7168),
                randn(tokens, 7168),
                randn(7168),
                group_size=128,
                scale_layout=layout,
            )  # DeepSeek-V3
        yield Sample(
            randn(5, 160), randn(5, 160), randn(160), 1e-5, 32, True, layout
        )  # tokens and groups to pad, int8
    yield Sample(randn(17, 7168), randn(17, 7168), randn(7168))  # ragged
    yield Sample(randn(17, 7168), randn(17, 7168), randn(7168), scale_layout=2)
    yield Sample(
        randn(6, 192), randn(6, 192), randn(192), group_size=64
    )  # the middle group size, odd group count
    yield Sample(randn(9, 320), randn(9, 320), randn(320), group_size=64, int8=True)

# SPDX-License-Identifier: Apache-2.0
"""SwiGLU gate fused with group quantisation."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from opmux.checks import check_rows
from opmux.op import op
from opmux.ops.quantization._quantize import TOLERANCE, group_outputs, quantize_groups
from opmux.samples import Sample, randn


@op(out=("out_q", "out_scale"), tolerance=TOLERANCE)
def silu_and_mul_per_token_group_quant(
    x: Tensor, group_size: int = 128, int8: bool = False, scale_layout: int = 0
) -> tuple[Tensor, Tensor]:
    """SwiGLU gate ``silu(x[:, :d]) * x[:, d:]``, then :func:`per_token_group_quant` of it.

    The gate's value stays in float32 until it is quantised, as per_token_group_quant says: the
    scale of a group is ``max(amax, 1e-10) / top``, top is 448 for fp8 e4m3 and 127 for int8.

    Shapes:
        x: (T, 2 * d), float32, bfloat16 or float16; last dimension contiguous
        out_q: (T, d), float8_e4m3fn, or int8 with int8
        out_scale: of G = d / group_size groups and T4 = T rounded up to 4: for scale_layout 0
            (T, G) float32, 1 (G, T4) float32, 2 (ceil(G / 4), T4) int32 with four exponents each

    Raises:
        ValueError: the last dimension of x is odd, group_size does not divide its half, or
            scale_layout is none of 0, 1, 2.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437
    """
    gate, up = x.float().chunk(2, dim=-1)
    return quantize_groups(F.silu(gate) * up, group_size, int8, scale_layout)


@silu_and_mul_per_token_group_quant.outputs
def _(x: Tensor, group_size: int, int8: bool, scale_layout: int) -> tuple[Tensor, Tensor]:
    name = "silu_and_mul_per_token_group_quant"
    check_rows(name, "x", x)
    if x.shape[1] % 2:
        raise ValueError(f"{name}: last dimension of x must be even, got {x.shape[1]}")
    return group_outputs(name, x, x.shape[1] // 2, group_size, int8, scale_layout)


@silu_and_mul_per_token_group_quant.samples
def _() -> Iterator[Sample]:
    for layout in (0, 1, 2):
        for tokens in (1, 0):  # decode, empty
            yield Sample(randn(tokens, 2 * 2048), 128, False, layout)  # an expert of DeepSeek-V3
        yield Sample(randn(5, 2 * 160), 32, True, layout)  # tokens and groups to pad, int8
    yield Sample(randn(17, 2 * 2048))  # ragged
    yield Sample(randn(3, 2 * 18432), 128, False, 2)  # dense layers of DeepSeek-V3
    yield Sample(randn(6, 2 * 192), 64)  # the middle group size, odd group count
    yield Sample(randn(9, 2 * 320), 64, True)

# SPDX-License-Identifier: Apache-2.0
"""Quantise with one scale for each group of a token's values."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from opmux.checks import check_rows
from opmux.op import op
from opmux.ops.quantization._quantize import TOLERANCE, group_outputs, quantize_groups
from opmux.samples import Sample, randn


@op(out=("out_q", "out_scale"), tolerance=TOLERANCE)
def per_token_group_quant(
    x: Tensor, group_size: int = 128, int8: bool = False, scale_layout: int = 0
) -> tuple[Tensor, Tensor]:
    """Quantise each run of group_size values of a row by its own scale.

    ``scale = max(amax(|group|), 1e-10) / top`` with top 448 for fp8 e4m3 and, with int8, 127. In
    float32: x is multiplied by ``top / amax``, clamped to +-top and rounded half to even. NaN does
    not count for amax and an infinity counts as the largest float32; NaN becomes NaN in fp8 and 0
    in int8. With G = h / group_size groups and T4 = T rounded up to 4, as TMA needs, scale_layout
    is one of

    - 0, rows: (T, G) float32;
    - 1, columns: (G, T4) float32, so that ``out_scale.T[:T]`` is column-major;
    - 2, packed: (ceil(G / 4), T4) int32. The scale is rounded up to a power of two before its
      inverse is taken; byte j of word w is its biased exponent (ue8m0) for group 4 * w + j.

    Tokens behind T and groups behind G are written as 0.

    Shapes:
        x: (T, h), float32, bfloat16 or float16; last dimension contiguous
        out_q: (T, h), float8_e4m3fn, or int8 with int8
        out_scale: (T, G) or (G, T4) float32, or (ceil(G / 4), T4) int32

    Raises:
        ValueError: x does not have two dimensions, group_size does not divide h, or scale_layout
            is none of 0, 1, 2.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437
    """
    return quantize_groups(x.float(), group_size, int8, scale_layout)


@per_token_group_quant.outputs
def _(x: Tensor, group_size: int, int8: bool, scale_layout: int) -> tuple[Tensor, Tensor]:
    name = "per_token_group_quant"
    check_rows(name, "x", x)
    return group_outputs(name, x, x.shape[1], group_size, int8, scale_layout)


@per_token_group_quant.samples
def _() -> Iterator[Sample]:
    for layout in (0, 1, 2):
        for tokens in (1, 0):  # decode, empty
            yield Sample(randn(tokens, 7168), 128, False, layout)  # DeepSeek-V3
        yield Sample(randn(5, 160), 32, True, layout)  # tokens and groups to pad, int8
    yield Sample(randn(17, 7168))  # ragged
    yield Sample(randn(17, 7168), 128, False, 2)
    yield Sample(randn(6, 192), 64)  # the middle group size, odd group count
    yield Sample(randn(9, 320), 64, True)

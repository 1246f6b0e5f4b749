# SPDX-License-Identifier: Apache-2.0
"""Quantise with one scale a token."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from opmux.checks import check_rows
from opmux.op import op
from opmux.ops.quantization._quantize import TOLERANCE, quantize_rows, row_outputs
from opmux.samples import Sample, randn


@op(out=("out_q", "out_scale"), tolerance=TOLERANCE)
def per_token_quant(x: Tensor, int8: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise each row by its own scale: ``out_q = round(x / out_scale)``.

    ``out_scale = max(amax(|row|), 1e-10) / top`` with top 448 for fp8 e4m3 and, with int8, 127. In
    float32: x is multiplied by ``top / amax``, clamped to +-top and rounded half to even. NaN does
    not count for amax and an infinity counts as the largest float32; NaN becomes NaN in fp8 and 0
    in int8.

    Shapes:
        x: (T, h), float32, bfloat16 or float16; last dimension contiguous
        out_q: (T, h), float8_e4m3fn, or int8 with int8
        out_scale: (T, 1), float32

    Raises:
        ValueError: x does not have two dimensions.

    Source: SmoothQuant, arXiv:2211.10438
    """
    return quantize_rows(x.float(), int8)


@per_token_quant.outputs
def _(x: Tensor, int8: bool) -> tuple[Tensor, Tensor]:
    check_rows("per_token_quant", "x", x)
    return row_outputs(x, int8)


@per_token_quant.samples
def _() -> Iterator[Sample]:
    for int8 in (False, True):
        for tokens in (1, 17, 0):  # decode, ragged, empty
            for h in (1, 1001, 7168):  # scalar tail, odd, DeepSeek-V3
                yield Sample(randn(tokens, h), int8)
    yield Sample(randn(2, 16384))  # Llama 3 405B

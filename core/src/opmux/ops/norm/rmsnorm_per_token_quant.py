# SPDX-License-Identifier: Apache-2.0
"""Root mean square norm fused with per-token quantisation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.checks import check_rows
from opmux.op import op
from opmux.ops.norm._checks import check_weight
from opmux.ops.quantization._quantize import TOLERANCE, quantize_rows, row_outputs
from opmux.samples import Sample, randn


@op(out=("out_q", "out_scale"), tolerance=TOLERANCE)
def rmsnorm_per_token_quant(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    int8: bool = False,
) -> tuple[Tensor, Tensor]:
    """Root mean square norm of each row, then :func:`per_token_quant` of it.

    ``x / sqrt(mean(x**2) + eps) * weight`` stays in float32 until it is quantised.
    The scale of a row is ``max(amax, 1e-10) / top``, top is 448 for fp8 e4m3 and, with int8, 127.

    Shapes:
        x: (T, h), float32, bfloat16 or float16; last dimension contiguous
        weight: (h,), dtype of x
        out_q: (T, h), float8_e4m3fn, or int8 with int8
        out_scale: (T, 1), float32

    Raises:
        ValueError: a shape does not fit.
        TypeError: weight has another dtype than x.

    Source: Root Mean Square Layer Normalization, arXiv:1910.07467
    """
    total = x.float()
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return quantize_rows(total * scale * weight.float(), int8)


@rmsnorm_per_token_quant.outputs
def _(
    x: Tensor,
    weight: Tensor,
    eps: float,
    int8: bool,
) -> tuple[Tensor, Tensor]:
    name = "rmsnorm_per_token_quant"
    check_rows(name, "x", x)
    check_weight(name, x, weight)
    return row_outputs(x, int8)


@rmsnorm_per_token_quant.samples
def _() -> Iterator[Sample]:
    for int8 in (False, True):
        for tokens in (1, 17, 0):  # decode, ragged, empty
            for h in (1, 1001, 8192):  # scalar tail, odd, Llama 3 70B
                yield Sample(randn(tokens, h), randn(h), int8=int8)
    yield Sample(randn(2, 128), randn(128), eps=1e-5)  # another eps

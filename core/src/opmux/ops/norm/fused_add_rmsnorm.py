# SPDX-License-Identifier: Apache-2.0
"""Residual addition fused with the root mean square norm, in place."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.op import op
from opmux.ops.norm._checks import check_residual, check_weight
from opmux.samples import Sample, randn


@op(mutates=("x", "residual"))
def fused_add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> None:
    """In place: ``residual += x``, then ``x = rmsnorm(residual) * (weight)``.

    The sum is kept in float32 for the norm; residual and x are each rounded once.

    Shapes:
        x: (..., h), float32, bfloat16 or float16; last dimension contiguous; written
        residual: shape and dtype of x; written
        weight: (h,), dtype of x

    Raises:
        ValueError: residual is not shaped like x, or weight does not have h values.
        TypeError: residual or weight has another dtype than x.

    Source: Root Mean Square Layer Normalization, arXiv:1910.07467
    """
    total = x.float() + residual.float()
    residual.copy_(total)
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    x.copy_(total * scale * weight.float())


@fused_add_rmsnorm.outputs
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    check_weight("fused_add_rmsnorm", x, weight)
    check_residual("fused_add_rmsnorm", x, residual)


@fused_add_rmsnorm.samples
def _() -> Iterator[Sample]:
    for tokens in (1, 17, 0):  # decode, ragged, empty
        for h in (1, 4096, 8192):  # scalar tail, Llama 3 8B, Llama 3 70B
            yield Sample(randn(tokens, h), randn(tokens, h), randn(h))
    yield Sample(randn(2, 3, 128), randn(2, 3, 128), randn(128), eps=1e-5)  # 3-D, another eps

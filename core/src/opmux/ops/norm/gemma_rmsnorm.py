# SPDX-License-Identifier: Apache-2.0
"""Root mean square norm with weights around zero (Gemma)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.op import op
from opmux.ops.norm._checks import check_weight
from opmux.samples import Sample, randn


@op
def gemma_rmsnorm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Root mean square norm: ``x / sqrt(mean(x**2) + eps) * (1 + weight)`` over the last dimension.

    Computed in float32 and rounded once.

    Shapes:
        x: (..., h), float32, bfloat16 or float16; last dimension contiguous
        weight: (h,), dtype of x
        returns: shape and dtype of x

    Raises:
        ValueError: weight does not have one value for each of the h.
        TypeError: weight has another dtype than x.

    Source: Gemma, arXiv:2403.08295
    """
    value = x.float()
    scale = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    return (value * scale * (1 + weight.float())).to(x.dtype)


@gemma_rmsnorm.outputs
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    check_weight("gemma_rmsnorm", x, weight)
    return x.new_empty(x.shape)


@gemma_rmsnorm.samples
def _() -> Iterator[Sample]:
    for tokens in (1, 17, 0):  # decode, ragged, empty
        for h in (1, 2304, 3584):  # scalar tail, Gemma 2 2B, Gemma 2 9B
            yield Sample(randn(tokens, h), randn(h))
    yield Sample(randn(3, 8, 128), randn(128), eps=1e-5)  # per-head query norm, another eps

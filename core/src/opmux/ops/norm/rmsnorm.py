# SPDX-License-Identifier: Apache-2.0
"""Root mean square norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.op import op
from opmux.ops.norm._checks import check_weight
from opmux.samples import Sample, randn


@op
def rmsnorm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Root mean square norm: ``x / sqrt(mean(x**2) + eps) * (weight)`` over the last dimension.

    Computed in float32 and rounded once.

    Shapes:
        x: (..., h), float32, bfloat16 or float16; last dimension contiguous
        weight: (h,), dtype of x
        returns: shape and dtype of x

    Raises:
        ValueError: weight does not have one value for each of the h.
        TypeError: weight has another dtype than x.

    Source: Root Mean Square Layer Normalization, arXiv:1910.07467
    """
    value = x.float()
    scale = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    return (value * scale * weight.float()).to(x.dtype)


@rmsnorm.outputs
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    check_weight("rmsnorm", x, weight)
    return x.new_empty(x.shape)


@rmsnorm.samples
def _() -> Iterator[Sample]:
    for tokens in (1, 17, 0):  # decode, ragged, empty
        for h in (1, 4096, 8192):  # scalar tail, Llama 3 8B, Llama 3 70B
            yield Sample(randn(tokens, h), randn(h))
    yield Sample(randn(3, 8, 128), randn(128), eps=1e-5)  # per-head query norm, another eps

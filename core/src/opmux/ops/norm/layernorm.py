# SPDX-License-Identifier: Apache-2.0
"""Layer norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.op import op
from opmux.ops.norm._checks import check_weight
from opmux.samples import Sample, randn


@op
def layernorm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Layer norm: ``(x - mean) / sqrt(variance + eps) * weight + bias`` over the last dimension.

    Computed in float32 and rounded once. The variance is the mean square of the centred values, not
    a difference of large sums.

    Shapes:
        x: (..., h), float32, bfloat16 or float16; last dimension contiguous
        weight: (h,), dtype of x
        bias: (h,), dtype of x; None adds nothing
        returns: shape and dtype of x

    Raises:
        ValueError: weight or bias does not have one value for each of the h.
        TypeError: weight or bias has another dtype than x.

    Source: Layer Normalization, arXiv:1607.06450
    """
    value = x.float()
    centred = value - value.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    result = centred * scale * weight.float()
    return (result if bias is None else result + bias.float()).to(x.dtype)


@layernorm.outputs
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    check_weight("layernorm", x, weight)
    if bias is not None:
        if bias.shape != x.shape[-1:]:
            raise ValueError(
                f"layernorm: bias must have shape {tuple(x.shape[-1:])}, got {tuple(bias.shape)}"
            )
        if bias.dtype != x.dtype:
            raise TypeError(
                f"layernorm: bias must have the dtype of x, {x.dtype}, got {bias.dtype}"
            )
    return x.new_empty(x.shape)


@layernorm.samples
def _() -> Iterator[Sample]:
    for tokens in (1, 17, 0):  # decode, ragged, empty
        for h in (1, 1152, 8192):  # scalar tail, SigLIP, Falcon 40B
            yield Sample(randn(tokens, h), randn(h), randn(h))
    yield Sample(randn(17, 1152), randn(1152), eps=1e-6)  # no bias, another eps
    yield Sample(randn(2, 3, 129), randn(129), randn(129))  # 3-D, odd

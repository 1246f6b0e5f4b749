# SPDX-License-Identifier: Apache-2.0
"""The sigmoid approximation of GELU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.op import op
from opmux.samples import Sample, randn


@op
def gelu_quick(x: Tensor) -> Tensor:
    """Sigmoid approximation of GELU: ``x * sigmoid(1.702 * x)``.

    Computed in float32 and rounded once.

    Shapes:
        x: (..., d), float32, bfloat16 or float16; last dimension contiguous
        returns: shape and dtype of x

    Raises:
        TypeError: x is not of a floating type that is served.

    Source: Gaussian Error Linear Units, arXiv:1606.08415
    """
    value = x.float()
    return (value * torch.sigmoid(1.702 * value)).to(x.dtype)


@gelu_quick.outputs
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@gelu_quick.samples
def _() -> Iterator[Sample]:
    for tokens in (1, 17, 0):  # decode, ragged, empty
        for d in (1, 3072, 5120):  # scalar tail, CLIP ViT-B, CLIP ViT-bigG
            yield Sample(randn(tokens, d))

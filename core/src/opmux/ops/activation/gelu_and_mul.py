# SPDX-License-Identifier: Apache-2.0
"""GEGLU gate with the exact GELU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.op import op
from opmux.samples import Sample, randn


@op
def gelu_and_mul(x: Tensor) -> Tensor:
    """GEGLU gate: ``gelu(x[..., :d]) * x[..., d:]``.

    ``gelu(v) = v * (1 + erf(v / sqrt(2))) / 2``. Computed in float32 and rounded once.

    Shapes:
        x: (..., 2 * d), float32, bfloat16 or float16; last dimension contiguous
        returns: (..., d), dtype of x

    Raises:
        ValueError: the last dimension of x is odd.

    Source: GLU Variants Improve Transformer, arXiv:2002.05202
    """
    gate, up = x.float().chunk(2, dim=-1)
    # (1 + erf(v / sqrt(2))) / 2; F.gelu makes NaN of infinity where it is vectorised
    return (gate * torch.special.ndtr(gate) * up).to(x.dtype)


@gelu_and_mul.outputs
def _(x: Tensor) -> Tensor:
    if x.shape[-1] % 2:
        raise ValueError(f"gelu_and_mul: last dimension of x must be even, got {x.shape[-1]}")
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@gelu_and_mul.samples
def _() -> Iterator[Sample]:
    for tokens in (1, 17, 0):  # decode, ragged, empty
        for d in (1, 10240, 14336):  # scalar tail, Gemma 3 4B, Gemma 2 9B
            yield Sample(randn(tokens, 2 * d))

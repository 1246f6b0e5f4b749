# SPDX-License-Identifier: Apache-2.0
"""SwiGLU gate."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from opmux.op import op
from opmux.samples import Sample, randn


@op
def silu_and_mul(x: Tensor) -> Tensor:
    """SwiGLU gate: ``silu(x[..., :d]) * x[..., d:]``.

    Computed in float32 and rounded once.

    Shapes:
        x: (..., 2 * d), float32, bfloat16 or float16; last dimension contiguous
        returns: (..., d), dtype of x

    Raises:
        ValueError: the last dimension of x is odd.

    Source: GLU Variants Improve Transformer, arXiv:2002.05202
    """
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


@silu_and_mul.outputs
def _(x: Tensor) -> Tensor:
    if x.shape[-1] % 2:
        raise ValueError(f"silu_and_mul: last dimension of x must be even, got {x.shape[-1]}")
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@silu_and_mul.samples
def _() -> Iterator[Sample]:
    for tokens in (1, 17, 0):  # decode, ragged, empty
        for d in (1, 11008, 14336):  # scalar tail, Llama 2 7B, Llama 3 8B
            yield Sample(randn(tokens, 2 * d))

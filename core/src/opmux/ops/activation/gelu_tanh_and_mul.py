# SPDX-License-Identifier: Apache-2.0
"""GEGLU gate with the tanh GELU."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from opmux.op import op
from opmux.samples import Sample, randn


@op
def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """GEGLU gate: ``gelu_tanh(x[..., :d]) * x[..., d:]``.

    ``gelu_tanh(v) = v * (1 + tanh(sqrt(2 / pi) * (v + 0.044715 * v**3))) / 2``; computed in float32
    and rounded once.

    Shapes:
        x: (..., 2 * d), float32, bfloat16 or float16; last dimension contiguous
        returns: (..., d), dtype of x

    Raises:
        ValueError: the last dimension of x is odd.

    Source: Gaussian Error Linear Units, arXiv:1606.08415
    """
    gate, up = x.float().chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(x.dtype)


@gelu_tanh_and_mul.outputs
def _(x: Tensor) -> Tensor:
    if x.shape[-1] % 2:
        raise ValueError(f"gelu_tanh_and_mul: last dimension of x must be even, got {x.shape[-1]}")
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@gelu_tanh_and_mul.samples
def _() -> Iterator[Sample]:
    for tokens in (1, 17, 0):  # decode, ragged, empty
        for d in (1, 10240, 14336):  # scalar tail, Gemma 3 4B, Gemma 2 9B
            yield Sample(randn(tokens, 2 * d))

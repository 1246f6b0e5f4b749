# SPDX-License-Identifier: Apache-2.0
"""Add the experts' results of each token."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from opmux.op import op
from opmux.samples import Sample, randn


@op
def moe_sum(x: Tensor) -> Tensor:
    """Sum over the chosen experts: ``out[t] = sum over j of x[t, j]``.

    Summed in float32 and rounded once.

    Shapes:
        x: (T, topk, h), float32, bfloat16 or float16; last dimension contiguous
        returns: (T, h), dtype of x

    Raises:
        ValueError: x does not have three dimensions.

    Source: Outrageously Large Neural Networks, arXiv:1701.06538
    """
    return x.float().sum(1).to(x.dtype)


@moe_sum.outputs
def _(x: Tensor) -> Tensor:
    if x.dim() != 3:
        raise ValueError(f"moe_sum: x must be (tokens, topk, h), got {tuple(x.shape)}")
    return x.new_empty((x.shape[0], x.shape[2]))


@moe_sum.samples
def _() -> Iterator[Sample]:
    for tokens in (1, 17, 0):  # decode, ragged, empty
        yield Sample(randn(tokens, 8, 7168))  # DeepSeek-V3
        yield Sample(randn(tokens, 2, 4096))  # Mixtral 8x7B
    yield Sample(randn(5, 1, 33))  # one expert, odd
    yield Sample(randn(5, 3, 7))

# SPDX-License-Identifier: Apache-2.0
"""Add the experts' results of each token and scale the sum."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from opmux.op import op
from opmux.samples import Sample, randn


@op
def moe_sum_reduce(x: Tensor, routed_scaling_factor: float = 1.0) -> Tensor:
    """Scaled sum over the chosen experts: ``routed_scaling_factor * sum over j of x[t, j]``.

    Summed in float32, scaled, and rounded once.

    Shapes:
        x: (T, topk, h), float32, bfloat16 or float16; last dimension contiguous
        returns: (T, h), dtype of x

    Raises:
        ValueError: x does not have three dimensions.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437
    """
    return (x.float().sum(1) * routed_scaling_factor).to(x.dtype)


@moe_sum_reduce.outputs
def _(x: Tensor, routed_scaling_factor: float) -> Tensor:
    if x.dim() != 3:
        raise ValueError(f"moe_sum_reduce: x must be (tokens, topk, h), got {tuple(x.shape)}")
    return x.new_empty((x.shape[0], x.shape[2]))


@moe_sum_reduce.samples
def _() -> Iterator[Sample]:
    for tokens in (1, 17, 0):  # decode, ragged, empty
        yield Sample(randn(tokens, 8, 7168), 2.5)  # DeepSeek-V3
        yield Sample(randn(tokens, 6, 2048))  # Moonlight
    yield Sample(randn(5, 1, 33), 0.5)  # one expert, odd

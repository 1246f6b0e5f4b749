# SPDX-License-Identifier: Apache-2.0
"""Gather the experts' rows of each token, weigh and add them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.checks import INDEX_DTYPES, check_range, check_rows
from opmux.op import op
from opmux.samples import Sample, randint, randn


@op
def apply_shuffle_mul_sum(x: Tensor, permutation: Tensor, factors: Tensor | None = None) -> Tensor:
    """Undo a shuffle: ``out[t] = sum over j of factors[t, j] * x[permutation[t, j]]``.

    A negative index adds nothing. Summed in float32 and rounded once.

    Shapes:
        x: (M, h), float32, bfloat16 or float16; last dimension contiguous
        permutation: (T, topk), int32 or int64, each below M
        factors: (T, topk), float32; None weighs all by 1
        returns: (T, h), dtype of x

    Raises:
        ValueError: a shape, or on the CPU an index, does not fit.
        TypeError: permutation holds no integers or factors is not float32.

    Source: MegaBlocks, arXiv:2211.15841
    """
    rows = torch.cat((x.new_zeros(1, x.shape[1]), x))  # row 0 stands for negative indices
    total = x.new_zeros((permutation.shape[0], x.shape[1]), dtype=torch.float32)
    for j in range(permutation.shape[1]):
        place = permutation[:, j].long()
        value = rows[place.clamp(min=-1) + 1].float()
        if factors is not None:
            value = torch.where(place[:, None] < 0, 0.0, value * factors[:, j, None])
        total = total + value
    return total.to(x.dtype)


@apply_shuffle_mul_sum.outputs
def _(x: Tensor, permutation: Tensor, factors: Tensor | None) -> Tensor:
    name = "apply_shuffle_mul_sum"
    check_rows(name, "x", x)
    check_rows(name, "permutation", permutation)
    if permutation.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name}: permutation must be int32 or int64, got {permutation.dtype}")
    if factors is not None:
        if factors.dtype != torch.float32:
            raise TypeError(f"{name}: factors must be float32, got {factors.dtype}")
        if factors.shape != permutation.shape:
            raise ValueError(
                f"{name}: factors must have the shape of permutation, "
                f"{tuple(permutation.shape)}, got {tuple(factors.shape)}"
            )
    check_range(name, "permutation", permutation, None, x.shape[0])
    return x.new_empty((permutation.shape[0], x.shape[1]))


@apply_shuffle_mul_sum.samples
def _() -> Iterator[Sample]:
    for tokens in (1, 17, 0):  # decode, ragged, empty
        yield Sample(  # DeepSeek-V3
            randn(24, 7168), randint(0, 24, tokens, 8, dtype=torch.int32),
            randn(tokens, 8, dtype=torch.float32),
        )  # fmt: skip
    yield Sample(randn(10, 4096), randint(0, 10, 5, 2, dtype=torch.int32))  # Mixtral, no factors
    # int64, odd sizes, some negative
    yield Sample(randn(7, 33), randint(-2, 7, 12, 3), randn(12, 3, dtype=torch.float32))

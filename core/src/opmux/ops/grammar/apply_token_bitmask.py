# SPDX-License-Identifier: Apache-2.0
"""Forbid tokens by a bit mask, in place."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.checks import check_indices, check_range, check_rows
from opmux.op import op
from opmux.samples import Sample, Tolerance, permutation, randint, randn


@op(
    mutates=("logits",),
    tolerance=Tolerance((0, 0), (0, 0), (0, 0), reason="a logit keeps its bits or becomes -inf"),
)
def apply_token_bitmask(logits: Tensor, bitmask: Tensor, indices: Tensor | None = None) -> None:
    """In place: ``logits[b, v] = -inf`` where bit ``v % 32`` of ``bitmask[b, v // 32]`` is 0.

    Other logits keep their bits, NaN included.

    Shapes:
        logits: (B, V), float32, bfloat16 or float16; written
        bitmask: (B, W), int32, W at least V / 32 rounded up; bits behind V are not read
        indices: (N,), int32 or int64, the rows b to mask; None masks all

    Raises:
        ValueError: a shape, or on the CPU an index, does not fit.
        TypeError: bitmask is not int32 or indices hold no integers.

    Source: XGrammar, arXiv:2411.15100
    """
    size = logits.shape[1]
    words = bitmask.repeat_interleave(32, dim=1)[:, :size]
    shift = torch.arange(size, device=logits.device, dtype=torch.int32) % 32
    forbidden = (words >> shift) & 1 == 0
    if indices is not None:
        chosen = torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
        forbidden &= chosen.index_fill(0, indices.long(), True)[:, None]
    logits.masked_fill_(forbidden, float("-inf"))


@apply_token_bitmask.outputs
def _(logits: Tensor, bitmask: Tensor, indices: Tensor | None) -> None:
    name = "apply_token_bitmask"
    check_rows(name, "logits", logits)
    if bitmask.dtype != torch.int32:
        raise TypeError(f"{name}: bitmask must be int32, got {bitmask.dtype}")
    words = (logits.shape[1] + 31) // 32
    if bitmask.dim() != 2 or bitmask.shape[0] != logits.shape[0] or bitmask.shape[1] < words:
        raise ValueError(
            f"{name}: bitmask must have shape ({logits.shape[0]}, {words}) or wider, "
            f"got {tuple(bitmask.shape)}"
        )
    if indices is not None:
        check_indices(name, "indices", indices, None)
        check_range(name, "indices", indices, 0, logits.shape[0])


@apply_token_bitmask.samples
def _() -> Iterator[Sample]:
    low, high = -(2**31), 2**31
    for rows, size in ((1, 1), (3, 1001), (0, 64), (2, 128256)):  # smallest, odd, empty, Llama 3
        mask = randint(low, high, rows, (size + 31) // 32, dtype=torch.int32)
        yield Sample(randn(rows, size), mask)
        yield Sample(randn(rows, size), mask, permutation(rows, (rows + 1) // 2, torch.int32))
    yield Sample(randn(4, 90), randint(low, high, 4, 5, dtype=torch.int32))  # mask wider than V

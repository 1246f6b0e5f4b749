# SPDX-License-Identifier: Apache-2.0
"""Gather rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.checks import check_indices, check_range, check_rows
from opmux.op import op
from opmux.samples import Sample, Tolerance, randint, randn

_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8,
    torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


@op(
    dtypes=_DTYPES,
    tolerance=Tolerance((0, 0), (0, 0), (0, 0), reason="copied bit for bit"),
)
def shuffle_rows(x: Tensor, dst2src_map: Tensor) -> Tensor:
    """Gather rows: ``out[i] = x[dst2src_map[i]]``, zeros for a negative index.

    Copied bit for bit.

    Shapes:
        x: (M, h), any type of 1, 2 or 4 bytes that is listed; last dimension contiguous
        dst2src_map: (N,), int32 or int64, each below M
        returns: (N, h), dtype of x

    Raises:
        ValueError: a shape, or on the CPU an index, does not fit.
        TypeError: dst2src_map holds no integers.

    Source: MegaBlocks, arXiv:2211.15841
    """
    raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]
    # a row of zeros in front, so that x may be empty where every index is negative
    rows = torch.cat((x.new_zeros((1, x.shape[1]), dtype=raw), x.view(raw)))
    return rows[dst2src_map.long().clamp(min=-1) + 1].view(x.dtype)


@shuffle_rows.outputs
def _(x: Tensor, dst2src_map: Tensor) -> Tensor:
    check_rows("shuffle_rows", "x", x)
    check_indices("shuffle_rows", "dst2src_map", dst2src_map, None)
    check_range("shuffle_rows", "dst2src_map", dst2src_map, None, x.shape[0])
    return x.new_empty((dst2src_map.shape[0], x.shape[1]))


@shuffle_rows.samples
def _() -> Iterator[Sample]:
    for rows in (1, 17, 0):  # decode, ragged, empty
        yield Sample(randn(9, 7168), randint(0, 9, rows, dtype=torch.int32))  # DeepSeek-V3
    yield Sample(randn(5, 33), randint(-1, 5, 12))  # int64, odd rows, some negative
    yield Sample(randn(40, 56), randint(0, 40, 320, dtype=torch.int32))  # group scales of 7168

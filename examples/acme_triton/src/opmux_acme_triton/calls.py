# SPDX-License-Identifier: Apache-2.0
"""The kernels and their launches: inputs in the op's order, then outputs, which they write.

Imported when opmux loads the backend. Arguments have been checked when a call arrives here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opmux.adapt import matrices

BLOCK = 1024  # elements of a program: 8 a thread with 4 warps of 32


@triton.jit
def _silu_and_mul(x, x_stride, out, out_stride, d, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < d
    gate = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + d + column, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + row * out_stride + column, result.to(out.dtype.element_ty), mask=inside)


def silu_and_mul(x: Tensor, out: Tensor) -> None:
    """One program for each row and block of columns."""
    if not out.numel():
        return
    with torch.accelerator.device_index(x.device.index):  # Triton launches on the current device
        for rows, results in matrices(x, out):
            count, d = results.shape
            grid = (count, triton.cdiv(d, BLOCK))
            _silu_and_mul[grid](rows, rows.stride(0), results, results.stride(0), d, block=BLOCK)


@triton.jit
def _rmsnorm(x, x_stride, weight, out, out_stride, h, eps, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    out += row * out_stride
    squares = tl.zeros([block], tl.float32)
    for start in range(0, h, block):
        column = start + tl.arange(0, block)
        value = tl.load(x + column, mask=column < h, other=0.0).to(tl.float32)
        squares += value * value
    scale = 1 / tl.sqrt(tl.sum(squares) / h + eps)
    for start in range(0, h, block):  # the row again, from the L1 cache
        column = start + tl.arange(0, block)
        inside = column < h
        value = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        result = (value * scale * factor).to(out.dtype.element_ty)
        tl.store(out + column, result, mask=inside)


def rmsnorm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """One program for each row."""
    if not out.numel():
        return
    with torch.accelerator.device_index(x.device.index):
        for rows, results in matrices(x, out):
            count, h = results.shape
            _rmsnorm[(count,)](
                rows, rows.stride(0), weight, results, results.stride(0), h, eps, block=BLOCK
            )

# SPDX-License-Identifier: Apache-2.0
"""From the arguments of an op to those of the vendor's functions; imported when opmux loads."""

from __future__ import annotations

import torch
from torch import Tensor

from opmux.adapt import dlpack, matrices
from opmux_acme_pybind11 import _native

TYPES = {torch.float32: _native.Type.float32, torch.bfloat16: _native.Type.bfloat16}


def silu_and_mul(x: Tensor, out: Tensor) -> None:
    """By pointers, with a row stride: any view whose rows lie apart at will."""
    for rows, results in matrices(x, out):
        _native.silu_and_mul(
            rows.data_ptr(), rows.stride(0), results.data_ptr(), results.stride(0),
            *results.shape, TYPES[x.dtype],
        )  # fmt: skip


def fused_add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """By pointers to dense tensors, which kernels.py claims; x and residual are written."""
    pointers = (x.data_ptr(), residual.data_ptr(), weight.data_ptr())
    h = x.shape[-1]
    _native.fused_add_rmsnorm(*pointers, x.numel() // max(h, 1), h, eps, TYPES[x.dtype])


rmsnorm = dlpack(_native.rmsnorm)

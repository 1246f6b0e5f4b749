# SPDX-License-Identifier: Apache-2.0
"""A right backend in pure Python; the mutants beside it differ from it in one thing each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import opmux

DTYPES = (torch.float32, torch.bfloat16)


def silu_and_mul(x: Tensor, out: Tensor) -> None:
    gate, up = x.float().chunk(2, dim=-1)
    out.copy_(F.silu(gate) * up)


def rmsnorm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    out.copy_(F.rms_norm(x.float(), weight.shape, weight.float(), eps))


def fused_add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    total = x.float() + residual.float()
    residual.copy_(total)
    x.copy_(F.rms_norm(total, weight.shape, weight.float(), eps))


KERNELS: dict[str, Callable[..., None]] = {
    "fused_add_rmsnorm": fused_add_rmsnorm,
    "rmsnorm": rmsnorm,
    "silu_and_mul": silu_and_mul,
}
REFUSES = {"silu_and_mul": opmux.last_dim_multiple_of(4)}


@opmux.hookimpl
def opmux_backend() -> opmux.Backend:
    return opmux.Backend(
        name=__name__.removeprefix("opmux_"),
        device="cpu",
        kernels={
            name: opmux.Kernel(DTYPES, rejects=REFUSES.get(name), fn=fn)
            for name, fn in KERNELS.items()
        },
    )

# SPDX-License-Identifier: Apache-2.0
"""A backend in pure Python, right or deliberately wrong: its package's name says in which way.

``opmux_acme`` is right. Each mutant differs in one kernel and must fail the conformance kit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import opmux

NAME = __name__.removeprefix("opmux_")
DTYPES = (torch.float32, torch.bfloat16)
CALLS = itertools.count()


def silu_and_mul(x: Tensor, out: Tensor) -> None:
    gate, up = x.float().chunk(2, dim=-1)
    out.copy_(F.silu(gate) * up)


def rmsnorm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    out.copy_(F.rms_norm(x.float(), weight.shape, weight.float(), eps))


def fused_add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    total = x.float() + residual.float()
    residual.copy_(total)
    x.copy_(F.rms_norm(total, weight.shape, weight.float(), eps))


def swapped_halves(x: Tensor, out: Tensor) -> None:
    up, gate = x.float().chunk(2, dim=-1)
    out.copy_(F.silu(gate) * up)


def unwritten_tail(x: Tensor, out: Tensor) -> None:
    whole = out.shape[-1] // 4 * 4  # as a vector loop without its scalar tail
    result = torch.empty_like(out)
    silu_and_mul(x, result)
    out[..., : max(whole - 4, 0)].copy_(result[..., : max(whole - 4, 0)])


def writes_past_the_end(x: Tensor, out: Tensor) -> None:
    silu_and_mul(x, out)
    if out.numel():
        end = out.storage_offset() + sum(
            (size - 1) * step for size, step in zip(out.shape, out.stride(), strict=True)
        )
        out.as_strided((1,), (1,), end + 1).zero_()


def ignored_row_stride(x: Tensor, out: Tensor) -> None:
    dense = torch.empty(x.shape).stride()
    silu_and_mul(x.as_strided(x.shape, dense), out)


def over_claimed_dtype(x: Tensor, out: Tensor) -> None:
    if x.dtype is torch.bfloat16:
        raise RuntimeError("not written yet")
    silu_and_mul(x, out)


def modified_input(x: Tensor, out: Tensor) -> None:
    silu_and_mul(x, out)
    x.zero_()


def not_deterministic(x: Tensor, out: Tensor) -> None:
    silu_and_mul(x, out)
    out.mul_(1 + next(CALLS) % 2 * 1e-6)  # inside the tolerance


def batch_variant(x: Tensor, out: Tensor) -> None:
    silu_and_mul(x, out)
    out.mul_(1 + x.numel() % 9973 * 1e-10)


def wrong_eps(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    rmsnorm(x, weight, 1e-5, out)


def lost_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    fused_add_rmsnorm(x, residual.clone(), weight, eps)


KERNELS: dict[str, Callable[..., None]] = {
    "fused_add_rmsnorm": lost_residual if NAME == "lost_residual" else fused_add_rmsnorm,
    "rmsnorm": wrong_eps if NAME == "wrong_eps" else rmsnorm,
    "silu_and_mul": silu_and_mul,
}
if NAME not in ("acme", "lost_residual", "wrong_eps"):
    KERNELS["silu_and_mul"] = globals()[NAME]


@opmux.hookimpl
def opmux_backend() -> opmux.Backend:
    refuses = {"silu_and_mul": opmux.last_dim_multiple_of(4)}
    return opmux.Backend(
        name=NAME,
        device="cpu",
        kernels={
            name: opmux.Kernel(DTYPES, rejects=refuses.get(name), fn=fn)
            for name, fn in KERNELS.items()
        },
    )

# SPDX-License-Identifier: Apache-2.0
"""Norms: alone, with the residual, with a quantised result."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import opmux

from ..case import F32, FP8, LARGE, Case, Set, Way, dequantised, poison, randn
from ..peers import compiled, fi, liger, sgl
from .activation import GROUP, TOP, keep

OPS, EPS = torch.ops, 1e-6


def eager(x: Tensor, w: Tensor) -> Tensor:
    """Torch's own."""
    return F.rms_norm(x, (x.shape[-1],), w, EPS)


def eager_add(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Torch, out of place, so that the compiler may fuse it."""
    total = x + residual
    return F.rms_norm(total, (x.shape[-1],), w, EPS), total


def eager_add_quant(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Torch: residual, norm, fp8 by groups."""
    normed, total = eager_add(x, residual, w)
    groups = normed.unflatten(-1, (-1, GROUP)).float()
    scale = groups.abs().amax(-1).clamp_min(1e-10) / TOP
    return (groups / scale.unsqueeze(-1)).flatten(-2).to(FP8), scale, total


def both(way: Way) -> Way:
    """Store what a run returns as ``x`` and ``residual``."""

    def run(s: Set) -> None:
        s.y, s.sum = way(s)

    return run


def triple(way: Way) -> Way:
    """Store what a run returns as ``q``, ``scale`` and ``residual``."""

    def run(s: Set) -> None:
        s.q, s.scale, s.sum = way(s)

    return run


def rms(tokens: int, h: int, goal: float = 0.0, shape: str = "", name: str = "rmsnorm") -> Case:
    """RMS norm, or Gemma's."""
    peers: dict[str, Way] = {
        "sglang": lambda s: getattr(sgl("elementwise"), name)(s.x, s.w, EPS, s.out),
        "flashinfer": lambda s: getattr(fi("norm"), name)(s.x, s.w, EPS, out=s.out),
    }
    if name == "rmsnorm":
        peers |= {
            "vllm": lambda s: OPS._C.rms_norm(s.out, s.x, s.w, EPS),
            "torch": keep(lambda s: eager(s.x, s.w)),
            "compile": keep(lambda s: compiled(eager)(s.x, s.w)),
            "liger": keep(
                lambda s: liger("rms_norm").rms_norm_forward(s.x, s.w, EPS, 0.0, "llama", None)[0]
            ),
        }
    return Case(
        name, shape or f"T={tokens} h={h}", 4 * tokens * h + 2 * h,
        lambda: Set(x=randn(tokens, h), w=randn(h), out=poison(tokens, h)),
        lambda s, b: getattr(opmux, name)(s.x, s.w, EPS, out=s.out, backend=b),
        lambda s: (s.out,), peers, goal=goal,
    )  # fmt: skip


def add(tokens: int, h: int, goal: float = 0.0, goal_us: float = 0.0,
        name: str = "fused_add_rmsnorm") -> Case:  # fmt: skip
    """Residual and RMS norm, in place."""
    peers: dict[str, Way] = {
        "sglang": lambda s: getattr(sgl("elementwise"), name)(s.x, s.residual, s.w, EPS),
        "flashinfer": lambda s: getattr(fi("norm"), name)(s.x, s.residual, s.w, EPS),
    }
    if name == "fused_add_rmsnorm":
        peers |= {
            "vllm": lambda s: OPS._C.fused_add_rms_norm(s.x, s.residual, s.w, EPS),
            "torch": both(lambda s: eager_add(s.x, s.residual, s.w)),
            "compile": both(lambda s: compiled(eager_add)(s.x, s.residual, s.w)),
        }
    return Case(
        name, f"T={tokens} h={h}", 8 * tokens * h + 2 * h,
        lambda: Set(x=randn(tokens, h), residual=randn(tokens, h), w=randn(h), y=None, sum=None),
        lambda s, b: getattr(opmux, name)(s.x, s.residual, s.w, EPS, backend=b),
        lambda s: (s.x, s.residual) if s.y is None else (s.y, s.sum),
        peers, goal=goal, goal_us=goal_us,
    )  # fmt: skip


def layer(tokens: int, h: int) -> Case:
    """Layer norm; FlashInfer takes its weights in float32."""

    def make() -> Set:
        w, bias = randn(h), randn(h)
        return Set(x=randn(tokens, h), w=w, bias=bias, w32=w.float(), bias32=bias.float(),
                   out=poison(tokens, h))  # fmt: skip

    def eager_layer(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (h,), w, bias, 1e-5)

    return Case(
        "layernorm", f"T={tokens} h={h}", 4 * tokens * h + 4 * h, make,
        lambda s, b: opmux.layernorm(s.x, s.w, s.bias, 1e-5, out=s.out, backend=b),
        lambda s: (s.out,),
        {
            "flashinfer": keep(lambda s: fi("norm").layernorm(s.x, s.w32, s.bias32, 1e-5)),
            "torch": keep(lambda s: eager_layer(s.x, s.w, s.bias)),
            "compile": keep(lambda s: compiled(eager_layer)(s.x, s.w, s.bias)),
        }, goal=LARGE,
    )  # fmt: skip


def add_quant(tokens: int, h: int, goal: float) -> Case:
    """Residual, norm and fp8 by groups; sglang-kernel takes two kernels for it."""
    groups = h // GROUP

    def two(s: Set) -> None:
        sgl("elementwise").fused_add_rmsnorm(s.x, s.residual, s.w, EPS)
        sgl("gemm").sgl_per_token_group_quant_8bit(
            s.x, s.q, s.scale, GROUP, 1e-10, -TOP, TOP, False
        )

    return Case(
        "fused_add_rmsnorm_per_token_group_quant", f"T={tokens} h={h} fp8 g128",
        tokens * (7 * h + 4 * groups) + 2 * h,
        lambda: Set(x=randn(tokens, h), residual=randn(tokens, h), w=randn(h), sum=None,
                    q=poison(tokens, h, dtype=FP8), scale=poison(tokens, groups, dtype=F32)),
        lambda s, b: opmux.fused_add_rmsnorm_per_token_group_quant(
            s.x, s.residual, s.w, EPS, GROUP, out_q=s.q, out_scale=s.scale, backend=b),
        lambda s: (dequantised(s.q, s.scale), s.residual if s.sum is None else s.sum),
        {
            "vllm": lambda s: OPS._C.rms_norm_per_block_quant(
                s.q, s.x, s.w, s.scale, EPS, None, s.residual, GROUP, False),
            "sglang": two,
            "torch": triple(lambda s: eager_add_quant(s.x, s.residual, s.w)),
            "compile": triple(lambda s: compiled(eager_add_quant)(s.x, s.residual, s.w)),
        }, bound=3e-2, goal=goal,
    )  # fmt: skip


def row_quant(tokens: int, h: int) -> Case:
    """Norm and fp8 by rows."""

    def two(s: Set) -> None:
        sgl("elementwise").rmsnorm(s.x, s.w, EPS, s.out)
        sgl("gemm").sgl_per_token_quant_fp8(s.out, s.q, s.scale)

    return Case(
        "rmsnorm_per_token_quant", f"T={tokens} h={h} fp8", tokens * (3 * h + 4) + 2 * h,
        lambda: Set(x=randn(tokens, h), w=randn(h), out=poison(tokens, h),
                    q=poison(tokens, h, dtype=FP8), scale=poison(tokens, 1, dtype=F32)),
        lambda s, b: opmux.rmsnorm_per_token_quant(
            s.x, s.w, EPS, out_q=s.q, out_scale=s.scale, backend=b),
        lambda s: (dequantised(s.q, s.scale),),
        {
            "vllm": lambda s: OPS._C.rms_norm_dynamic_per_token_quant(
                s.q, s.x, s.w, s.scale, EPS, None, None),
            "sglang": two,
        }, bound=3e-2, goal=LARGE,
    )  # fmt: skip


def group_quant(tokens: int, h: int) -> Case:
    """Norm and fp8 by groups."""
    groups = h // GROUP

    def two(s: Set) -> None:
        sgl("elementwise").rmsnorm(s.x, s.w, EPS, s.out)
        sgl("gemm").sgl_per_token_group_quant_8bit(
            s.out, s.q, s.scale, GROUP, 1e-10, -TOP, TOP, False
        )

    return Case(
        "rmsnorm_per_token_group_quant", f"T={tokens} h={h} fp8 g128",
        tokens * (3 * h + 4 * groups) + 2 * h,
        lambda: Set(x=randn(tokens, h), w=randn(h), out=poison(tokens, h),
                    q=poison(tokens, h, dtype=FP8), scale=poison(tokens, groups, dtype=F32)),
        lambda s, b: opmux.rmsnorm_per_token_group_quant(
            s.x, s.w, EPS, GROUP, out_q=s.q, out_scale=s.scale, backend=b),
        lambda s: (dequantised(s.q, s.scale),),
        {
            "vllm": lambda s: OPS._C.rms_norm_per_block_quant(
                s.q, s.x, s.w, s.scale, EPS, None, None, GROUP, False),
            "sglang": two,
        }, bound=3e-2, goal=LARGE,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """Yield the family's cases."""
    yield rms(1, 8192)
    yield rms(16, 8192)
    yield rms(64, 8192)
    yield rms(4096, 8192, LARGE)
    yield rms(8192, 5120, LARGE)
    yield rms(8192, 7168, LARGE)
    yield rms(8192 * 72, 128, 0.90, "qk-norm 8192x72x128")
    yield rms(4096, 8192, LARGE, name="gemma_rmsnorm")
    yield add(1, 7168, goal_us=3.5)
    yield add(16, 7168, goal_us=3.5)
    yield add(8192, 7168, LARGE)
    yield add(8192, 8192, 0.95)
    yield add(8192, 7168, LARGE, name="gemma_fused_add_rmsnorm")
    yield layer(8192, 5120)
    yield row_quant(8192, 7168)
    yield group_quant(8192, 7168)
    yield add_quant(8192, 7168, 0.92)

# SPDX-License-Identifier: Apache-2.0
"""Quantisation to fp8 and int8."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import opmux

from ..case import F32, FP8, LARGE, Case, Set, Way, dequantised, poison, randn
from ..peers import compiled, sgl
from .activation import GROUP, TOP, pair

OPS = torch.ops
ROWS, COLUMNS = 0, 1  # layouts of the scales


def eager(x: Tensor) -> tuple[Tensor, Tensor]:
    """Torch: fp8 by groups."""
    groups = x.unflatten(-1, (-1, GROUP)).float()
    scale = groups.abs().amax(-1).clamp_min(1e-10) / TOP
    return (groups / scale.unsqueeze(-1)).flatten(-2).to(FP8), scale


def eager_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Torch: fp8 by rows."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-10) / TOP
    return (x.float() / scale).to(FP8), scale


def group(tokens: int, h: int, layout: int = ROWS, int8: bool = False, goal: float = 0.0) -> Case:
    """By groups of 128, scales in rows or, for TMA, in columns."""
    groups, dtype = h // GROUP, torch.int8 if int8 else FP8
    top = 127.0 if int8 else TOP
    low = -128.0 if int8 else -TOP  # sglang-kernel takes no other

    def seen(s: Set) -> Tensor:
        scale: Tensor = s.scale.T if layout == COLUMNS else s.scale
        return scale

    peers: dict[str, Way] = {
        "sglang": lambda s: sgl("gemm").sgl_per_token_group_quant_8bit(
            s.x, s.q, seen(s), GROUP, 1e-10, low, top, False
        ),
    }
    if int8:
        peers["vllm"] = lambda s: OPS._C.per_token_group_quant_int8(
            s.x, s.q, seen(s), GROUP, 1e-10, -top, top
        )
    else:
        peers["vllm"] = lambda s: OPS._C.per_token_group_fp8_quant(
            s.x, s.q, seen(s), GROUP, 1e-10, -top, top, False, layout == COLUMNS, False
        )
    if layout == ROWS and not int8:
        peers["torch"] = pair(lambda s: eager(s.x))
        peers["compile"] = pair(lambda s: compiled(eager)(s.x))
    shape = (tokens, groups) if layout == ROWS else (groups, tokens)
    name = f"{'int8' if int8 else 'fp8'} g128{' columns' if layout == COLUMNS else ''}"
    return Case(
        "per_token_group_quant", f"T={tokens} h={h} {name}", tokens * (3 * h + 4 * groups),
        lambda: Set(x=randn(tokens, h), q=poison(tokens, h, dtype=dtype),
                    scale=poison(*shape, dtype=F32)),
        lambda s, b: opmux.per_token_group_quant(
            s.x, GROUP, int8, layout, out_q=s.q, out_scale=s.scale, backend=b),
        lambda s: (dequantised(s.q, seen(s)), seen(s)), peers, bound=3e-2, goal=goal,
    )  # fmt: skip


def row(tokens: int, h: int, int8: bool = False, goal: float = 0.0) -> Case:
    """By rows."""
    dtype = torch.int8 if int8 else FP8
    peers: dict[str, Way] = {
        "vllm": lambda s: OPS._C.dynamic_scaled_int8_quant(s.q, s.x, s.scale, None)
    }
    if not int8:
        peers = {
            "vllm": lambda s: OPS._C.dynamic_per_token_scaled_fp8_quant(s.q, s.x, s.scale, None),
            "sglang": lambda s: sgl("gemm").sgl_per_token_quant_fp8(s.x, s.q, s.scale),
            "torch": pair(lambda s: eager_rows(s.x)),
            "compile": pair(lambda s: compiled(eager_rows)(s.x)),
        }
    return Case(
        "per_token_quant", f"T={tokens} h={h} {'int8' if int8 else 'fp8'}", tokens * (3 * h + 4),
        lambda: Set(x=randn(tokens, h), q=poison(tokens, h, dtype=dtype),
                    scale=poison(tokens, 1, dtype=F32)),
        lambda s, b: opmux.per_token_quant(s.x, int8, out_q=s.q, out_scale=s.scale, backend=b),
        lambda s: (dequantised(s.q, s.scale), s.scale), peers, bound=3e-2, goal=goal,
    )  # fmt: skip


def tensor(tokens: int, h: int) -> Case:
    """One scale for all, found first: the input is read twice, and counted once."""
    return Case(
        "per_tensor_quant", f"T={tokens} h={h} fp8 dynamic", 3 * tokens * h,
        lambda: Set(x=randn(tokens, h), q=poison(tokens, h, dtype=FP8), scale=poison(1, dtype=F32)),
        lambda s, b: opmux.per_tensor_quant(s.x, out_q=s.q, out_scale=s.scale, backend=b),
        lambda s: (dequantised(s.q, s.scale),),
        {"vllm": lambda s: OPS._C.dynamic_scaled_fp8_quant(s.q, s.x, s.scale)}, bound=3e-2,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """Yield the family's cases."""
    yield group(64, 7168)
    yield group(8192, 7168, goal=LARGE)
    yield group(8192, 7168, COLUMNS, goal=LARGE)
    yield group(8192, 7168, int8=True, goal=LARGE)
    yield row(8192, 7168, goal=LARGE)
    yield row(8192, 7168, int8=True, goal=LARGE)
    yield tensor(8192, 7168)

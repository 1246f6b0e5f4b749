# SPDX-License-Identifier: Apache-2.0
"""Helpers of attention."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

import opmux

from ..case import F32, LARGE, Case, Set, Way, poison, randn
from ..peers import compiled, fi, sgl

OPS = torch.ops


def eager(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    """Torch."""
    total = torch.logaddexp(s_a, s_b)
    a, b = (s_a - total).exp().unsqueeze(-1), (s_b - total).exp().unsqueeze(-1)
    return (v_a * a + v_b * b).to(v_a.dtype), total


def merge(tokens: int, heads: int, dim: int) -> Case:
    """Two partial attentions; vLLM keeps its sums heads first, FlashInfer in base 2."""

    def make() -> Set:
        a, b = randn(tokens, heads, dtype=F32), randn(tokens, heads, dtype=F32)
        return Set(
            va=randn(tokens, heads, dim), sa=a, vb=randn(tokens, heads, dim), sb=b,
            v=poison(tokens, heads, dim), s=poison(tokens, heads, dtype=F32),
            sa_heads=a.T.contiguous(), sb_heads=b.T.contiguous(),
            s_heads=poison(heads, tokens, dtype=F32),
            sa_two=a / math.log(2), sb_two=b / math.log(2), s_two=None,
        )  # fmt: skip

    def vllm(s: Set) -> None:
        OPS._C.merge_attn_states(s.v, s.s_heads, s.va, s.sa_heads, s.vb, s.sb_heads, None, None)
        s.heads_first = True

    def flashinfer(s: Set) -> None:
        s.v, s.s_two = fi("cascade").merge_state(s.va, s.sa_two, s.vb, s.sb_two)

    def results(s: Set) -> tuple[Tensor, ...]:
        if getattr(s, "heads_first", False):
            return s.v, s.s_heads.T
        return (s.v, s.s) if s.s_two is None else (s.v, s.s_two * math.log(2))

    def fresh(way: Way) -> Way:
        def run(s: Set) -> None:
            s.v, s.s = way(s)

        return run

    return Case(
        "merge_state", f"T={tokens} H={heads} D={dim}", tokens * heads * (6 * dim + 12), make,
        lambda s, b: opmux.merge_state(s.va, s.sa, s.vb, s.sb, s.v, s.s, backend=b), results,
        {
            "vllm": vllm,
            "sglang": lambda s: sgl("attention").merge_state_v2(
                s.va, s.sa, s.vb, s.sb, s.v, s.s),
            "flashinfer": flashinfer,
            "torch": fresh(lambda s: eager(s.va, s.sa, s.vb, s.sb)),
            "compile": fresh(lambda s: compiled(eager)(s.va, s.sa, s.vb, s.sb)),
        }, goal=LARGE,
    )  # fmt: skip


def concat_k(tokens: int) -> Case:
    """Keys of DeepSeek-V3's prefill: 128 heads of 128 and 64 shared."""
    return Case(
        "concat_mla_k", f"T={tokens} H=128 128+64", tokens * 2 * (128 * 128 + 64 + 128 * 192),
        lambda: Set(k=poison(tokens, 128, 192), nope=randn(tokens, 128, 128),
                    rope=randn(tokens, 1, 64)),
        lambda s, b: opmux.concat_mla_k(s.k, s.nope, s.rope, backend=b), lambda s: (s.k,),
        {
            "sglang": lambda s: sgl("elementwise").concat_mla_k(s.k, s.nope, s.rope),
            "flashinfer": lambda s: fi("concat_ops").concat_mla_k(s.k, s.nope, s.rope),
        }, goal=LARGE,
    )  # fmt: skip


def concat_q(tokens: int, goal: float = 0.0) -> Case:
    """Absorbed queries of its decode."""

    def sglang(s: Set) -> None:
        s.out = sgl("elementwise").concat_mla_absorb_q(s.a, s.b)

    return Case(
        "concat_mla_absorb_q", f"T={tokens} H=128 512+64", tokens * 128 * 576 * 4,
        lambda: Set(a=randn(tokens, 128, 512), b=randn(tokens, 128, 64),
                    out=poison(tokens, 128, 576)),
        lambda s, b: opmux.concat_mla_absorb_q(s.a, s.b, out=s.out, backend=b), lambda s: (s.out,),
        {
            "vllm": lambda s: OPS._C_cache_ops.concat_mla_q(s.a, s.b, s.out),
            "sglang": sglang,
        }, goal=goal,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """Yield the family's cases."""
    yield merge(4096, 64, 128)
    yield concat_k(8192)
    yield concat_q(128)
    yield concat_q(1024, LARGE)

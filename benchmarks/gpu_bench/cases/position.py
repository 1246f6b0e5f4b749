# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding, alone and with the norm of the heads and the write to the cache."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

import opmux

from .. import case as on
from ..case import BF16, F32, FP8, LARGE, Case, Set, Way, poison, randint, randn
from ..peers import compiled, fi, sgl

OPS, EPS, BASE, LENGTH, DIM = torch.ops, 1e-6, 10000.0, 8192, 128
Q, K = 64, 8  # heads: Llama 3 70B


@cache
def cos_sin() -> Tensor:
    """Return the cache of a base of 10000, float32; every layer of a model reads the same one."""
    frequency = BASE ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    angle = torch.outer(torch.arange(LENGTH, dtype=torch.float64), frequency)
    return torch.cat((angle.cos(), angle.sin()), -1).to(F32).to(on.device)


@cache
def rounded() -> Tensor:
    """Return it as peers of vLLM's line take it."""
    return cos_sin().to(BF16)


def eager(positions: Tensor, query: Tensor, key: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    """Torch, out of place, so that the compiler may fuse it."""
    cos, sin = cache[positions].to(query.dtype)[:, None].chunk(2, -1)

    def turn(x: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (-1, DIM)).chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)

    return turn(query), turn(key)


def turned(way: Way) -> Way:
    """Store what a run returns as query and key."""

    def run(s: Set) -> None:
        s.q_out, s.k_out = way(s)

    return run


def rope(tokens: int, goal: float = 0.0) -> Case:
    """Query and key, in place. Peers of vLLM's line take the cache in the dtype of the query."""

    def make() -> Set:
        return Set(q=randn(tokens, Q * DIM), k=randn(tokens, K * DIM), cache=cos_sin(),
                   own=rounded(), at=randint(LENGTH, tokens, dtype=torch.int64),
                   q_out=None, k_out=None)  # fmt: skip

    return Case(
        "rotary_embedding", f"T={tokens} {Q}/{K} d={DIM}",
        tokens * (4 * (Q + K) * DIM + 8) + min(tokens, LENGTH) * DIM * 4, make,
        lambda s, b: opmux.rotary_embedding(s.at, s.q, s.k, DIM, s.cache, backend=b),
        lambda s: (s.q, s.k) if s.q_out is None else (s.q_out, s.k_out),
        {
            "vllm": lambda s: OPS._C.rotary_embedding(s.at, s.q, s.k, DIM, s.own, True),
            "sglang": lambda s: sgl("elementwise").rotary_embedding(
                s.at, s.q, s.k, DIM, s.own, True),
            "flashinfer": lambda s: fi("rope").apply_rope_with_cos_sin_cache_inplace(
                s.at, s.q, s.k, DIM, s.cache, True),
            "torch": turned(lambda s: eager(s.at, s.q, s.k, s.cache)),
            "compile": turned(lambda s: compiled(eager)(s.at, s.q, s.k, s.cache)),
        }, goal=goal,
    )  # fmt: skip


def mrope(tokens: int) -> Case:
    """Sections of Qwen2-VL."""
    return Case(
        "mrope", f"T={tokens} {Q}/{K} d={DIM} sections 16/24/24",
        tokens * (4 * (Q + K) * DIM + 24) + min(tokens, LENGTH) * DIM * 4,
        lambda: Set(q=randn(tokens, Q * DIM), k=randn(tokens, K * DIM), cache=cos_sin(),
                    at=randint(LENGTH, 3, tokens, dtype=torch.int64)),
        lambda s, b: opmux.mrope(s.at, s.q, s.k, DIM, s.cache, 16, 24, 24, backend=b),
        lambda s: (s.q, s.k), goal=LARGE,
    )  # fmt: skip


def _qkv(tokens: int, **more: Tensor) -> Set:
    at = randint(LENGTH, tokens, dtype=torch.int64)
    return Set(qkv=randn(tokens, (Q + 2 * K) * DIM), qw=randn(DIM), kw=randn(DIM), cache=cos_sin(),
               own=rounded(), at=at, at32=at.int(), **more)  # fmt: skip


def _vllm(s: Set) -> None:
    OPS._C.fused_qk_norm_rope(s.qkv, Q, K, K, DIM, EPS, s.qw, s.kw, s.own, True, s.at, -1)


def _sglang(s: Set) -> None:
    sgl("moe").fused_qk_norm_rope(
        s.qkv, Q, K, K, DIM, EPS, s.qw, s.kw, BASE, True, s.at32, 1.0, 1.0, 1.0, 1.0, DIM
    )


def normed(tokens: int) -> Case:
    """Norm of the heads and rope, in place; the values stay."""
    return Case(
        "fused_qk_norm_rope", f"T={tokens} {Q}/{K}/{K} d={DIM}",
        tokens * (4 * (Q + K) * DIM + 8) + LENGTH * DIM * 4, lambda: _qkv(tokens),
        lambda s, b: opmux.fused_qk_norm_rope(
            s.qkv, Q, K, K, DIM, EPS, s.qw, s.kw, s.cache, True, s.at, backend=b),
        lambda s: (s.qkv,), {"vllm": _vllm, "sglang": _sglang}, bound=2e-2, goal=0.90,
    )  # fmt: skip


def stored(tokens: int, goal: float) -> Case:
    """The same and the write to the cache; vLLM takes two kernels for it."""

    def make() -> Set:
        pages = (poison(tokens // 16, 16, K, DIM) for _ in range(2))
        slots = torch.randperm(tokens, device=on.device)
        one = torch.ones((), device=on.device)
        return _qkv(tokens, kc=next(pages), vc=next(pages), slots=slots, one=one)

    def two(s: Set) -> None:
        _vllm(s)
        _, k, v = s.qkv.split([Q * DIM, K * DIM, K * DIM], -1)
        OPS._C_cache_ops.reshape_and_cache_flash(
            k.unflatten(-1, (K, DIM)), v.unflatten(-1, (K, DIM)), s.kc, s.vc, s.slots,
            "auto", s.one, s.one,
        )  # fmt: skip

    return Case(
        "fused_qk_norm_rope_store_kv", f"T={tokens} {Q}/{K}/{K} d={DIM}",
        tokens * (4 * (Q + 2 * K) * DIM + 16) + LENGTH * DIM * 4, make,
        lambda s, b: opmux.fused_qk_norm_rope_store_kv(
            s.qkv, s.kc.flatten(0, 1), s.vc.flatten(0, 1), s.slots, Q, K, K, DIM, EPS,
            s.qw, s.kw, s.cache, True, s.at, backend=b),
        lambda s: (s.qkv[:, : Q * DIM], s.kc, s.vc), {"vllm": two}, bound=2e-2, goal=goal,
    )  # fmt: skip


def store(tokens: int, dtype: torch.dtype, goal: float = 0.0) -> Case:
    """A prefill's keys and values to pages of 16 in random order."""
    fp8 = dtype == FP8

    def make() -> Set:
        pages = torch.randperm(max(1, tokens // 16), device=on.device)
        at = torch.arange(tokens, device=on.device)
        caches = [poison(len(pages), 16, K, DIM, dtype=dtype) for _ in range(2)]
        return Set(
            k=randn(tokens, K, DIM), v=randn(tokens, K, DIM), kc=caches[0], vc=caches[1],
            slots=pages[at // 16] * 16 + at % 16, one=torch.ones((), device=on.device),
            batch=torch.zeros_like(at).int(), at=at.int(), pages=pages.int(),
            indptr=torch.tensor([0, len(pages)], device=on.device, dtype=torch.int32),
            last=torch.tensor([16], device=on.device, dtype=torch.int32),
        )  # fmt: skip

    def ours(s: Set, b: str | None) -> None:
        opmux.store_kv_cache(s.kc.flatten(0, 1), s.vc.flatten(0, 1), s.slots, s.k, s.v, backend=b)

    def vllm(s: Set) -> None:
        caches = (c.view(torch.uint8) if fp8 else c for c in (s.kc, s.vc))
        OPS._C_cache_ops.reshape_and_cache_flash(
            s.k, s.v, *caches, s.slots, "fp8" if fp8 else "auto", s.one, s.one
        )

    peers: dict[str, Way] = {"vllm": vllm}
    if not fp8:
        peers["flashinfer"] = lambda s: fi("page").append_paged_kv_cache(
            s.k, s.v, s.batch, s.at, (s.kc, s.vc), s.pages, s.indptr, s.last
        )
    name = "bf16 to fp8" if fp8 else "bf16"
    return Case(
        "store_kv_cache", f"T={tokens} {K}x{DIM} {name}",
        2 * tokens * K * DIM * (3 if fp8 else 4) + 8 * tokens, make, ours,
        lambda s: (s.kc, s.vc), peers, goal=goal,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """Yield the family's cases."""
    yield rope(1)
    yield rope(8192, LARGE)
    yield mrope(8192)
    yield normed(8192)
    yield stored(8192, 0.90)
    yield store(64, BF16)
    yield store(8192, BF16, 0.90)
    yield store(8192, FP8, 0.90)

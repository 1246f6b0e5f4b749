# SPDX-License-Identifier: Apache-2.0
"""Sampling from a vocabulary of 128256, and grammar."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import opmux

from .. import case as on
from ..case import BF16, F32, Case, Ours, Set, Way, poison, randint, randn, wrong
from ..peers import compiled, fi, sgl
from .activation import keep

OPS, V, I32 = torch.ops, 128256, torch.int32


def probabilities(rows: int, spread: float = 3.0) -> Tensor:
    """Softmax of normal logits: about 3 is a language model's spread, 0.5 nearly flat."""
    return torch.softmax(randn(rows, V, dtype=F32) * spread, -1)


def eager_sample(probs: Tensor, k: int, p: float, uniform: Tensor) -> Tensor:
    """Sort-based top-k and top-p, as inference engines do it in torch."""
    ordered, index = probs.sort(-1, descending=True)
    if k:
        ordered = ordered.masked_fill(torch.arange(V, device=probs.device) >= k, 0.0)
    running = ordered.cumsum(-1)
    total = running[:, -1:]
    kept = ordered.masked_fill(running - ordered > p * total, 0.0).cumsum(-1)
    place = torch.searchsorted(kept, uniform[:, None] * kept[:, -1:])
    return index.gather(-1, place.clamp(max=V - 1)).squeeze(-1).int()


def eager_top_p(probs: Tensor, p: float) -> Tensor:
    """Sort-based nucleus."""
    ordered, index = probs.sort(-1, descending=True)
    kept = ordered.masked_fill(ordered.cumsum(-1) - ordered > p, 0.0)
    return torch.zeros_like(probs).scatter_(-1, index, kept / kept.sum(-1, keepdim=True))


def eager_top_k(probs: Tensor, k: int) -> Tensor:
    """Top-k by its threshold."""
    kept = probs.masked_fill(probs < probs.topk(k, -1).values[:, -1:], 0.0)
    return kept / kept.sum(-1, keepdim=True)


def sampled(name: str, make: Way, ours: Ours, kept: Way, peers: dict[str, Way], rows: int,
            goal_us: float = 0.0) -> Case:  # fmt: skip
    """Return a case that draws tokens.

    Peers draw by random numbers of their own: a token is right when it is one of those that the
    filters keep; ours must be the reference's but for rounding.
    """
    op = name.split(maxsplit=1)[0]

    def error(actual: Set, expected: Set) -> float:
        allowed = kept(expected).gather(-1, actual.out.long().clamp_min(0)[:, None])
        share = wrong((allowed <= 0) | (actual.out < 0)[:, None])
        return share if actual.peer else share + 0.1 * wrong(actual.out != expected.out)

    return Case(
        op, name.removeprefix(op).strip(), 4 * rows * V, lambda: make(Set()),
        ours, lambda s: (s.out,), peers, error=error, bound=0.05, goal_us=goal_us,
    )  # fmt: skip


def drawn(way: Way) -> Way:
    """Store what a peer draws."""

    def run(s: Set) -> None:
        s.out, s.peer = way(s), True

    return run


def _rows(rows: int, spread: float) -> Set:
    return Set(x=probabilities(rows, spread), u=torch.rand(rows, device=on.device),
               out=poison(rows, dtype=I32), peer=False)  # fmt: skip


def top_k_top_p(rows: int, k: int, p: float, goal_us: float = 0.0, spread: float = 3.0) -> Case:
    """Draw among the k likeliest and inside the nucleus; k = 0 is the nucleus alone."""

    def flashinfer(s: Set) -> Any:
        sampling = fi("sampling")
        if k == 0:
            return sampling.top_p_sampling_from_probs(s.x, p, seed=1, offset=0)
        return sampling.top_k_top_p_sampling_from_probs(s.x, k, p, seed=1, offset=0)

    def joint(s: Set) -> Any:
        return fi("sampling").top_k_top_p_sampling_from_probs(
            s.x, k, p, filter_apply_order="joint", seed=1, offset=0
        )

    def kept(s: Set) -> Tensor:
        # One rounding more than p: a peer's threshold may be one value below.
        first = opmux.top_k_renorm_prob(s.x, k, backend="reference")
        return opmux.top_p_renorm_prob(first, p + 1e-4, backend="reference")

    peers: dict[str, Way] = {
        "flashinfer": drawn(flashinfer),
        "torch": drawn(lambda s: eager_sample(s.x, k, p, s.u)),
    }
    if k:
        peers["flashinfer joint"] = drawn(joint)
    return sampled(
        f"top_k_top_p_sample B={rows} V={V} k={k} p={p} spread={spread}",
        lambda _: _rows(rows, spread),
        lambda s, b: opmux.top_k_top_p_sample(s.x, k, p, s.u, out=s.out, backend=b),
        kept, peers, rows, goal_us,
    )  # fmt: skip


def min_p(rows: int, p: float = 0.05) -> Case:
    """Draw near the maximum."""
    return sampled(
        f"min_p_sample B={rows} V={V} p={p}", lambda _: _rows(rows, 3.0),
        lambda s, b: opmux.min_p_sample(s.x, p, s.u, out=s.out, backend=b),
        lambda s: s.x.where(s.x >= 0.9999 * p * s.x.amax(-1, keepdim=True), 0.0),
        {"flashinfer": drawn(
            lambda s: fi("sampling").min_p_sampling_from_probs(s.x, p, seed=1, offset=0))},
        rows,
    )  # fmt: skip


def renorm(filtered: str, rows: int, value: float, spread: float = 3.0) -> Case:
    """Renormalised top-k or top-p."""
    name = f"{filtered}_renorm_prob"
    amount = int(value) if filtered == "top_k" else value
    eager: Any = eager_top_k if filtered == "top_k" else eager_top_p
    return Case(
        name, f"B={rows} V={V} {filtered[-1]}={amount} spread={spread}", 8 * rows * V,
        lambda: Set(x=probabilities(rows, spread), out=poison(rows, V, dtype=F32)),
        lambda s, b: getattr(opmux, name)(s.x, amount, out=s.out, backend=b),
        lambda s: (s.out,),
        {
            "sglang": keep(lambda s: getattr(sgl("sampling"), f"{filtered}_renorm_probs")(
                s.x, amount)),
            "flashinfer": keep(lambda s: getattr(fi("sampling"), f"{filtered}_renorm_probs")(
                s.x, amount)),
            "torch": keep(lambda s: eager(s.x, amount)),
        }, bound=2e-2,
    )  # fmt: skip


def bitmask(rows: int, goal: float = 0.0) -> Case:
    """Grammar mask of random bits; bfloat16 logits, each read and written."""

    def eager(x: Tensor, mask: Tensor) -> Tensor:
        bits = torch.arange(32, device=x.device, dtype=I32)
        allowed = ((mask[:, :, None] >> bits) & 1).flatten(1)[:, : x.shape[1]].bool()
        return x.masked_fill(~allowed, float("-inf"))

    def inplace(way: Way) -> Way:
        def run(s: Set) -> None:
            s.y = way(s)

        return run

    words = (V + 31) // 32
    return Case(
        "apply_token_bitmask", f"B={rows} V={V} bf16", rows * (4 * V + 4 * words),
        lambda: Set(x=randn(rows, V), y=None, mask=torch.randint(
            -(2**31), 2**31 - 1, (rows, words), device=on.device, dtype=I32)),
        lambda s, b: opmux.apply_token_bitmask(s.x, s.mask, backend=b),
        lambda s: (s.x if s.y is None else s.y,),
        {
            "sglang": lambda s: sgl("grammar").apply_token_bitmask_inplace_cuda(s.x, s.mask),
            "torch": inplace(lambda s: eager(s.x, s.mask)),
            "compile": inplace(lambda s: compiled(eager)(s.x, s.mask)),
        }, goal=goal,
    )  # fmt: skip


def penalties(rows: int) -> Case:
    """Repetition alone, which is what vLLM's kernel does; it reads flags where we read counts."""

    def make() -> Set:
        counts = randint(20, rows, V).sub_(18).clamp_min_(0)
        penalty = 1 + torch.rand(rows, device=on.device)
        return Set(x=randn(rows, V), counts=counts, flags=counts > 0, penalty=penalty,
                   own=penalty.to(BF16), prompt=randint(50, rows, V) == 0)  # fmt: skip

    return Case(
        "apply_penalties", f"B={rows} V={V} bf16 repetition", rows * V * 9, make,
        lambda s, b: opmux.apply_penalties(
            s.x, s.counts, s.penalty, prompt_mask=s.prompt, backend=b),
        lambda s: (s.x,),
        {"vllm": lambda s: OPS._C.apply_repetition_penalties_(
            s.x, s.prompt, s.flags, s.own)},
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """Yield the family's cases."""
    yield top_k_top_p(1, 50, 0.9)
    yield top_k_top_p(64, 50, 0.9, 30.0)
    yield top_k_top_p(256, 0, 0.9, 90.0)
    yield top_k_top_p(64, 0, 0.9, spread=0.5)
    yield min_p(64)
    yield renorm("top_k", 1, 50)
    yield renorm("top_k", 128, 50)
    yield renorm("top_p", 1, 0.9)
    yield renorm("top_p", 128, 0.9)
    yield renorm("top_p", 128, 0.9, 0.5)
    yield bitmask(64)
    yield bitmask(128, 0.75)
    yield penalties(64)

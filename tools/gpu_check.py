# SPDX-License-Identifier: Apache-2.0
"""Everything that a CUDA wheel must show on a GPU, in one command; installs nothing.

Unpack the wheels of opmux and opmux-cuda (and pluggy) into a folder and run

    PYTHONPATH=FOLDER python tools/gpu_check.py [--out DIR]

It runs the conformance kit for the backend (graph capture and side streams are part of it), then
times the ops beside torch: cold L2 by rotating inputs, graph replays, interleaved medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import opmux

BACKEND = "cuda"
COLD = 256 << 20  # bytes that a rotation goes through: several times the L2
ROUNDS = 7
Run = Callable[[], Any]


@dataclass
class Case:
    """One shape of one op: bytes that it must move, and ways to make a call on fresh tensors."""

    name: str
    bytes: int
    ours: Callable[[], Run]
    theirs: Callable[[], Run] | None = None


def bf16(*shape: int) -> Tensor:
    """Return random bfloat16 values on the GPU."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def silu(tokens: int, d: int) -> Case:
    """SwiGLU."""

    def ours() -> Run:
        x, out = bf16(tokens, 2 * d), bf16(tokens, d)
        return lambda: opmux.silu_and_mul(x, out=out, backend=BACKEND)

    def theirs() -> Run:
        x = bf16(tokens, 2 * d)
        return lambda: F.silu(x[:, :d]) * x[:, d:]

    return Case(f"silu_and_mul T={tokens} d={d}", 6 * tokens * d, ours, theirs)


def gelu(tokens: int, d: int) -> Case:
    """GEGLU by erf, the activation with the most arithmetic."""

    def ours() -> Run:
        x, out = bf16(tokens, 2 * d), bf16(tokens, d)
        return lambda: opmux.gelu_and_mul(x, out=out, backend=BACKEND)

    return Case(f"gelu_and_mul T={tokens} d={d}", 6 * tokens * d, ours)


def rmsnorm(tokens: int, h: int) -> Case:
    """RMS norm."""

    def ours() -> Run:
        x, w, out = bf16(tokens, h), bf16(h), bf16(tokens, h)
        return lambda: opmux.rmsnorm(x, w, out=out, backend=BACKEND)

    def theirs() -> Run:
        x, w = bf16(tokens, h), bf16(h)
        return lambda: F.rms_norm(x, (h,), w, 1e-6)

    return Case(f"rmsnorm T={tokens} h={h}", 4 * tokens * h, ours, theirs)


def add_rmsnorm(tokens: int, h: int) -> Case:
    """Residual addition and RMS norm."""

    def ours() -> Run:
        x, r, w = bf16(tokens, h), bf16(tokens, h), bf16(h)
        return lambda: opmux.fused_add_rmsnorm(x, r, w, backend=BACKEND)

    def theirs() -> Run:
        x, r, w = bf16(tokens, h), bf16(tokens, h), bf16(h)
        return lambda: F.rms_norm(r.add_(x), (h,), w, 1e-6)

    return Case(f"fused_add_rmsnorm T={tokens} h={h}", 8 * tokens * h, ours, theirs)


def rope(tokens: int) -> Case:
    """Rotary embedding of 64 query and 8 key heads."""

    def ours() -> Run:
        q, k = bf16(tokens, 64 * 128), bf16(tokens, 8 * 128)
        cache = torch.randn(8192, 128, device="cuda")
        positions = torch.arange(tokens, device="cuda") % 8192
        return lambda: opmux.rotary_embedding(positions, q, k, 128, cache, backend=BACKEND)

    return Case(f"rotary_embedding T={tokens} 64/8 d=128", 4 * tokens * 72 * 128, ours)


def kv_store(tokens: int) -> Case:
    """Scatter of 8 heads into the cache."""

    def ours() -> Run:
        k, v = bf16(tokens, 8, 128), bf16(tokens, 8, 128)
        caches = bf16(2 * tokens, 8, 128), bf16(2 * tokens, 8, 128)
        slots = torch.randperm(2 * tokens, device="cuda")[:tokens]
        return lambda: opmux.store_kv_cache(*caches, slots, k, v, backend=BACKEND)

    return Case(f"store_kv_cache T={tokens} 8x128", 8 * tokens * 8 * 128, ours)


def bitmask(rows: int, size: int = 128256) -> Case:
    """Grammar mask with random bits."""

    def ours() -> Run:
        logits = bf16(rows, size)
        mask = torch.randint(-(2**31), 2**31 - 1, (rows, (size + 31) // 32), device="cuda",
                             dtype=torch.int32)  # fmt: skip
        return lambda: opmux.apply_token_bitmask(logits, mask, backend=BACKEND)

    return Case(f"apply_token_bitmask B={rows} V={size}", 4 * rows * size, ours)


def probs(rows: int, size: int, scale: float) -> Tensor:
    """Softmax of normal logits: about 3 is a language model's spread, 0.5 nearly flat."""
    return torch.softmax(torch.randn(rows, size, device="cuda") * scale, -1)


def top_k_top_p(rows: int, k: int, p: float, scale: float = 3.0, size: int = 128256) -> Case:
    """Sample a token."""

    def ours() -> Run:
        x, u = probs(rows, size, scale), torch.rand(rows, device="cuda")
        out = torch.empty(rows, device="cuda", dtype=torch.int32)
        return lambda: opmux.top_k_top_p_sample(x, k, p, u, out=out, backend=BACKEND)

    name = f"top_k_top_p_sample B={rows} V={size} k={k} p={p} spread={scale}"
    return Case(name, 4 * rows * size, ours)


def top_p_renorm(rows: int, scale: float = 3.0, size: int = 128256) -> Case:
    """Nucleus."""

    def ours() -> Run:
        x = probs(rows, size, scale)
        out = torch.empty_like(x)
        return lambda: opmux.top_p_renorm_prob(x, 0.9, out=out, backend=BACKEND)

    return Case(f"top_p_renorm_prob B={rows} V={size} spread={scale}", 8 * rows * size, ours)


def top_k_renorm(rows: int, size: int = 128256) -> Case:
    """The k largest."""

    def ours() -> Run:
        x = probs(rows, size, 3.0)
        out = torch.empty_like(x)
        return lambda: opmux.top_k_renorm_prob(x, 50, out=out, backend=BACKEND)

    return Case(f"top_k_renorm_prob B={rows} V={size}", 8 * rows * size, ours)


def min_p(rows: int, size: int = 128256) -> Case:
    """Sample near the maximum."""

    def ours() -> Run:
        x, u = probs(rows, size, 3.0), torch.rand(rows, device="cuda")
        out = torch.empty(rows, device="cuda", dtype=torch.int32)
        return lambda: opmux.min_p_sample(x, 0.05, u, out=out, backend=BACKEND)

    return Case(f"min_p_sample B={rows} V={size}", 4 * rows * size, ours)


def cases() -> Iterator[Case]:
    """Yield the cases whose op the backend serves."""
    made = [
        *(silu(t, 14336) for t in (1, 16, 64, 4096)), silu(8192, 28672), gelu(4096, 14336),
        *(rmsnorm(t, 8192) for t in (1, 64, 4096)), rmsnorm(8192, 5120), rmsnorm(8192, 7168),
        rmsnorm(8192 * 72, 128),
        *(add_rmsnorm(t, 7168) for t in (1, 16, 8192)), add_rmsnorm(8192, 8192),
        rope(1), rope(8192), kv_store(64), kv_store(8192), bitmask(64), bitmask(128),
        *(top_k_top_p(b, 50, 0.9) for b in (1, 64, 256)), top_k_top_p(64, 0, 0.9),
        top_k_top_p(64, 0, 0.9, 0.5),
        top_k_renorm(1), top_k_renorm(128),
        *(top_p_renorm(b) for b in (1, 128, 256)), top_p_renorm(128, 0.5),
        min_p(64),
    ]  # fmt: skip
    served = next(b for b in opmux.load().backends if b.name == BACKEND).backend.kernels
    yield from (case for case in made if case.name.split()[0] in served)


def captured(make: Callable[[], Run], bytes_moved: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """Capture enough calls on tensors of their own that none finds its input in the L2."""
    count = max(2, min(64, -(-COLD // bytes_moved)))
    runs = [make() for _ in range(count)]
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run() for run in runs]  # noqa: F841 - results stay alive as long as the capture
    return graph, count


def once(graph: torch.cuda.CUDAGraph, count: int) -> float:
    """Return microseconds a call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    repeats = 3
    begin.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1000 / (count * repeats)


def measure(case: Case) -> list[float]:
    """Return the medians of ours and, where there is one, of torch's, in interleaved rounds."""
    made = [captured(way, case.bytes) for way in (case.ours, case.theirs) if way is not None]
    times: list[list[float]] = [[] for _ in made]
    for _ in range(ROUNDS):
        for place, (graph, count) in enumerate(made):
            times[place].append(once(graph, count))
    return [statistics.median(t) for t in times]


def copy_rate() -> float:
    """Return bytes a second of a large copy, read and written."""
    source = torch.randint(0, 255, (1 << 30,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    case = Case("copy", 2 << 30, lambda: lambda: target.copy_(source))
    return case.bytes / measure(case)[0] * 1e6


def conformance(out: Path, extra: list[str]) -> int:
    """Run the kit; return its exit status."""
    config = out / "pytest.ini"
    config.write_text("[pytest]\n", encoding="utf-8")
    command = [
        sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider",
        "-c", str(config),
        "--pyargs", "opmux.conformance", "--opmux-backend", BACKEND,
        "--opmux-report", str(out / "conformance.json"), *extra,
    ]  # fmt: skip
    return subprocess.run(command, check=False, env={**os.environ}).returncode


def timings(out: Path, only: str) -> None:
    """Print and write the table."""
    rate = copy_rate()
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, copy {rate / 1e12:.2f} TB/s (read + written)")
    print(f"{'case':58} {'us':>8} {'floor':>8} {'of floor':>8} {'torch us':>9}")
    rows = []
    for case in cases():
        if only not in case.name:
            continue
        ours, *theirs = measure(case)
        floor = case.bytes / rate * 1e6
        torch_us = f"{theirs[0]:9.2f}" if theirs else ""
        print(f"{case.name:58} {ours:8.2f} {floor:8.2f} {floor / ours:8.2f} {torch_us}", flush=True)
        rows.append({"case": case.name, "us": ours, "floor_us": floor,
                     "torch_us": theirs[0] if theirs else None})  # fmt: skip
        torch.cuda.empty_cache()
    result = {"device": name, "torch": torch.__version__, "copy_bytes_per_s": rate, "cases": rows}
    (out / "timings.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu_check"))
    parser.add_argument("--no-conformance", action="store_true")
    parser.add_argument("--no-timings", action="store_true")
    parser.add_argument("--only", default="", help="time the cases whose name contains this")
    args, extra = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for failure in opmux.failures():
        print("not loaded:", failure)
    status = 0 if args.no_conformance else conformance(args.out, extra)
    if not args.no_timings:
        timings(args.out, args.only)
    sys.exit(status)


if __name__ == "__main__":
    main()

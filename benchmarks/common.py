# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: interleaved timing, and results that say where they come from."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import opmux

RESULTS = Path(__file__).parent / "results"


def interleaved(
    variants: Mapping[str, Callable[[], Any]], rounds: int = 9, at_least: float = 0.05
) -> dict[str, float]:
    """Return the median seconds of one call of each variant, rounds taken in turn A B C A B C.

    A round repeats a call until it lasts ``at_least`` seconds, so that the clock does not matter.
    """
    repeats = {}
    for name, call in variants.items():
        call()
        start = time.perf_counter()
        call()
        once = max(time.perf_counter() - start, 1e-8)
        repeats[name] = max(1, int(at_least / once))
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            taken[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(values) for name, values in taken.items()}


def cpu_name() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def commit() -> str:
    """Return the commit that is measured, with ``+`` when the tree differs from it."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + (
        "+" if git("diff", "HEAD", "--stat") else ""
    )


def provenance() -> dict[str, Any]:
    """Return device, versions and commit."""
    registry = opmux.load()
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "opmux": opmux.__version__,
        "backends": {b.name: {"version": b.version, **b.info} for b in registry.backends},
        "commit": commit(),
    }


def record(name: str, figures: Any) -> Path:
    """Write figures with their provenance to benchmarks/results/NAME.json."""
    path = RESULTS / f"{name}.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps({**provenance(), "figures": figures}, indent=2) + "\n")
    return path

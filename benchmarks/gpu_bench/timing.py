# SPDX-License-Identifier: Apache-2.0
"""Time on the GPU: graph replays over cold inputs, in rounds that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .case import Set, Way

COLD = 256 << 20  # bytes that pass before an input comes again: four times the L2 of an H200
MOST_SETS = 512
SPAN_US = 800.0  # work in one graph, so that its start does not matter
AHEAD = 800_000  # cycles that the GPU spins while the host enqueues a measurement


def sets_for(size: int) -> int:
    """Return how many sets of inputs a case of this many bytes rotates through."""
    return max(2, min(MOST_SETS, -(-COLD // size)))


class Flush:
    """Pushes everything out of the L2 by reading, which leaves nothing to be written back."""

    def __init__(self) -> None:
        self.data = torch.randint(0, 100, (COLD // 4,), device="cuda", dtype=torch.int32)

    def __call__(self) -> None:
        """Read."""
        self.data.sum(dtype=torch.int32)


@dataclass
class Captured:
    """A graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    sets: list[Set]


def capture(way: Way, sets: Sequence[Set], calls: int) -> Captured:
    """Capture ``calls`` runs, over the sets in turn.

    A way may put fresh tensors into its set, so each has sets of its own that share the inputs:
    what another graph writes must not be freed.
    """
    own = [Set(**vars(s)) for s in sets]
    for s in own[:3]:
        way(s)
    torch.cuda.synchronize()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        graph.capture_begin()
        try:
            for i in range(calls):
                way(own[i % len(own)])
        finally:
            graph.capture_end()
    graph.replay()
    torch.cuda.synchronize()
    return Captured(graph, own)


def between(work: Callable[[], Any], flush: Flush | None) -> float:
    """Return microseconds of device time of enqueued work."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if flush is not None:
        flush()
    torch.cuda._sleep(AHEAD)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1000


def measure(
    ways: Mapping[str, Way], sets: Sequence[Set], size: int, floor_us: float, rounds: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the median microseconds of each way, and why others could not be captured."""
    rotated = len(sets) * size >= COLD
    passes = max(1, int(SPAN_US / (len(sets) * (floor_us + 1.5)))) if rotated else 1
    flush = None if rotated else Flush()
    graphs: dict[str, Captured] = {}
    failed: dict[str, str] = {}
    for name, way in ways.items():
        try:
            graphs[name] = capture(way, sets, passes * len(sets))
        except Exception as error:
            failed[name] = f"not captured: {error}".splitlines()[0]
    taken: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, captured in graphs.items():
            taken[name].append(between(captured.graph.replay, flush) / (passes * len(sets)))
    return {name: statistics.median(t) for name, t in taken.items()}, failed


def copy_rate() -> float:
    """Return bytes a second, read and written, of a large eager copy.

    Eager, because a copy that is captured becomes a memcpy node, which a graph runs at two thirds
    of the rate.
    """
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    target.copy_(source)
    taken = [between(lambda: target.copy_(source), None) for _ in range(9)]
    return 2 * source.nbytes / statistics.median(taken) * 1e6


def empty_kernel_us(rounds: int = 7, calls: int = 512) -> float:
    """Return what a kernel that does nothing takes inside a graph, with a block on every SM."""
    kernel = torch.cuda._compile_kernel('extern "C" __global__ void empty() {}', "empty")
    blocks = torch.cuda.get_device_properties().multi_processor_count

    def run(_: Set) -> None:
        kernel(grid=(blocks, 1, 1), block=(256, 1, 1))

    graph = capture(run, [Set()], calls).graph
    return statistics.median(between(graph.replay, None) / calls for _ in range(rounds))


def host_us(calls: Mapping[str, Callable[[], Any]], rounds: int = 31) -> dict[str, float]:
    """Return the median microseconds of host time of a call, the device never behind."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    repeats = 200  # far below the launches that a stream queues before the host waits
    for _ in range(rounds):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            taken[name].append((time.perf_counter() - start) / repeats * 1e6)
    return {name: statistics.median(t) for name, t in taken.items()}

# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark, as far as a host without a GPU can tell: cases, checks, joins, report."""

from __future__ import annotations

import importlib
import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = 3_000_000  # bytes of the cases that are run on the CPU


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """Return benchmarks/gpu.py, its cases on the CPU."""
    sys.path.insert(0, str(BENCHMARKS))
    case = importlib.import_module("gpu_bench.case")
    case.device = "cpu"
    yield importlib.import_module("gpu")
    sys.path.remove(str(BENCHMARKS))


def test_every_case_has_a_name_of_its_own_and_moves_bytes(bench: Any) -> None:
    cases = list(bench.everything())
    assert len({case.name for case in cases}) == len(cases)
    assert all(case.bytes > 0 and "opmux" in case.ways(None) for case in cases)


def test_small_cases_pass_as_they_are_and_fail_poisoned(bench: Any) -> None:
    torch.manual_seed(0)
    for case in bench.everything():
        if case.bytes > SMALL:
            continue
        fresh = case.make()
        expected = bench.clone(fresh)
        case.ours(expected, "reference")
        for name, way in case.ways(None).items():
            if name in ("opmux", "torch"):  # the peers that this host has
                got = bench.clone(fresh)
                way(got)
                assert case.difference(got, expected) <= case.bound, (case.name, name)
        assert not case.difference(bench.clone(fresh), expected) <= case.bound, case.name


def test_packed_scales_mean_the_same(bench: Any) -> None:
    from gpu_bench.cases import activation

    for packed in (False, True):
        case = activation.quantised(12, 1024, packed)
        s = case.make()
        case.ours(s, "reference")
        gate, up = s.x.float().chunk(2, -1)
        exact = torch.nn.functional.silu(gate) * up
        error = (case.results(s)[0] - exact).norm() / exact.norm()
        assert error < 2**-5  # e4m3 has three bits of mantissa


def row(case: str, us: dict[str, float], **more: Any) -> dict[str, Any]:
    base = {"case": case, "op": case, "bytes": 4_000_000, "floor_us": 1.0, "goal": 0.0,
            "goal_us": 0.0, "failed": {}, "us": us}  # fmt: skip
    return base | more


def test_ratios_stay_within_a_process(bench: Any) -> None:
    rows = [
        row("a", {"opmux": 2.0, "vllm": 3.0, "sglang 0.4.6": 5.0}, goal=0.5),
        row("a", {"opmux": 4.0, "sglang 0.4.2": 5.0, "flashinfer": 4.8}),
        row("b", {"opmux": 2.0, "vllm": 1.0}, failed={"flashinfer": "wrong by 1"}),
        row("c", {"vllm": 1.0}),
    ]
    a, b, c = bench.report.merge(rows)
    assert a["ratio"] == {
        "vllm": 1.5, "sglang 0.4.6": 2.5, "sglang 0.4.2": 1.25, "flashinfer": 1.2,
    }  # fmt: skip
    assert (a["best_peer"], a["x_best"], a["x_sglang"]) == ("flashinfer", 1.2, 1.25)
    assert (b["x_best"], b["met"], b["failed"]) == (0.5, False, {"flashinfer": "wrong by 1"})
    assert (c["opmux_us"], c["met"], c["x_best"]) == (None, None, None)
    summary = bench.report.summary([a, b, c])
    assert summary["x_best_peer_geometric_mean"] == pytest.approx(math.sqrt(1.2 * 0.5))
    assert (summary["cases_behind_a_peer"], summary["cases_not_run"]) == (1, 1)


def test_the_report_shows_every_case(bench: Any, tmp_path: Path) -> None:
    from rich.console import Console

    cases = bench.report.merge([row("a", {"opmux": 2.0, "vllm": 3.0}), row("b", {"vllm": 2.0})])
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(bench.report.table(cases, "title"))
    text = console.export_text()
    assert "vllm" in text and "b -" in text and "1.50" in text
    pytest.importorskip("matplotlib", reason="the plot is drawn by matplotlib")
    bench.report.plot(cases, 4e12, 1.0, tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_crash_costs_the_library_that_was_running(bench: Any, tmp_path: Path) -> None:
    log = bench.Log(tmp_path / "log.jsonl")
    log.add(case="a", start="opmux")
    log.add(case="a", end="opmux")
    log.add(case="a", start="vllm")
    again = bench.Log(tmp_path / "log.jsonl")
    assert again.crashed() == {"a": {"vllm"}}
    assert again.rows() == []

# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels beside every peer that serves the case, on the GPU of this host.

    PYTHONPATH=FOLDER python benchmarks/gpu.py --peers-dir DIR [--out DIR] [--only TEXT] [--quick]

FOLDER holds the unpacked wheels of opmux and opmux-cuda, DIR the peers' libraries (an archive of
them is unpacked first). A case is checked before it is timed: every library runs on the same fresh
inputs, its poisoned outputs are compared with the float32 reference. Then CUDA graphs are
replayed over inputs that no cache holds, in rounds that take turns. Libraries that cannot share a
process are measured in several, with opmux in each; a crash costs the one case of the one library.
In a graph launches follow each other as in a model's: who lets a kernel start while the one before
it ends gains by it, as the empty kernel's time, which has no such overlap, shows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import opmux
from common import RESULTS, commit
from gpu_bench import peers, report, timing
from gpu_bench.case import Case, Way, clone, randn
from gpu_bench.cases import everything

BACKEND = "cuda"


class Log:
    """Lines of JSON that outlive a crash."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def add(self, **line: Any) -> None:
        """Write at once."""
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def crashed(self) -> dict[str, set[str]]:
        """Return, by case, the libraries that were started and never came back."""
        open_: dict[tuple[str, str], bool] = {}
        for line in self.lines:
            if "start" in line:
                open_[line["case"], line["start"]] = True
            elif "end" in line:
                open_.pop((line["case"], line["end"]), None)
        found: dict[str, set[str]] = {}
        for case, name in open_:
            found.setdefault(case, set()).add(name)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Return the finished cases."""
        return [line["row"] for line in self.lines if "row" in line]


def run_case(case: Case, ways: dict[str, Way], rate: float, rounds: int, log: Log) -> None:
    """Check each way, time those that are right, write the row."""
    crashed = log.crashed().get(case.name, set())
    failed = {name: "crashed the process" for name in crashed}
    ways = {name: way for name, way in ways.items() if name not in crashed}
    fresh = case.make()
    expected = clone(fresh)
    case.ours(expected, "reference")
    torch.cuda.synchronize()
    right: dict[str, Way] = {}
    errors: dict[str, float] = {}
    for name, way in ways.items():
        log.add(case=case.name, start=name)
        try:
            got = clone(fresh)
            way(got)
            torch.cuda.synchronize()
            errors[name] = case.difference(got, expected)
            if errors[name] <= case.bound:
                right[name] = way
            else:
                failed[name] = f"wrong by {errors[name]:.3g}, allowed is {case.bound:g}"
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            _leave_if_broken(error)
        log.add(case=case.name, end=name)
    del fresh, expected
    sets = [case.make() for _ in range(timing.sets_for(case.bytes))]
    floor = case.bytes / rate * 1e6
    log.add(case=case.name, start="timing")
    taken, late = timing.measure(right, sets, case.bytes, floor, rounds)
    log.add(case=case.name, end="timing")
    log.add(row={
        "case": case.name, "op": case.op, "bytes": case.bytes, "floor_us": floor, "us": taken,
        "goal": case.goal, "goal_us": case.goal_us, "failed": failed | late, "errors": errors,
    })  # fmt: skip
    del sets
    torch.cuda.empty_cache()


def _leave_if_broken(error: Exception) -> None:
    """End a process whose CUDA context is lost; its parent starts the next one."""
    try:
        torch.cuda.synchronize()
    except Exception:
        print(error, file=sys.stderr, flush=True)
        os._exit(3)


def named(case: Case, loaded: dict[str, str]) -> dict[str, Way]:
    """Return the ways of the libraries that are there, by the library's name."""
    result: dict[str, Way] = {}
    for label, way in case.ways(BACKEND).items():
        first, _, rest = label.partition(" ")
        if label == "opmux":
            result[label] = way
        elif first in loaded:
            result[f"{loaded[first]} {rest}".strip()] = way
    return result


def host_cost(loaded: dict[str, str]) -> dict[str, float]:
    """Return microseconds of host time of one call that writes to a given output."""
    x, out = randn(1, 2048), randn(1, 1024)
    kernel = opmux.silu_and_mul.explain(x, out, backend=BACKEND).call
    bound = opmux.silu_and_mul.bind(x, out, backend=BACKEND)
    calls = {
        "opmux.silu_and_mul(x, out=out)": lambda: opmux.silu_and_mul(x, out=out),
        "opmux.silu_and_mul.bind(...)(x, out)": lambda: bound(x, out),
        "opmux, torch op": lambda: kernel(x, out),
    }
    if "sglang" in loaded:
        wrapper = peers.sgl("elementwise").silu_and_mul
        raw = torch.ops.sgl_kernel.silu_and_mul.default
        calls["sgl_kernel.silu_and_mul(x, out)"] = lambda: wrapper(x, out)
        calls["sgl_kernel, torch op"] = lambda: raw(out, x)
    if "vllm" in loaded:
        plain = torch.ops._C.silu_and_mul.default
        calls["vllm, torch op"] = lambda: plain(out, x)
    if "flashinfer" in loaded:
        flashinfer = peers.fi("activation").silu_and_mul
        calls["flashinfer.silu_and_mul(x, out)"] = lambda: flashinfer(x, out)
    return timing.host_us(calls)


def chosen(args: argparse.Namespace) -> Iterator[Case]:
    """Yield the cases that were asked for."""
    wanted = args.only.split(",")
    for case in everything():
        if any(text in case.name for text in wanted) and not (
            args.quick and not (case.goal or case.goal_us)
        ):
            yield case


def work(args: argparse.Namespace) -> None:
    """Measure one world; what is in the log already is not repeated."""
    log = Log(args.log)
    torch.manual_seed(0)
    loaded, missing = peers.load(args.worker, args.peers_dir)
    if args.list:
        print("\n".join(peers.registered(args.worker)))
        return
    if args.share:
        warm(args, loaded)
        return
    if not any("world" in line for line in log.lines):
        log.add(world=args.worker, loaded=loaded, missing=missing)
        log.add(copy=timing.copy_rate(), empty_us=timing.empty_kernel_us())
    rate = next(line["copy"] for line in log.lines if "copy" in line)
    if not args.no_host and not any(line.get("start") == "host" for line in log.lines):
        log.add(case="host", start="host")
        try:
            log.add(host_us=host_cost(loaded))
        except Exception as error:
            log.add(host_us={}, error=str(error).splitlines()[0])
        log.add(case="host", end="host")
    done = {row["case"] for row in log.rows()}
    twice = {name for name, ways in log.crashed().items() if "timing" in ways}
    for case in chosen(args):
        ways = named(case, loaded)
        if case.name in done:
            continue
        if case.name in twice:
            log.add(case_failed=case.name, error="crashed the process while it was timed")
            continue
        if len(ways) == 1 and args.worker != "vllm":  # nothing beside ours to measure here
            continue
        if time.time() > args.until:
            log.add(late=case.name)
            continue
        try:
            run_case(case, ways, rate, args.rounds, log)
        except Exception as error:
            log.add(case_failed=case.name, error=f"{error}".splitlines()[0][:300])
            _leave_if_broken(error)
            torch.cuda.empty_cache()
        if args.worker == "compile":
            peers.forget_compiled()


def warm(args: argparse.Namespace, loaded: dict[str, str]) -> None:
    """Compile a share of the cases, which leaves them in the compiler's cache on disk."""
    index, shares = map(int, args.share.split("/"))
    for case in [c for c in chosen(args) if len(named(c, loaded)) > 1][index::shares]:
        try:
            named(case, loaded)["torch.compile"](case.make())
        except Exception as error:
            print(f"{case.name}: {error}", file=sys.stderr)
        torch.cuda.empty_cache()


def unpacked(where: Path | None) -> Path | None:
    """Return the folder of the peers, out of an archive where it is one."""
    if where is None or where.is_dir():
        return where
    folder = Path(tempfile.mkdtemp(prefix="peers-"))
    with tarfile.open(where) as archive:
        archive.extractall(folder, filter="data")
    return folder


def smi(query: str) -> str:
    """Return what nvidia-smi says."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"


CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw"


def provenance(commit_: str) -> dict[str, Any]:
    """Return device, driver, versions, commit."""
    backend = next((b for b in opmux.load().backends if b.name == BACKEND), None)
    return {
        "device": torch.cuda.get_device_name(),
        "driver": smi("driver_version"),
        "clocks_before": smi(CLOCKS),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "opmux": opmux.__version__,
        "opmux_cuda": {"version": backend.version, **backend.info} if backend else None,
        "not_loaded": [str(failure) for failure in opmux.failures()],
        "peers": peers.VERSIONS,
        "commit": commit_ or commit(),
    }


def run_world(world: str, args: argparse.Namespace, log: Log) -> Log:
    """Start a process for a world, and again after each crash."""
    begin = time.time()
    command = [
        sys.executable, __file__, "--worker", world, "--log", str(log.path), "--only", args.only,
        "--rounds", str(args.rounds),
        *(["--peers-dir", str(args.peers_dir)] if args.peers_dir else []),
        *(f"--{flag.replace('_', '-')}" for flag in ("quick", "list", "no_host")
          if getattr(args, flag)),
    ]  # fmt: skip
    if world == "compile":
        few = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        shares = max(1, (os.cpu_count() or 2) // 2)
        many = [[*command, "--share", f"{i}/{shares}"] for i in range(shares)]
        for process in [subprocess.Popen(one, env=few) for one in many]:
            process.wait()
    for _ in range(20):
        # A world may use what is left, shared with those that come after it.
        remaining = max(args.until - time.time(), 1)
        until = time.time() + remaining / (len(args.worlds) - args.worlds.index(world))
        errors = log.path.with_suffix(".err")
        with errors.open("w", encoding="utf-8") as file:
            try:
                status = subprocess.run([*command, "--until", str(until)], check=False,
                                        timeout=remaining + 30, stderr=file).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                status = -1
        log = Log(log.path)
        if status == 0:
            break
        log.add(exit=status, world_=world, stderr=errors.read_text(errors="replace")[-1500:])
        if time.time() > args.until:
            break
    log.add(world_seconds=round(time.time() - begin, 1))
    return log


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    result.add_argument("--name", default="cuda-h200", help="of the files in it")
    result.add_argument("--only", default="", help="cases that contain one of these, by commas")
    result.add_argument("--peers-dir", type=Path, help="folder or archive of the peers")
    result.add_argument("--quick", action="store_true", help="only cases that have a goal")
    result.add_argument("--rounds", type=int, default=7)
    result.add_argument("--seconds", type=float, default=600, help="for all, start no case after")
    result.add_argument("--worlds", type=lambda text: text.split(","), default=[*peers.WORLDS])
    result.add_argument("--commit", default="", help="what is measured, where git cannot tell")
    result.add_argument("--list", action="store_true", help="print what the peers registered")
    result.add_argument("--no-host", action="store_true", help="leave out the host cost")
    for hidden in ("--worker", "--log", "--until", "--share"):
        kind = {"--log": Path, "--until": float}.get(hidden, str)
        result.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    return result


def main() -> None:
    """Measure every world, join, print and record."""
    args = parser().parse_args()
    if args.worker:
        work(args)
        return
    args.until = time.time() + args.seconds
    args.peers_dir = unpacked(args.peers_dir)
    args.out.mkdir(parents=True, exist_ok=True)
    known = provenance(args.commit)
    scratch = Path(tempfile.mkdtemp(prefix="bench-"))
    logs = {w: run_world(w, args, Log(scratch / f"{w}.jsonl")) for w in args.worlds}
    if not args.list:
        publish(args, known, logs)


def publish(args: argparse.Namespace, known: dict[str, Any], logs: dict[str, Log]) -> None:
    """Write JSON and plot, print the table and all that did not run."""
    lines = {world: log.lines for world, log in logs.items()}
    every = [line for of in lines.values() for line in of]
    order = {case.name: i for i, case in enumerate(everything())}
    cases = report.merge(row for log in logs.values() for row in log.rows())
    cases.sort(key=lambda case: order[case["case"]])
    rates = [line["copy"] for line in every if "copy" in line]
    empty = [line["empty_us"] for line in every if "copy" in line]
    rate, empty_us = (sorted(v)[len(v) // 2] if v else float("nan") for v in (rates, empty))
    for case in cases:  # what a launch and the bytes alone would take, of what ours takes
        ours = case["opmux_us"]
        case["of_launch_and_bytes"] = (empty_us + case["floor_us"]) / ours if ours else None
    missing = {k: v for line in every for k, v in line.get("missing", {}).items()}
    skipped = [line["late"] for line in every if "late" in line]
    broken: dict[str, str] = {}
    for line in every:
        if "case_failed" in line:
            broken.setdefault(line["case_failed"], line["error"])
    exits = [line for line in every if "exit" in line]
    seconds = {w: line["world_seconds"] for w, of in lines.items() for line in of
               if "world_seconds" in line}  # fmt: skip
    host = {w: line["host_us"] for w, of in lines.items() for line in of if "host_us" in line}
    result = {
        **known, "clocks_after": smi(CLOCKS), "copy_bytes_per_s": rate, "empty_kernel_us": empty_us,
        "copy_rates": rates, "rounds": args.rounds, "peers_not_loaded": missing,
        "cases_failed": broken, "cases_out_of_time": skipped, "processes_ended": exits,
        "seconds": seconds, "host_us": host,
        "summary": report.summary(cases), "cases": cases,
    }  # fmt: skip
    path = args.out / f"{args.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    title = f"{known['device']}, copy {rate / 1e12:.2f} TB/s, empty kernel {empty_us:.2f} us"
    console = Console(width=190)
    console.print(report.table(cases, title))
    for name, error in missing.items():
        console.print(f"not loaded: {name}: {error}", markup=False)
    for case in cases:
        for name, error in case["failed"].items():
            console.print(f"{case['case']}: {name}: {error[:150]}", markup=False)
    for name, error in broken.items():
        console.print(f"failed: {name}: {error}", markup=False)
    if skipped:
        console.print(f"out of time: {', '.join(skipped)}", markup=False)
    for line in exits:
        console.print(f"a process of {line['world_']} ended with {line['exit']}:", markup=False)
        console.print("\n".join(line["stderr"].splitlines()[-3:]), markup=False)
    console.print(f"seconds: {seconds}", markup=False)
    for world, costs in host.items():
        shown = ", ".join(f"{name} {us:.2f}" for name, us in costs.items())
        console.print(f"host us, beside {world}: {shown}", markup=False)
    console.print(json.dumps(result["summary"]), markup=False)
    try:
        report.plot(cases, rate, empty_us, args.out / f"{args.name}.png", title)
    except Exception as error:
        console.print(f"no plot: {error}", markup=False)
    console.print(f"recorded in {path}", markup=False)


if __name__ == "__main__":
    main()

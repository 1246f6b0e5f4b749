# SPDX-License-Identifier: Apache-2.0
"""Everything that a CUDA wheel must show on a GPU, in one command; installs nothing.

Unpack the wheels of opmux and opmux-cuda (and pluggy and pytest) into a folder and run

    PYTHONPATH=FOLDER python tools/gpu_check.py [--out DIR]

It runs the conformance kit (graph capture and side streams are part of it) and beside it, ops
shared out over the processor's cores, the kit's numerical cases under compute-sanitizer's memcheck
and racecheck. Times are benchmarks/gpu.py's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import opmux

BACKEND = "cuda"
TOOLS = ("memcheck", "racecheck")
CASES = "test_matches_the_reference and not special"
FOUND = 9  # exit status of compute-sanitizer where it found something
SUMMARY = re.compile(r"=+ (?:ERROR|RACECHECK) SUMMARY: (.*)")
COUNTS = re.compile(r"^(?:\d+ \w+(?:, )?)+ in [\d.]+s.*$", re.MULTILINE)


@dataclass
class Job:
    """One process: what it checks, where it writes."""

    name: str
    command: list[str]
    env: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    file: TextIO | None = None
    seconds: float = 0.0

    def start(self) -> None:
        """Start it."""
        self.file = self.log.open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            self.command, stdout=self.file, stderr=subprocess.STDOUT, env=os.environ | self.env
        )

    def result(self) -> dict[str, Any]:
        """Return what its log says."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        status = self.process.returncode if self.process else None
        summary, counts = SUMMARY.findall(text), COUNTS.findall(text)
        return {
            "name": self.name,
            "status": status,
            "seconds": round(self.seconds, 1),
            "summary": summary[-1].strip() if summary else "",
            "tests": counts[-1].strip("= ") if counts else "",
        }


def kit(extra: Sequence[str], config: Path) -> list[str]:
    """Return the command that runs the kit."""
    return [
        sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider",
        "-c", str(config), "--pyargs", "opmux.conformance", "--opmux-backend", BACKEND, *extra,
    ]  # fmt: skip


def kernels_only(sanitizer: str) -> list[str]:
    """Return the option that spares torch's own kernels, as this version spells it."""
    said = subprocess.run([sanitizer, "--help"], capture_output=True, text=True, check=False)
    for option in ("--kernel-name", "--kernel-regex"):
        if option in said.stdout + said.stderr:
            return [option, "kns=opmux"]
    return []


def shared_out(ops: Sequence[str], bins: int) -> list[list[str]]:
    """Deal the ops out; neighbours in the alphabet cost about the same."""
    return [list(ops[i::bins]) for i in range(min(bins, len(ops)))]


def jobs(args: argparse.Namespace, extra: Sequence[str], ops: Sequence[str]) -> list[Job]:
    """Return every process of the check."""
    config = args.logs / "pytest.ini"
    config.write_text("[pytest]\n", encoding="utf-8")
    made = []
    if not args.no_conformance:
        report = args.out / f"{args.name}-conformance.json"
        command = kit(["--opmux-report", str(report), *extra], config)
        made.append(Job("conformance", command, {}, args.logs / "conformance.log"))
    sanitizer = shutil.which("compute-sanitizer")
    if not args.no_sanitizer and sanitizer:
        only = kernels_only(sanitizer)
        for tool in TOOLS:
            for i, some in enumerate(shared_out(ops, args.processes // len(TOOLS))):
                prefix = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *only]
                chosen = [word for op in some for word in ("--opmux-op", op)]
                made.append(Job(
                    f"{tool} {' '.join(some)}", [*prefix, *kit([*chosen, "-k", CASES], config)],
                    # Without the allocator's pool every tensor ends where its memory ends.
                    {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"},
                    args.logs / f"{tool}-{i}.log",
                ))  # fmt: skip
    return made


def run(made: Sequence[Job], seconds: float) -> None:
    """Run them side by side; what is not done in time is ended, and counts as failed."""
    start = time.monotonic()
    for job in made:
        job.start()
    waiting = list(made)
    while waiting:
        for job in list(waiting):
            if job.process is None or job.process.poll() is not None:
                job.seconds = time.monotonic() - start
                waiting.remove(job)
        if time.monotonic() - start > seconds:
            for job in waiting:
                if job.process is not None:
                    job.process.kill()
                    job.process.wait()
                job.seconds = time.monotonic() - start
            break
        time.sleep(0.2)
    for job in made:
        if job.file is not None:
            job.file.close()


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--out", type=Path, default=Path("build/gpu_check"))
    result.add_argument("--name", default="cuda-h200", help="of the files in it")
    result.add_argument("--logs", type=Path, help="folder of the logs; a temporary one")
    result.add_argument("--no-conformance", action="store_true")
    result.add_argument("--no-sanitizer", action="store_true")
    result.add_argument("--processes", type=int, default=max(2, (os.cpu_count() or 2) - 2))
    result.add_argument("--seconds", type=float, default=240, help="for all of it")
    result.add_argument("--op", action="append", help="sanitize this op only; may be repeated")
    return result


def main() -> None:
    """Check; other arguments go to the kit."""
    args, extra = parser().parse_known_args()
    args.logs = args.logs or Path(tempfile.mkdtemp(prefix="gpu-check-"))
    args.logs.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for failure in opmux.failures():
        print("not loaded:", failure)
    backend = next((b for b in opmux.load().backends if b.name == BACKEND), None)
    if backend is None:
        sys.exit(f"the backend {BACKEND} is not there")
    made = jobs(args, extra, args.op or sorted(backend.backend.kernels))
    run(made, args.seconds)
    results = [job.result() for job in made]
    for found in results:
        outcome = "ok" if found["status"] == 0 else f"FAILED with status {found['status']}"
        print(f"{found['name'][:60]:60} {outcome}: {found['summary']} {found['tests']}"
              f" ({found['seconds']:.0f} s)")  # fmt: skip
    for job in made:
        if job.process is None or job.process.returncode != 0:
            print(f"--- the end of {job.log}")
            print("\n".join(job.log.read_text(errors="replace").splitlines()[-25:]))
    sanitized = [r for r in results if r["name"] != "conformance"]
    if not args.no_sanitizer:
        summary = {"cases": CASES, "kernels": "opmux's", "results": sanitized}
        path = args.out / f"{args.name}-sanitizer.json"
        path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        if not sanitized:
            print("compute-sanitizer is not on the PATH: nothing was sanitized")
    done = all(r["status"] == 0 for r in results) and (args.no_sanitizer or sanitized)
    sys.exit(0 if done else 1)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The shared GPU sources, built for the CPU into ``build/simt``, and their conformance runs.

``python tests/simt.py`` builds and shows the progress. What was built stays: ninja compiles again
what has changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
GPU = ROOT / "backends" / "common" / "gpu"
PACKAGES = ROOT / "backends" / "cuda" / "src"
BUILD = Path(os.environ.get("OPMUX_SIMT_BUILD", ROOT / "build" / "simt"))
WARPS = (32, 64, 128)
# cmake and ninja may be packages of this environment
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
OPS = {path.stem: path for path in sorted(GPU.glob("*/*.cu"))}


class Mutant(NamedTuple):
    """A fault that the test build must find: ``old`` becomes ``new`` in one file."""

    file: str
    old: str
    new: str
    op: str  # whose cases are run
    warp: int
    error: str  # part of what they must say


MUTANTS = {
    "missing_barrier": Mutant(
        "reduce.cuh", "  if (lane == 0) scratch[warp] = value;\n  __syncthreads();",
        "  if (lane == 0) scratch[warp] = value;", "rmsnorm", 32, "shared memory read before",
    ),
    "reused_too_early": Mutant(
        "sampling/row.cuh", "f, w.counts);\n  __syncthreads();", "f, w.counts);",
        "top_k_top_p_sample", 32, "race: shared memory written without a barrier",
    ),
    "thirty_two_lanes": Mutant(
        "reduce.cuh", "reduce_lanes<kWarp>(value, f);\n  if", "reduce_lanes<32>(value, f);\n  if",
        "rmsnorm", 64, "tolerance",
    ),
    "out_of_bounds": Mutant(
        "reduce.cuh", "scratch[warp] = value", "scratch[warp + kMaxWarps] = value",
        "rmsnorm", 32, "out of its bounds",
    ),
    "divergent_barrier": Mutant(
        "norm/norm_kernels.cuh", "  float value[kSize];\n  float squares = 0;\n",
        "  float value[kSize];\n  float squares = 0;\n  if (first >= a.width) return;\n",
        "rmsnorm", 32, "only some threads reach",
    ),
    "does_not_wait": Mutant(
        "norm/norm_kernels.cuh", "  wait_for_previous();\n", "", "rmsnorm", 32,
        "without wait_for_previous",
    ),
}  # fmt: skip


def library(module: str) -> Path:
    """Return the file of a module: a warp width or the name of a mutant."""
    return BUILD / f"_opmux_simt{module if module.isdigit() else f'_{module}'}.so"


def mutate(name: str) -> str:
    """Write the sources of a mutant, unless they are there, and describe it to CMake."""
    mutant = MUTANTS[name]
    folder = BUILD / "mutants" / name
    for source in GPU.rglob("*"):
        if not source.is_file():
            continue
        text = source.read_text(encoding="utf-8")
        if source == GPU / mutant.file:
            assert mutant.old in text, f"{name}: {mutant.file} has changed, change the mutant too"
            text = text.replace(mutant.old, mutant.new, 1)
        target = folder / source.relative_to(GPU)
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    op = OPS[mutant.op].relative_to(GPU).with_suffix("")
    return f"{name}:{mutant.warp}:{op}:{folder}"


def build() -> None:
    """Build every module; a line on standard output for each tenth of the work."""
    BUILD.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "NINJA_STATUS": "[%f/%t] ", "PATH": PATH}
    steps = (
        ["cmake", "-S", str(GPU / "testing"), "-B", str(BUILD), "-G", "Ninja",
         f"-DPython_EXECUTABLE={sys.executable}",
         "-DOPMUX_MUTANTS=" + ";".join(map(mutate, MUTANTS))],
        ["cmake", "--build", str(BUILD), "-j", os.environ.get("MAX_JOBS") or str(os.cpu_count())],
    )  # fmt: skip
    began = time.monotonic()
    for step in steps:
        tail: list[str] = []
        shown = 0
        with subprocess.Popen(
            step, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            for line in process.stdout or ():
                tail = [*tail[-59:], line]
                found = re.match(r"\[(\d+)/(\d+)\]", line)
                if found and 10 * int(found[1]) // int(found[2]) > shown:
                    shown = 10 * int(found[1]) // int(found[2])
                    seconds = time.monotonic() - began
                    print(f"GPU sources for the CPU: {found[0]} {seconds:.0f} s", flush=True)
        if process.returncode:
            raise RuntimeError(f"{' '.join(step[:2])} failed:\n{''.join(tail)}")


PLUGIN = """
import dataclasses
from pathlib import Path
from opmux import Backend, hookimpl
from opmux_cuda.kernels import KERNELS

def shared(op):
    found = KERNELS[op] if isinstance(KERNELS[op], tuple) else (KERNELS[op],)
    return next(k for k in found if (k.symbol or op) == op)

@hookimpl
def opmux_backend() -> Backend:
    kernels = {{op: dataclasses.replace(shared(op), archs=()) for op in {ops!r}}}
    return Backend(name={name!r}, device="cpu", kernels=kernels, library=Path({library!r}))
"""


def claims() -> dict[str, Any]:
    """Return what the CUDA backend claims, by its sources: an installed package stays as it is."""
    path = PACKAGES / "opmux_cuda" / "kernels.py"
    spec = importlib.util.spec_from_file_location("opmux_cuda_claims", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Any] = module.KERNELS
    return found


def offer(folder: Path) -> None:
    """Make each module a backend for tensors on the CPU, with the claims of the CUDA backend."""
    from opmux.op import all_ops
    from plugins import make_plugin, manifest_for

    for module in [*map(str, WARPS), *MUTANTS]:
        ops = [MUTANTS[module].op] if module in MUTANTS else sorted(OPS)
        ops = [op for op in ops if op in claims() and op in all_ops()]
        digest = hashlib.sha256(library(module).read_bytes()).hexdigest()
        make_plugin(
            folder,
            dist=f"opmux-simt-{module.replace('_', '-')}",
            name=f"simt_{module}",
            code=PLUGIN.format(ops=ops, name=f"simt_{module}", library=str(library(module))),
            manifest=manifest_for(f"simt_{module}", ops, library={"sha256": digest}),
        )


class Run:
    """A child process that runs the conformance cases of one module, op by op."""

    def __init__(self, site: Path, module: str, layouts: str, ops: Sequence[str]) -> None:
        """Start it."""
        path = os.pathsep.join([str(site), str(PACKAGES), *filter(None, sys.path)])
        name = f"simt_{module}"
        command = [sys.executable, str(Path(__file__).with_name("simt_cases.py")), name, layouts]
        self.found: dict[str, dict[str, Any]] = {}
        self.process = subprocess.Popen(
            [*command, *ops],
            env={**os.environ, "PYTHONPATH": path, "OPMUX_BACKENDS": name, "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def result(self, op: str) -> dict[str, Any]:
        """Wait for an op and return what its cases gave."""
        tail: list[str] = []
        while op not in self.found and self.process.stdout is not None:
            line = self.process.stdout.readline()
            if line.startswith("{"):
                done = json.loads(line)
                self.found[done["op"]] = done
            elif line:
                tail = [*tail[-59:], line]
            else:
                raise AssertionError(f"no result for {op}:\n{''.join(tail)}")
        return self.found[op]

    def stop(self) -> None:
        """End it, finished or not."""
        self.process.kill()
        self.process.communicate()


if __name__ == "__main__":
    build()

# SPDX-License-Identifier: Apache-2.0
"""The conformance kit on the reference, and on the CPU backend at each instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import opmux

ISAS = ("x86_64_v2", "avx2", "avx512", "avx512_bf16", "avx512_fp16")


def here() -> list[str]:
    """Return the instruction sets that this machine has."""
    for loaded in opmux.load().backends:
        if loaded.name == "cpu_amx":
            return list(loaded.info["isas"])
    return []


def run_kit(backend: str, *args: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "--pyargs", "opmux.conformance", "-q", "-x",
               "--opmux-backend", backend, "-p", "no:cacheprovider", *args]  # fmt: skip
    # Small tensors: a second thread only waits. The kit tests thread counts by itself.
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    print(done.stdout[-4000:])
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout


def test_the_reference_conforms() -> None:
    # it is compared with itself: special values would say nothing
    run_kit("reference", "-k", "not special_values")


@pytest.mark.parametrize("isa", ISAS)
def test_the_cpu_backend_conforms(isa: str) -> None:
    isas = here()
    if not isas:
        pytest.skip("opmux-cpu-amx is not in service here: see opmux doctor")
    if isa not in isas:
        pytest.skip(f"this CPU has {', '.join(isas)}, not {isa}")
    best = isa == isas[-1]
    # what does not depend on the instruction set is tested once
    run_kit("cpu_amx", *([] if best else ["-k", "numerics"]), OPMUX_CPU_ISA=isa)


def test_the_isa_in_force_is_reported() -> None:
    if not here():
        pytest.skip("opmux-cpu-amx is not in service here: see opmux doctor")
    loaded = next(b for b in opmux.load().backends if b.name == "cpu_amx")
    assert loaded.capability(torch.device("cpu")).arch in here()

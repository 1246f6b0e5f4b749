# SPDX-License-Identifier: Apache-2.0
"""The conformance kit is itself tested: each wrong backend fails, at the level that should see it.

Levels are run in order and the first failure ends a run, so a mutant that is caught at level 5 has
passed all that the levels below ask for.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import fakes
from plugins import make_plugin, manifest_for

HERE = Path(__file__).parent / "backends"
CC = shutil.which("cc") or shutil.which("gcc")


@dataclass(frozen=True)
class Mutant:
    """Where a wrong backend must be caught, and by which words."""

    level: int
    test: str
    words: str
    op: str = "silu_and_mul"
    manifest: Any = None  # changes of its manifest
    requires: str = ""  # a line of its METADATA
    library: str = ""  # C, for _acme.so
    early: bool = False  # _early.so lies beside it
    apart: str = ""  # the way of loading, in a process of its own, that shows it
    device: str = "cpu"


NUMBERS = "test_matches_the_reference["
SPECIAL = "test_matches_the_reference_on_special_values["
LIBRARY = """
const char* opmux_interface(void) { return ""; }
const char* opmux_register(const char* ns) { return 0; }
const char* opmux_info(void) { return "{}"; }
"""


def using(symbol: str) -> str:
    return LIBRARY + f"int {symbol}(void); int use(void) {{ return {symbol}(); }}"


MUTANTS = {
    # what it says of itself
    "pinned_torch": Mutant(0, "pins_no_torch", "torch==2.13.0", requires="torch==2.13.0"),
    "pinned_core": Mutant(0, "pins_no_torch", "opmux==0.1.0", requires="opmux==0.1.0"),
    "stale_manifest": Mutant(
        0, "test_manifest_is_consistent", "other interfaces of silu_and_mul",
        manifest={"ops": {"silu_and_mul": "0" * 12}},
    ),
    "promises_every_version": Mutant(
        0, "states_ranges", "promises every version",
        manifest={"requires": {"opmux": ["0.1", "0.2"], "torch": ["", ""]}},
    ),
    # how it loads
    "crashes_at_load": Mutant(1, "test_loads", "SIGSEGV"),
    "changes_a_setting": Mutant(1, "test_loads", "torch's number of threads"),
    "loads_too_early": Mutant(
        1, "fresh_process[clean", "before the handshake", early=True, apart="clean"
    ),
    "loads_once": Mutant(1, "fresh_process[again", "it is loaded already", apart="again"),
    "fork_unsafe": Mutant(1, "fresh_process[fork", "child", apart="fork"),
    "thread_unsafe_state": Mutant(1, "fresh_process[threads", "tolerance", apart="threads"),
    # with which hosts
    "open_range": Mutant(
        2, "ends_with_the_series", "every opmux",
        manifest={"requires": {"opmux": ["0.1", ""], "torch": ["2.10", ""]}},
    ),
    "older_torch_than_core": Mutant(
        2, "needs_no_newer_torch", "core needs 2.10",
        manifest={"requires": {"opmux": ["0.1", "0.2"], "torch": ["2.4", ""]}},
    ),
    "all_or_nothing": Mutant(
        2, "fresh_process[newer", "one op has another interface", apart="newer"
    ),
    "newer_torch_than_it_says": Mutant(
        2, "needs_no_newer_torch", "torch_stream_native_handle",
        library=using("torch_stream_native_handle"),
    ),
    "unstable_symbols": Mutant(
        2, "needs_no_newer_torch", "C++ symbols of torch",
        library=using("_ZN2at15get_num_threadsEv"),
    ),
    # numbers
    "swapped_halves": Mutant(3, NUMBERS, "tolerance"),
    "unwritten_tail": Mutant(3, NUMBERS, "tolerance"),
    "wrong_eps": Mutant(3, NUMBERS, "tolerance", "rmsnorm"),
    "eps_outside_the_root": Mutant(3, SPECIAL, "tolerance", "rmsnorm"),
    "summed_in_the_narrow_dtype": Mutant(3, NUMBERS, "tolerance", "rmsnorm"),
    "ignored_row_stride": Mutant(3, NUMBERS, "tolerance"),
    "off_by_one_index": Mutant(3, NUMBERS, "tolerance", "apply_token_bitmask"),
    "race": Mutant(3, NUMBERS, "tolerance"),
    "lost_in_place_update": Mutant(3, NUMBERS, "residual", "fused_add_rmsnorm"),
    "residual_rounded_too_early": Mutant(3, NUMBERS, "tolerance", "fused_add_rmsnorm"),
    "nan_becomes_zero": Mutant(3, SPECIAL, "-nan]"),
    "overflowing_exponential": Mutant(3, SPECIAL, "-huge]"),
    "wrong_dtype_of_out": Mutant(3, NUMBERS, "bfloat16"),
    # claims
    "over_claimed_dtype": Mutant(4, "bfloat16", "not written yet"),
    "fails_on_one_row": Mutant(4, "-1x", "grid of no blocks"),
    "under_claimed": Mutant(4, "test_serves_a_sample", "no size fits"),
    "moody_predicate": Mutant(4, "", "not today"),
    "claims_what_is_no_dtype_of_the_op": Mutant(4, "test_claims_what_the_op_defines", "float64"),
    # memory
    "writes_past_the_end": Mutant(5, "", "outside of it"),
    "writes_past_the_row": Mutant(5, "", "outside of it"),
    "writes_before_the_start": Mutant(5, "", "outside of it"),
    "modified_input": Mutant(5, "", "not to be written"),
    "aliasing_write": Mutant(5, "", "earlier one's tensors"),
    "twins_taken_for_two": Mutant(5, "one_tensor_as_two", "s_merged", "merge_state"),
    # torch.compile
    "lying_schema": Mutant(6, "test_schema_and_fake_hold", ""),
    "wrong_fake_shape": Mutant(6, "test_schema_and_fake_hold", "out: the fake makes it"),
    "recompiling": Mutant(6, "test_compiles_without_recompiling", "graphs for 3 token counts"),
    # bits
    "not_deterministic": Mutant(7, "called_again", "out"),
    "batch_variant": Mutant(7, "larger_batches", "out"),
    "thread_variant": Mutant(7, "more_threads", "out"),
    # speed
    "slow": Mutant(8, "test_is_not_slower_than_the_reference", "the kernel takes"),
}  # fmt: skip

# One process for all: importing torch takes longer than most runs. Each plugin is found alone.
RUN_ALL = """
import json, os, sys
import pytest
from opmux import loader

site, *runs = sys.argv[1:]
for run in runs:
    name, op, level, apart = run.split(":")
    folder = f"{site}/{name}"
    sys.path.insert(0, folder)
    os.environ["OPMUX_PROBE"] = "1" if name == "crashes_at_load" else "0"
    loader.reset()
    # Processes of their own take most of the time: only the one that shows the mutant is run.
    select = f"not fresh_process or fresh_process[{apart}]" if apart else "not fresh_process"
    pytest.main([
        "-q", "--no-header", "-x", "-p", "no:cacheprovider", "-c", f"{site}/pytest.ini",
        "--pyargs", "opmux.conformance", "--opmux-backend", name, "--opmux-op", op,
        "--opmux-level", level, "--opmux-report", f"{site}/{name}.json", "-k", select,
    ])
    sys.path.remove(folder)
"""


def write(site: Path, name: str, mutant: Mutant) -> None:
    """Write a mutant as a distribution of its own."""
    folder = site / name
    changes = dict(mutant.manifest or {})
    manifest = manifest_for(name, (mutant.op,), mutant.device)
    source = "mutants.py" if mutant.device == "cpu" else "mutants_cuda.py"
    package = folder / f"opmux_{name}"
    package.mkdir(parents=True)
    if mutant.library:
        # found by its name when the library is loaded: torch itself is
        compile_library(folder, "", "libtorch.so", "-Wl,-soname,libtorch.so")
        flags = (f"-L{folder}", "-Wl,--no-as-needed", "-ltorch")
        built = compile_library(package, mutant.library, "_acme.so", *flags)
        digest = hashlib.sha256(built.read_bytes()).hexdigest()
        manifest["library"] = {"file": built.name, "sha256": digest}
    if mutant.early:
        compile_library(package, "int nothing;", "_early.so")
    make_plugin(
        folder, dist=f"opmux-{name.replace('_', '-')}", name=name,
        code=(HERE / source).read_text(encoding="utf-8"), manifest={**manifest, **changes},
    )  # fmt: skip
    shutil.copy(HERE / "acme.py", package)
    if mutant.requires:
        (metadata,) = folder.glob("*.dist-info/METADATA")
        metadata.write_text(metadata.read_text() + f"Requires-Dist: {mutant.requires}\n")


def compile_library(folder: Path, source: str, name: str, *flags: str) -> Path:
    assert CC is not None
    (folder / "source.c").write_text(source)
    command = [CC, "-shared", "-fPIC", "-o", str(folder / name), str(folder / "source.c"), *flags]
    subprocess.run(command, check=True, timeout=60)
    (folder / "source.c").unlink()
    return folder / name


def possible(name: str) -> str:
    """Return why a mutant cannot be made here, or nothing."""
    mutant = MUTANTS[name]
    if (mutant.library or mutant.early) and CC is None:
        return "no C compiler on this machine"
    here = torch.torch_version.TorchVersion(torch.__version__)
    if name == "newer_torch_than_it_says" and here < "2.13":
        return f"torch {here} lacks the symbol, so that the library does not load"
    return ""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the kit on every mutant, in one process."""
    return run(
        tmp_path_factory.mktemp("site"), {n: m for n, m in MUTANTS.items() if not possible(n)}
    )


def run(site: Path, mutants: dict[str, Mutant]) -> dict[str, Any]:
    """Write mutants, run the kit on them in two processes, and return the reports."""
    (site / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    for name, mutant in mutants.items():
        write(site, name, mutant)
    runs = [f"{name}:{m.op}:{m.level}:{m.apart}" for name, m in mutants.items()]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OPMUX_BACKENDS": "",
        "PYTHONPATH": os.pathsep.join([str(fakes.CORE), *filter(None, sys.path)]),
        "XDG_CACHE_HOME": str(site / "cache"),
    }
    halves = [
        subprocess.Popen(
            [sys.executable, "-c", RUN_ALL, str(site), *half],
            env=env, cwd=site, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for half in (runs[::2], runs[1::2])
    ]  # fmt: skip
    for half in halves:
        output, _ = half.communicate(timeout=600)
        assert half.returncode == 0, output[-4000:]
    return {p.stem: json.loads(p.read_text()) for p in sorted(site.glob("*.json"))}


@pytest.mark.parametrize("name", MUTANTS)
def test_it_is_caught_at_its_level(reports: dict[str, Any], name: str) -> None:
    why = possible(name)
    if why:
        pytest.skip(why)
    check(MUTANTS[name], reports[name])


def check(mutant: Mutant, report: dict[str, Any]) -> None:
    """Raise unless a report has exactly the failure that a mutant is made for."""
    assert not report["passed"], "it was not caught"
    (failure,) = report["failures"]
    assert failure["level"] == mutant.level, failure
    assert mutant.test in failure["test"], failure
    assert mutant.words in failure["test"] + failure["message"], failure
    # everything below is in order
    below = [report["levels"][str(level)]["verdict"] for level in range(mutant.level)]
    assert "failed" not in below, below
    assert report["level"] is None or report["level"] < mutant.level


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= 25
    assert {m.level for m in MUTANTS.values()} == set(range(9))

# SPDX-License-Identifier: Apache-2.0
"""The conformance kit passes a right backend and fails every wrong one at the right test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from plugins import make_plugin, manifest_for

ACME = Path(__file__).parent / "backends" / "acme.py"
OPS = ("fused_add_rmsnorm", "rmsnorm", "silu_and_mul")

# mutant -> (op, the test that must fail, what its message says)
MUTANTS = {
    "swapped_halves": (
        "silu_and_mul",
        "test_numerics.py::test_matches_the_reference[",
        "tolerance",
    ),
    "unwritten_tail": (
        "silu_and_mul",
        "test_numerics.py::test_matches_the_reference[",
        "tolerance",
    ),
    "writes_past_the_end": (
        "silu_and_mul",
        "test_numerics.py::test_matches_the_reference[",
        "outside of it",
    ),
    "ignored_row_stride": ("silu_and_mul", "-rows]", "tolerance"),
    "over_claimed_dtype": ("silu_and_mul", "-bfloat16-", "not written yet"),
    "modified_input": ("silu_and_mul", "test_numerics.py::test_matches_the_reference[", "x: "),
    "not_deterministic": (
        "silu_and_mul",
        "test_numerics.py::test_gives_equal_bits_when_called_again[",
        "out",
    ),
    "batch_variant": (
        "silu_and_mul",
        "test_numerics.py::test_gives_equal_bits_in_larger_batches[",
        "out",
    ),
    "wrong_eps": ("rmsnorm", "test_numerics.py::test_matches_the_reference[", "tolerance"),
    "lost_residual": (
        "fused_add_rmsnorm",
        "test_numerics.py::test_matches_the_reference[",
        "residual",
    ),
}

RUN_ALL = """
import sys
import pytest
folder, *runs = sys.argv[1:]
for run in runs:
    name, op = run.split(":")
    pytest.main([
        "-q", "--no-header", "--maxfail=3", "-p", "no:cacheprovider",
        "--pyargs", "opmux.conformance.test_numerics", "-c", f"{folder}/pytest.ini",
        "--opmux-backend", name, "--opmux-op", op, "--opmux-report", f"{folder}/{name}.json",
    ])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    for name in ("acme", *MUTANTS):
        make_plugin(
            folder,
            dist=f"opmux-{name.replace('_', '-')}",
            name=name,
            code=ACME.read_text(encoding="utf-8"),
            manifest=manifest_for(name, OPS),
        )
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    return folder


def python(site: Path, *args: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, *args],
        # one thread, since two wait long for each other where other work runs
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        cwd=site,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def kit(site: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return python(
        site, "-m", "pytest", "-p", "no:cacheprovider",
        "-c", str(site / "pytest.ini"), "-rs", "--pyargs", "opmux.conformance", *args,
    )  # fmt: skip


@pytest.fixture(scope="module")
def reports(site: Path) -> dict[str, Any]:
    """Run the numeric tests on every mutant, in one process."""
    runs = [f"{name}:{op}" for name, (op, _, _) in MUTANTS.items()]
    done = python(site, "-c", RUN_ALL, str(site), *runs)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: json.loads((site / f"{name}.json").read_text()) for name in MUTANTS}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_backend_fails(reports: dict[str, Any], mutant: str) -> None:
    op, test, message = MUTANTS[mutant]
    report = reports[mutant]
    assert not report["passed"]
    hits = [f for f in report["failures"] if test in f["test"] and message in f["message"]]
    assert hits, json.dumps(report["failures"][:4], indent=1)
    assert set(report["ops"]) == {op}
    assert sum(counts.get("failed", 0) for counts in report["ops"][op].values())
    if mutant == "ignored_row_stride":
        assert not [f for f in report["failures"] if "-dense]" in f["test"]]
    if mutant == "over_claimed_dtype":
        assert "failed" not in report["ops"][op]["float32"]


def test_a_right_backend_passes(site: Path) -> None:
    done = kit(site, "--opmux-backend", "acme", "--opmux-report", "acme.json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((site / "acme.json").read_text())
    assert report["passed"]
    assert set(report["ops"]) == set(OPS)
    for dtypes in report["ops"].values():
        assert set(dtypes) == {"float32", "bfloat16"}
        assert all(counts["passed"] > 10 and "failed" not in counts for counts in dtypes.values())
    assert report["dist"] == "opmux-acme"
    assert report["device"]["type"] == "cpu"
    assert "shape: last dimension 2 is not a multiple of 4" in done.stdout


def test_a_backend_that_fails_to_load_fails(site: Path) -> None:
    code = "raise ImportError('libacme.so.2: cannot open shared object file')"
    make_plugin(
        site, dist="opmux-broken", name="broken", code=code, manifest=manifest_for("broken")
    )
    done = kit(site, "--opmux-backend", "broken", "-k", "not fresh_process")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "libacme.so.2" in done.stdout
    assert "backend broken brings no kernel" in done.stdout


def test_without_a_backend_the_kit_is_skipped(site: Path) -> None:
    done = kit(site)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no backend to test: run with --opmux-backend NAME" in done.stdout
    assert "passed" not in done.stdout


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (("--opmux-backend", "acmee"), "unknown backend 'acmee'; did you mean acme"),
        (("--opmux-backend", "acme", "--opmux-op", "rmsnrm"), "unknown op 'rmsnrm'; did you mean"),
    ],
)
def test_unknown_names_are_refused(site: Path, option: tuple[str, ...], sentence: str) -> None:
    done = kit(site, *option)
    assert done.returncode not in (0, 1)
    assert sentence in done.stdout + done.stderr

# SPDX-License-Identifier: Apache-2.0
"""The kit passes a right backend, level by level; test_mutants.py has the wrong ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plugins import make_plugin, manifest_for

ACME = Path(__file__).parent / "backends" / "acme.py"
OPS = ("fused_add_rmsnorm", "rmsnorm", "silu_and_mul")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    make_plugin(folder, code=ACME.read_text(encoding="utf-8"), manifest=manifest_for("acme", OPS))
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


def test_a_right_backend_passes(site: Path) -> None:
    done = kit(site, "--opmux-backend", "acme", "--opmux-report", "acme.json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((site / "acme.json").read_text())
    assert report["passed"] and report["complete"]
    assert report["level"] == 8
    assert {row["verdict"] for row in report["levels"].values()} == {"passed"}
    assert "reached: level 8\n" in done.stdout
    assert set(report["ops"]) == set(OPS)
    for dtypes in report["ops"].values():
        assert set(dtypes) == {"float32", "bfloat16"}
        assert all(counts["passed"] > 10 and "failed" not in counts for counts in dtypes.values())
    assert report["dist"] == "opmux-acme"
    assert report["device"]["type"] == "cpu"
    assert "shape: last dimension 2 is not a multiple of 4" in done.stdout


def test_through_a_level(site: Path) -> None:
    """Levels above are left out, and so is what no level asks for."""
    args = ("--opmux-op", "silu_and_mul", "--opmux-report", "part.json")
    done = kit(site, "--opmux-backend", "acme", "--opmux-level", "3", *args)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((site / "part.json").read_text())
    assert report["level"] == 3
    assert not report["complete"], "one op is not the backend"
    assert [row["verdict"] for row in report["levels"].values()] == ["passed"] * 4 + ["not run"] * 5
    assert "reached: level 3, of the tests that were run" in done.stdout
    done = kit(site, "--opmux-backend", "acme", "--opmux-level", "0", "-k", "pins", *args[2:])
    assert not json.loads((site / "part.json").read_text())["complete"]


def test_a_backend_for_another_machine(site: Path) -> None:
    """Without its device the levels that need none are run, and the others say why not."""
    code = ACME.read_text(encoding="utf-8").replace('device="cpu"', 'device="musa"')
    make_plugin(site, "opmux-absent", "absent", code, manifest_for("absent", OPS, "musa"))
    done = kit(site, "--opmux-backend", "absent", "--opmux-report", "absent.json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((site / "absent.json").read_text())
    assert report["level"] == 2
    verdicts = [row["verdict"] for row in report["levels"].values()]
    assert verdicts == ["passed"] * 3 + ["skipped"] * 6
    assert "this machine has no musa device" in done.stdout


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

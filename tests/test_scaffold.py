# SPDX-License-Identifier: Apache-2.0
"""``opmux new-backend``: every project that it writes builds, installs and conforms unmodified."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from environments import ROOT, Environment, job
from opmux import scaffold
from opmux.cli.app import cli

PROJECTS = [
    (device, binding)
    for device, binding in itertools.product(scaffold.DEVICES, scaffold.BINDINGS)
    if (device, binding) != ("cpu", "triton")
]
NVCC = [("cuda", "stable-abi"), ("cuda", "pybind11")]
# The kit does the same for every backend without its device: one stands for all. The guide of
# tests/test_docs.py runs it for cpu and stable-abi.
CONFORMING = [("cpu", "pybind11"), ("cpu", "python"), ("cuda", "stable-abi")]


def new(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, ["new-backend", *map(str, args)])


def build_and_test(author: Environment, folder: Path, device: str, binding: str) -> Any:
    """Write a project, build and install it, run its tests and the kit; nothing is changed."""
    if (device, binding) in NVCC and not shutil.which("nvcc"):
        return None
    name = f"new_{device}_{binding.replace('-', '_')}"
    project = folder / "project"
    scaffold.write(name, device, binding, project)
    site = folder / "site"  # of its own: the backends are not to see one another
    author.install(author.build(project), "--target", site)
    report = folder / "conformance.json"
    own = author.pytest("tests", cwd=project, PYTHONPATH=str(site))
    if (device, binding) not in CONFORMING:
        return own, None
    author.conform(
        name, "--opmux-level", "3", "--opmux-report", report, cwd=folder, PYTHONPATH=str(site)
    )
    return own, json.loads(report.read_text())


@job(build_and_test)
@pytest.mark.parametrize(("device", "binding"), PROJECTS)
def test_an_unmodified_project_passes_its_tests_and_the_kit(
    outcome: Any, device: str, binding: str
) -> None:
    if outcome is None:
        pytest.skip("nvcc is not on the PATH")
    own, report = outcome
    assert " passed" in own
    if binding == "triton" and importlib.util.find_spec("triton") is None:
        assert "Triton is not installed (pip install triton)" in own
    if report is not None:
        assert report["passed"] and not report["failures"]
        here = device == "cpu" or (device == "cuda" and torch.cuda.is_available())
        assert report["level"] == (3 if here else 2)


def test_generated_sources_are_clean(tmp_path: Path) -> None:
    """Formatted, and without a warning of the usual linters: the first commit starts green."""
    if shutil.which("ruff", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("ruff is not installed: make lint")
    wrong = []
    for device, binding in PROJECTS:
        folder = tmp_path / f"{device}-{binding}"
        scaffold.write("acme", device, binding, folder)
        checks = [["ruff", "check", "--line-length", "100", "--select", "E,F,W,I,UP,B,RUF", "."],
                  ["ruff", "format", "--check", "--line-length", "100", "."]]  # fmt: skip
        native = [str(p) for p in folder.glob("csrc/*")]
        if native:
            style = f"file:{ROOT / '.clang-format'}"
            checks.append(["clang-format", "--dry-run", "--Werror", f"--style={style}", *native])
        for check in checks:
            command = [Path(sys.executable).parent / check[0], *check[1:]]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode:
                wrong.append(f"{device} {binding}: {done.stdout}{done.stderr}")
    assert not wrong, "\n".join(wrong)


def test_nothing_is_left_of_the_templates(tmp_path: Path) -> None:
    for device, binding in PROJECTS:
        for path, text in scaffold.render("acme", device, binding).items():
            assert "@" not in path.replace("/@", ""), path
            left = [w for w in ("@NAME@", "@PACKAGE@", "TODO") if w in text]
            assert not left, f"{device} {binding} {path}: {left}"


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "opmux-acme"
    target.mkdir()
    (target / "mine").write_text("kept")
    done = new("acme", "--output", target)
    assert done.exit_code == 1 and "exists; nothing was written" in done.output
    assert [p.name for p in target.iterdir()] == ["mine"]
    assert [p.name for p in tmp_path.iterdir()] == ["opmux-acme"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Acme", "try acme"),
        ("acme-npu", "try acme_npu"),
        ("opmux_acme", "try acme"),
        ("2fast", "lower-case words"),
        ("acme npu!", "try acme_npu"),
        ("class", "lower-case words"),
        ("../acme", "try acme"),
        ("", "lower-case words"),
        ("acme__npu", "try acme_npu"),
        ("reference", "belongs to opmux"),
        ("cuda", "belongs to opmux"),
    ],
)
def test_bad_names_get_a_sentence(name: str, words: str, tmp_path: Path) -> None:
    done = new(name, "--output", tmp_path / "project")
    assert done.exit_code == 1 and words in done.output, done.output
    assert "Traceback" not in done.output and not list(tmp_path.iterdir())


def test_a_taken_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from plugins import make_plugin

    monkeypatch.syspath_prepend(make_plugin(tmp_path / "installed", name="acme"))
    done = new("acme", "--output", tmp_path / "project")
    assert done.exit_code == 1 and "taken by opmux-acme" in done.output
    assert not (tmp_path / "project").exists()


def test_triton_has_no_cpu(tmp_path: Path) -> None:
    done = new("acme", "--binding", "triton", "--output", tmp_path / "project")
    assert done.exit_code == 1 and "Triton compiles for GPUs" in done.output


def test_a_failure_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    done = new("acme", "--output", tmp_path / "project")
    monkeypatch.undo()
    assert done.exit_code == 1 and "No space left" in done.output
    assert not list(tmp_path.iterdir())

# SPDX-License-Identifier: Apache-2.0
"""Conformance reports: bound to what was tested, shipped in wheels, required by policy."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import fakes
import opmux
import plugins
from opmux import digest, loader, record
from opmux.cli.app import cli
from opmux.kernel import Code

CODE = (Path(__file__).parent / "backends" / "acme.py").read_text(encoding="utf-8")
OPS = ("fused_add_rmsnorm", "rmsnorm", "silu_and_mul")


def report(**changes: Any) -> dict[str, Any]:
    """Return a report on the plugin that is on the path."""
    return {
        "format": record.FORMAT,
        "backend": "acme",
        "package": digest.package("opmux_acme"),
        "library": None,
        "versions": {"torch": "2.13.0"},
        "device": {"arch": "avx9"},
        "level": 4,
        "passed": True,
        "complete": True,
        **changes,
    }


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Install a right backend and return its folder."""
    real = loader.discover
    fakes.isolate(monkeypatch, tmp_path)
    monkeypatch.setattr(
        loader, "discover", lambda: (e for e in real() if getattr(e, "name", "") == "acme")
    )
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    plugins.make_plugin(tmp_path, code=CODE, manifest=plugins.manifest_for("acme", OPS))
    with fakes.on_path(tmp_path):
        yield tmp_path / "opmux_acme"


def acme() -> loader.Loaded:
    loader.reset()
    (loaded,) = opmux.load().backends
    return loaded


def ship(package: Path, data: dict[str, Any] | str) -> record.Record:
    text = data if isinstance(data, str) else json.dumps(data)
    (package / digest.REPORT).write_text(text)
    return acme().conformance


def test_a_shipped_report_counts(package: Path) -> None:
    assert acme().conformance == record.Record(-1, "it has no conformance report")
    found = ship(package, report())
    assert (found.level, found.path) == (4, package / digest.REPORT)
    assert found.sentence == "its report reaches level 4, torch 2.13.0 on avx9"
    assert "with failures above it" in ship(package, report(passed=False)).sentence


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"package": "0" * 64}, "another version of its package"),
        ({"library": {"sha256": "0" * 64}}, "another library"),
        ({"backend": "acme2"}, "another library"),
        ({"complete": False}, "a part of its ops"),
        ({"format": 1}, "has format 1"),
        ({"level": None}, "no level"),
        ({"level": "high"}, "cannot be read"),
        ({"versions": None}, "cannot be read"),
    ],
)
def test_a_report_of_something_else_does_not(
    package: Path, changes: dict[str, Any], words: str
) -> None:
    found = ship(package, report(**changes))
    assert found.level == -1
    assert words in found.sentence


@pytest.mark.parametrize("text", ["", "[]", "{", "\0", "null"])
def test_a_damaged_report_does_not(package: Path, text: str) -> None:
    assert ship(package, text).level == -1


def test_it_is_bound_to_what_was_tested(package: Path) -> None:
    """One changed line of the package, and the report is of something else."""
    data = report()
    assert ship(package, data).level == 4
    (package / "__init__.py").write_text(CODE + "# changed\n")
    assert ship(package, data).level == -1


def test_one_that_was_made_here_goes_first(package: Path, tmp_path: Path) -> None:
    ship(package, report())
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report(level=2, passed=False)))
    kept = record.keep(path)
    assert kept is not None and kept.parent == tmp_path / "data" / "opmux" / "conformance"
    assert acme().conformance.level == 2


@pytest.mark.parametrize("where", ["configure", "use", "environment", "toml", "op"])
def test_the_policy_may_require_a_level(
    package: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused with the level that it has, the origin of the wish, and what to do."""
    ship(package, report())
    x = torch.randn(2, 8)
    assert opmux.silu_and_mul.explain(x).winner.backend == "acme"
    for level, winner in ((4, "acme"), (5, "reference")):
        opmux.loader.reset()
        if where == "environment":
            monkeypatch.setenv("OPMUX_REQUIRE_CONFORMANCE", str(level))
        elif where == "toml":
            Path("opmux.toml").write_text(f"require_conformance = {level}\n")
        elif where == "op":
            opmux.configure(ops={"silu_and_mul": {"require_conformance": level}})
        elif where == "configure":
            opmux.configure(require_conformance=level)
        with opmux.use(**({"require_conformance": level} if where == "use" else {})):
            decision = opmux.silu_and_mul.explain(x)
            opmux.silu_and_mul(x)
            assert decision.winner.backend == winner
            if winner == "reference":
                refused = next(c.refused for c in decision.candidates if c.backend == "acme")
                assert refused.code is Code.CONFORMANCE
                assert "reaches level 4" in refused.sentence
                assert "requires level 5" in refused.sentence
                assert "opmux conform acme --level 5" in refused.remedy
            if where == "op":
                assert opmux.rmsnorm.explain(x, torch.ones(8)).winner.backend == "acme"
    key = "ops.silu_and_mul.require_conformance" if where == "op" else "require_conformance"
    if where != "use":
        assert opmux.effective_config()[key]["value"] == 5
    opmux.configure()


@pytest.mark.parametrize("value", [9, -1, True, "three", 2.5, [3]])
def test_a_wrong_level_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="must be a level from 0 to 8"):
        opmux.configure(require_conformance=value)


def test_doctor_shows_it(package: Path) -> None:
    ship(package, report())
    data = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).output)
    (row,) = data["backends"]
    assert row["facts"]["conformance"].startswith("its report reaches level 4")
    assert row["facts"]["first load"] == "not tried: OPMUX_PROBE=0"


def test_a_report_goes_into_a_wheel(package: Path, tmp_path: Path) -> None:
    """Beside the manifest, with its line in RECORD; a second one replaces it."""
    wheel, path = tmp_path / "opmux_acme-0.1.0-py3-none-any.whl", tmp_path / "report.json"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in package.iterdir():
            if file.is_file():
                archive.write(file, f"opmux_acme/{file.name}")
        archive.writestr("opmux_acme-0.1.0.dist-info/RECORD", "opmux_acme/__init__.py,,\n")
    for level in (3, 4):
        path.write_text(json.dumps(report(level=level)))
        command = [sys.executable, "-m", "opmux.record", str(wheel), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert names.count("opmux_acme/conformance.json") == 1
        rows = list(csv.reader(archive.read("opmux_acme-0.1.0.dist-info/RECORD").decode().split()))
        archive.extractall(tmp_path)
    (row,) = [r for r in rows if r[0] == "opmux_acme/conformance.json"]
    content = path.read_bytes()
    hashed = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    assert row[1:] == [f"sha256={hashed}", str(len(content))]
    assert acme().conformance.level == 4


def test_opmux_conform_makes_and_keeps_one(package: Path, tmp_path: Path) -> None:
    """Level 0 of a right backend: the report is found by the next process."""
    code = (
        "import sys\n"
        "from opmux.cli import main\n"
        "sys.argv = ['opmux', 'conform', 'acme', '--level', '0', '--report', 'copy.json']\n"
        "main()\n"
    )
    said = fakes.python(
        code, tmp_path, *map(Path, filter(None, sys.path)),
        env={"XDG_DATA_HOME": str(tmp_path / "data"), "OPMUX_REQUIRE_CONFORMANCE": "8"},
    )  # fmt: skip
    assert "reached: level 0" in said and "report kept in" in said
    assert json.loads((tmp_path / "copy.json").read_text())["level"] == 0
    assert acme().conformance.level == 0

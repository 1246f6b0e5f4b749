# SPDX-License-Identifier: Apache-2.0
"""A plugin that is new here is loaded in a child process first: once, and whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fakes
import opmux
import plugins
from opmux import digest, loader, quarantine
from opmux.kernel import Code

GOOD = """
import opmux, os, torch
from pathlib import Path
with open({log!r}, "a") as log:
    log.write(f"{{os.getpid()}}\\n")
{more}
def fn(x, out):
    gate, up = x.float().chunk(2, -1)
    out.copy_(torch.nn.functional.silu(gate) * up)
@opmux.hookimpl
def opmux_backend():
    return opmux.Backend("acme", "cpu", {{"silu_and_mul": opmux.Kernel(opmux.FLOATS, fn=fn)}})
"""


class Site:
    """A folder with one plugin, which notes every process that imports it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.package = folder / "site" / "opmux_acme"

    def write(self, more: str = "") -> None:
        code = GOOD.format(log=str(self.log), more=more)
        plugins.make_plugin(self.folder / "site", code=code, manifest=plugins.manifest_for())

    def load(self) -> list[loader.Failure]:
        """Load as a fresh process would and return the failures."""
        self.log.unlink(missing_ok=True)
        with fakes.on_path(self.folder / "site"):
            x = torch.randn(2, 8)
            expected = opmux.silu_and_mul(x, backend="reference")
            torch.testing.assert_close(opmux.silu_and_mul(x), expected)
            return list(opmux.failures())

    def children(self) -> int:
        """How many other processes imported the plugin."""
        pids = self.log.read_text().split() if self.log.exists() else []
        return len(set(pids) - {str(os.getpid())})

    def kept(self) -> list[Path]:
        folder = quarantine.folder()
        return sorted(folder.glob("*.json")) if folder is not None else []


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Site]:
    real = loader.discover
    fakes.isolate(monkeypatch, tmp_path)
    monkeypatch.setattr(
        loader, "discover", lambda: (e for e in real() if getattr(e, "name", "") == "acme")
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OPMUX_PROBE")
    made = Site(tmp_path)
    made.write()
    yield made
    loader.reset()


def test_once_per_digest(site: Site) -> None:
    """A second start runs no child; touching a file neither; changing one does."""
    assert (site.load(), site.children()) == ([], 1)
    assert (site.load(), site.children()) == ([], 0)
    (site.package / "__init__.py").touch()
    assert (site.load(), site.children()) == ([], 0)
    site.write("# changed")
    assert (site.load(), site.children()) == ([], 1)
    assert len(site.kept()) == 2


def test_once_per_host(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home that several hosts share holds a verdict for each."""
    site.load()
    monkeypatch.setattr(quarantine, "_cpu", lambda: "another CPU")
    assert (site.load(), site.children()) == ([], 1)


def test_it_can_be_turned_off(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPMUX_PROBE", "0")
    with fakes.on_path(site.folder / "site"):
        (loaded,) = opmux.load().backends
        assert loaded.tried is not None
        assert loaded.tried.describe() == "not tried: OPMUX_PROBE=0"
    assert site.children() == 0
    assert site.kept() == []


def test_a_crash_is_remembered(site: Site) -> None:
    """The child dies once; every start after that refuses without another one."""
    site.write("os.abort()")
    for children in (1, 0):
        (failure,) = site.load()
        assert site.children() == children
        assert failure.reason.code is Code.CRASHED
        assert "SIGABRT" in failure.reason.sentence
        assert "OPMUX_PROBE=0" in failure.reason.remedy
        assert "opmux_acme/__init__.py" in failure.detail, "where it crashed"


def test_a_death_from_outside_is_not_remembered(site: Site) -> None:
    """An out-of-memory killer today says nothing of tomorrow."""
    site.write("os.kill(os.getpid(), 9)")
    for _ in range(2):
        (failure,) = site.load()
        assert "SIGKILL" in failure.reason.sentence
        assert site.children() == 1


def test_a_hang_is_ended_with_all_it_started(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPMUX_PROBE_TIMEOUT", "0.4")
    pid = site.folder / "pid"
    site.write(
        "import subprocess, time\n"
        f"grandchild = subprocess.Popen(['sleep', '600'])\n"
        f"Path({str(pid)!r}).write_text(str(grandchild.pid))\n"
        "time.sleep(600)"
    )
    start = time.monotonic()
    (failure,) = site.load()
    assert time.monotonic() - start < 200  # not 600, also where other work stalls the machine
    assert failure.reason.sentence == "loading it did not end within 0.4 s in a child process"
    status = Path(f"/proc/{pid.read_text()}/status")
    gone = not status.exists() or "State:\tZ" in status.read_text()
    assert gone, "the grandchild lives on"
    # remembered for an hour only
    data = json.loads(site.kept()[0].read_text())
    site.load()
    assert site.children() == 0
    data["at"] -= 4000
    site.kept()[0].write_text(json.dumps(data))
    site.load()
    assert site.children() == 1


def test_a_grandchild_that_holds_the_pipe_delays_nothing(site: Site) -> None:
    site.write(
        "import subprocess\n"
        "if os.environ.get('OPMUX_PROBE') == '0':\n"
        "    subprocess.Popen(['sleep', '600'], close_fds=False)"
    )
    start = time.monotonic()
    assert site.load() == []
    assert time.monotonic() - start < 200  # not 600, also where other work stalls the machine


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 0}', '{"format": 1}', "\0\1"])
def test_a_torn_or_foreign_verdict_is_none(site: Site, text: str) -> None:
    site.load()
    (path,) = site.kept()
    path.write_text(text)
    assert (site.load(), site.children()) == ([], 1)
    assert json.loads(path.read_text())["outcome"] == "ok"


@pytest.mark.parametrize("home", ["/proc/nothing", "{file}", "relative"])
def test_without_a_place_to_keep_it(site: Site, home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home that is read-only or none: every start runs a child, and serves."""
    (site.folder / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", home.format(file=site.folder / "file"))
    if home == "relative":
        monkeypatch.setenv("HOME", "/proc/nothing")
    for _ in range(2):
        assert (site.load(), site.children()) == ([], 1)


def test_a_child_that_cannot_start_stops_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with fakes.on_path(site.folder / "site"):
        (loaded,) = opmux.load().backends
    assert loaded.tried is not None
    assert loaded.tried.describe().startswith("not tried: no child process could be started")


FIRST_CALL = "import opmux, torch\nopmux.silu_and_mul(torch.ones(2, 8), backend='acme')\n"


def test_several_processes_share_one_child(site: Site) -> None:
    """Ranks that start together: one tries the plugin, the others take its verdict."""
    paths = os.pathsep.join([str(site.folder / "site"), str(fakes.CORE), *filter(None, sys.path)])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, "-c", FIRST_CALL], env=env) for _ in range(4)]
    assert [rank.wait(120) for rank in ranks] == [0] * 4
    pids = site.log.read_text().split()
    assert len(set(pids)) == 5


def test_several_threads_share_one_child(site: Site) -> None:
    with fakes.on_path(site.folder / "site"):
        threads = [threading.Thread(target=opmux.load) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [b.name for b in opmux.load().backends] == ["acme"]
    assert site.children() == 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_may_be_the_first(site: Site) -> None:
    with fakes.on_path(site.folder / "site"):
        child = os.fork()
        if not child:
            code = 1
            try:
                torch.set_num_threads(1)
                opmux.silu_and_mul(torch.ones(2, 8), backend="acme")
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        opmux.silu_and_mul(torch.ones(2, 8), backend="acme")
    assert len(set(site.log.read_text().split())) == 3  # the fork, its child, this process


def test_errors_of_python_read_as_ever(site: Site) -> None:
    """The child is for crashes; an ImportError keeps its own sentence."""
    site.write("raise ImportError('libacme.so.2: cannot open shared object file')")
    (failure,) = site.load()
    assert failure.reason.code is Code.FAILED
    assert "libacme.so.2" in failure.reason.sentence


def test_digest_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code counts by content, data by size, caches and the report not at all."""
    package = tmp_path / "opmux_digested"
    package.mkdir()
    for name, text in (("__init__.py", "1"), ("lib.so.2", "2"), ("table.bin", "3")):
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    first = digest.package("opmux_digested")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.pyc").write_text("x")
    (package / digest.REPORT).write_text("{}")
    (package / "table.bin").write_text("4")
    assert digest.package("opmux_digested.inner:attribute") == first
    for name, text in (("lib.so.2", "9"), ("table.bin", "33"), ("new.py", "")):
        before = digest.package("opmux_digested")
        (package / name).write_text(text)
        assert digest.package("opmux_digested") != before
    assert digest.package("no_such_package") == digest.package("no_such_package_either")


def test_a_wrong_timeout_is_said(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPMUX_PROBE_TIMEOUT", "soon")
    (failure,) = site.load()
    assert "OPMUX_PROBE_TIMEOUT must be seconds, got 'soon'" in failure.reason.sentence

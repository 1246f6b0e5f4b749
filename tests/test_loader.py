# SPDX-License-Identifier: Apache-2.0
"""One bad plugin never hurts the others: every kind of broken distribution, found on disk."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import fakes
import opmux
import plugins
from opmux import loader
from opmux.kernel import Backend, Code, Kernel

HEAD = """
import opmux, torch
from pathlib import Path
from opmux.kernel import Backend, Capability, Code, Kernel, Reason
def fn(x, out):
    gate, up = x.float().chunk(2, -1)
    out.copy_(torch.nn.functional.silu(gate) * up)
SILU = {"silu_and_mul": Kernel(opmux.FLOATS, fn=fn)}
"""
HOOK = """
@opmux.hookimpl
def opmux_backend():
    return Backend(**{"name": "bad", "device": "cpu", "kernels": SILU} | dict(EXTRA))
"""
NATIVE = 'SILU = {"silu_and_mul": Kernel(opmux.FLOATS)}\n'


def plugin(extra: str = "", before: str = "") -> str:
    """Return the code of a plugin; ``extra`` are arguments of its Backend."""
    return HEAD + before + HOOK.replace("EXTRA", f"dict({extra})")


def native(library: str) -> str:
    return plugin(f"library=Path(__file__).with_name({library!r})", NATIVE)


@dataclass(frozen=True)
class Broken:
    """A plugin, and how its failure must read."""

    code: str
    failure_code: Code
    sentence: str
    manifest: Any = field(default_factory=dict)  # changes of a good one, raw text, or None
    op: str = ""  # the failure is of one op only
    at_call: bool = False  # found when a call asks the kernel, not at load
    name: str = "bad"
    entry: str | None = None
    files: dict[str, bytes] = field(default_factory=dict)


NOT_ELF = b"this is no library"
BROKEN = {
    "raises at import": Broken("raise ImportError('no libx.so.2')", Code.FAILED, "no libx.so.2"),
    "syntax error": Broken("def (:", Code.FAILED, "SyntaxError"),
    "exits at import": Broken("import sys\nsys.exit('bye')", Code.FAILED, "SystemExit: bye"),
    "imports what is not there": Broken("import no_such_module", Code.FAILED, "no_such_module"),
    "calls an op at import": Broken(
        "import opmux, torch\nopmux.silu_and_mul(torch.ones(2))",
        Code.FAILED,
        "must not call ops",
    ),
    "library is missing": Broken(native("none.so"), Code.FAILED, "none.so is missing"),
    "library is not ELF": Broken(
        native("bad.so"),
        Code.FAILED,
        "bad.so",
        {"library": {"file": "bad.so", "sha256": hashlib.sha256(NOT_ELF).hexdigest()}},
        files={"bad.so": NOT_ELF},
    ),
    "library was replaced": Broken(
        native("bad.so"),
        Code.FAILED,
        "is not the one that its manifest names",
        {"library": {"file": "bad.so", "sha256": "0" * 64}},
        files={"bad.so": NOT_ELF},
    ),
    "neither fn nor library": Broken(plugin(before=NATIVE), Code.INTERFACE, "neither fn nor lib"),
    "no manifest": Broken(plugin(), Code.INTERFACE, "has no manifest", None),
    "manifest is not JSON": Broken(plugin(), Code.INTERFACE, "cannot be read", "{'a': 1"),
    "manifest is a list": Broken(plugin(), Code.INTERFACE, "format is list", "[]"),
    "manifest of another format": Broken(plugin(), Code.INTERFACE, "format is 99", {"format": 99}),
    "manifest is not complete": Broken(plugin(), Code.INTERFACE, "not complete", '{"format": 1}'),
    "core is too old": Broken(
        plugin(),
        Code.INTERFACE,
        "it needs opmux >= 99",
        {"requires": {"opmux": ["99", ""], "torch": ["2.10", ""]}},
    ),
    "core is too new": Broken(
        plugin(),
        Code.INTERFACE,
        "it needs opmux >= 0.0.1, < 0.0.2",
        {"requires": {"opmux": ["0.0.1", "0.0.2"], "torch": ["2.10", ""]}},
    ),
    "torch is too old": Broken(
        plugin(),
        Code.INTERFACE,
        "it needs torch >= 99.1",
        {"requires": {"opmux": ["0.1", "0.2"], "torch": ["99.1", ""]}},
    ),
    "manifest and backend differ": Broken(
        plugin(),
        Code.INTERFACE,
        "disagree about ops: rmsnorm",
        {"ops": ("silu_and_mul", "rmsnorm")},
    ),
    "manifest of another backend": Broken(
        plugin(), Code.INTERFACE, "the manifest says 'other'", {"backend": "other"}
    ),
    "manifest of another device": Broken(
        plugin(), Code.INTERFACE, "manifest's device says 'cuda'", {"device": "cuda"}
    ),
    "misspelt hook": Broken(
        plugin().replace("def opmux_backend", "def opmux_backends"), Code.FAILED, "opmux_backends"
    ),
    "hook raises": Broken(
        plugin().replace("return Backend", "raise KeyError('x'); return Backend"),
        Code.FAILED,
        "KeyError: 'x'",
    ),
    "hook returns a dict": Broken(
        plugin().replace("return Backend(**", "return ("), Code.INTERFACE, "must return one Backend"
    ),
    "no hook": Broken(HEAD, Code.INTERFACE, "must return one Backend, got []"),
    "kernel is no Kernel": Broken(
        plugin(before="SILU = {'silu_and_mul': fn}\n"), Code.INTERFACE, "is not a Kernel"
    ),
    "kernel without dtypes": Broken(
        plugin(before="SILU = {'silu_and_mul': Kernel((), fn=fn)}\n"), Code.FAILED, "dtypes must be"
    ),
    "one symbol for two kernels": Broken(
        plugin(before="SILU = {'silu_and_mul': (SILU['silu_and_mul'],) * 2}\n"),
        Code.INTERFACE,
        "'silu_and_mul' is the symbol of two kernels",
    ),
    "a symbol that torch refuses": Broken(
        plugin(before="SILU = {'silu_and_mul': Kernel(opmux.FLOATS, fn=fn, symbol='a-b')}\n"),
        Code.INTERFACE,
        "'a-b' is no identifier",
    ),
    "name is taken": Broken(
        plugin("name='good'"), Code.INTERFACE, "'good' is taken by opmux-a-good", name="good"
    ),
    "name differs": Broken(
        plugin("name='other'"), Code.INTERFACE, "the entry point says 'bad'", {"backend": "other"}
    ),
    "name is reserved": Broken(
        plugin("name='reference'"), Code.INTERFACE, "'reference' is not allowed", name="reference"
    ),
    "name is no identifier": Broken(
        plugin("name='b-d'"), Code.INTERFACE, "'b-d' is not allowed", name="b-d", entry="opmux_bd"
    ),
    "entry point to nothing": Broken(
        plugin(), Code.FAILED, "no_such_attribute", entry="opmux_bad:no_such_attribute"
    ),
    "entry point is not a name": Broken(plugin(), Code.FAILED, "", entry="opmux_bad: :"),
    "check_host refuses": Broken(
        plugin("check_host=lambda: Reason(Code.RUNTIME, 'this CPU has no SSE9', 'buy one')"),
        Code.RUNTIME,
        "this CPU has no SSE9",
    ),
    "check_host raises": Broken(
        plugin("check_host=lambda: 1 / 0"), Code.FAILED, "ZeroDivisionError"
    ),
    "unknown op": Broken(
        plugin(before="SILU['silu_and_mull'] = SILU['silu_and_mul']\n"),
        Code.INTERFACE,
        "did you mean silu_and_mul",
        {"ops": ("silu_and_mul",), "extra_op": "silu_and_mull"},
        op="silu_and_mull",
    ),
    "another interface": Broken(
        plugin(),
        Code.INTERFACE,
        "built for interface 000000000000 of silu_and_mul",
        {"ops": {"silu_and_mul": "0" * 12}},
        op="silu_and_mul",
    ),
    "predicate raises": Broken(
        plugin(
            before="SILU = {'silu_and_mul': Kernel(opmux.FLOATS, fn=fn, "
            "rejects=lambda s: s.nothing)}\n"
        ),
        Code.PREDICATE,
        "its predicate raised AttributeError",
        at_call=True,
    ),
    "predicate returns a bool": Broken(
        plugin(
            before="SILU = {'silu_and_mul': Kernel(opmux.FLOATS, fn=fn, rejects=lambda s: True)}\n"
        ),
        Code.PREDICATE,
        "its predicate returned True",
        at_call=True,
    ),
    "probe raises": Broken(
        plugin("probe=lambda *_: 1 / 0"),
        Code.RUNTIME,
        "its probe raised ZeroDivisionError",
        at_call=True,
    ),
    "probe returns text": Broken(
        plugin("probe=lambda *_: 'fast'"),
        Code.RUNTIME,
        "probe returned 'fast', not a Capability",
        at_call=True,
    ),
}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    real = loader.discover
    fakes.isolate(monkeypatch, tmp_path)
    monkeypatch.setattr(loader, "discover", real)
    yield
    loader.reset()


def _write(folder: Path, case: Broken) -> None:
    manifest = case.manifest
    if isinstance(manifest, dict):
        changes = dict(manifest)
        ops = changes.pop("ops", ("silu_and_mul",))
        made = plugins.manifest_for(case.name, ops if isinstance(ops, tuple) else (), **changes)
        if isinstance(ops, dict):
            made["ops"] = ops
        if "extra_op" in made:
            made["ops"][made.pop("extra_op")] = "0" * 12
        manifest = made
    entry = case.entry or f"opmux_{case.name}_b"
    plugins.make_plugin(folder, "opmux-z-bad", case.name, case.code, manifest, entry)
    for name, content in case.files.items():
        (folder / entry.partition(":")[0] / name).write_bytes(content)


def _good(folder: Path, name: str = "good") -> None:
    code = plugin(f"name={name!r}")
    plugins.make_plugin(folder, f"opmux-a-{name}", name, code, plugins.manifest_for(name))


@pytest.mark.parametrize("kind", sorted(BROKEN))
def test_a_broken_plugin_hurts_nobody(kind: str, tmp_path: Path) -> None:
    """The good plugin works, the failure has its code, every "no kernel" error names it."""
    case = BROKEN[kind]
    _good(tmp_path)
    _write(tmp_path, case)
    x = torch.randn(3, 8)
    with fakes.on_path(tmp_path):
        expected = opmux.silu_and_mul(x, backend="reference")
        assert torch.equal(opmux.silu_and_mul(x, backend="good"), expected)
        torch.testing.assert_close(opmux.silu_and_mul(x), expected)
        found = [f for f in opmux.failures() if f.dist == "opmux-z-bad"]
        if case.at_call:
            assert found == []
        else:
            assert len(found) == 1
            assert found[0].reason.code is case.failure_code
            assert case.sentence in found[0].reason.sentence
            assert (found[0].backend, found[0].op) == (case.name, case.op)
            assert str(found[0]).startswith(f"{case.name} (opmux-z-bad")
        if case.name not in ("bad", "b-d"):
            return  # naming it names another backend
        broken_op = case.op if case.op in ("", "silu_and_mul") else None
        if broken_op is None:  # only an op that no core knows is refused: the rest serves
            assert torch.equal(opmux.silu_and_mul(x, backend=case.name), expected)
            return
        with pytest.raises(opmux.NoKernelError) as caught:
            opmux.silu_and_mul(x, backend=case.name)
        line = next(v for v in str(caught.value).splitlines() if v.split()[0] == case.name)
        assert case.failure_code.value in line
        assert case.sentence in line


def test_at_least_fourteen_kinds() -> None:
    """The list above must not shrink."""
    assert len(BROKEN) >= 14


def test_all_broken_plugins_at_once(tmp_path: Path) -> None:
    """Failures are independent; their order does not follow the file system."""
    kinds = [k for k, case in sorted(BROKEN.items()) if case.name == "bad" and not case.entry]
    folders = []
    for i, kind in enumerate(kinds):
        folders.append(tmp_path / str(i))
        case = BROKEN[kind]
        _write(folders[-1], Broken(**{**case.__dict__, "entry": f"opmux_bad_{i}"}))
        old = next(folders[-1].glob("*.dist-info"))
        text = (old / "METADATA").read_text().replace("opmux-z-bad", f"opmux-z{i:02}")
        (old / "METADATA").write_text(text)
        old.rename(old.with_name(f"opmux_z{i:02}-0.1.0.dist-info"))
    _good(tmp_path / "good")
    texts = set()
    for order in (folders, folders[::-1]):
        with fakes.on_path(*order, tmp_path / "good"):
            opmux.silu_and_mul(torch.randn(2, 8), backend="good")
            text = "\n".join(str(f) for f in opmux.failures() if "opmux-z" in f.dist)
            texts.add(re.sub("0x[0-9a-f]+", "ADDRESS", text))
    assert len(texts) == 1
    assert len(texts.pop().splitlines()) >= len(kinds) - 5  # some fail at the call only


# ---- native libraries, without torch in them ----

C_SOURCE = """
const char* opmux_interface(void) { return "%s"; }
const char* opmux_register(const char* ns) { return %s; }
const char* opmux_info(void) { return "%s"; }
"""


@pytest.mark.parametrize(
    ("source", "code", "sentence"),
    [
        ("int nothing;", Code.INTERFACE, "does not export opmux_interface"),
        (
            C_SOURCE % ("silu_and_mul(Tensor,int,Tensor!)\\n", "0", "{}"),
            Code.INTERFACE,
            "the library implements silu_and_mul(Tensor,int,Tensor!), core defines "
            "silu_and_mul(Tensor,Tensor!)",
        ),
        (C_SOURCE % ("", "0", "{}"), Code.INTERFACE, "the library implements nothing"),
        (
            C_SOURCE % ("silu_and_mul(Tensor,Tensor!)\\n", '"this CPU has no AVX9"', "{}"),
            Code.RUNTIME,
            "this CPU has no AVX9",
        ),
        (C_SOURCE % ("silu_and_mul(Tensor,Tensor!)\\n", "0", "{"), Code.FAILED, "JSONDecodeError"),
        ("void no_such_function(void); void* p = no_such_function;", Code.FAILED, "no_such_func"),
    ],
    ids=["no exports", "wrong type", "no op", "register refuses", "bad info", "undefined symbol"],
)
def test_a_broken_library(
    source: str, code: Code, sentence: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """What a library says of itself is compared before anything in it is registered."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler on this machine")
    (tmp_path / "bad.c").write_text(source)
    built = tmp_path / "bad.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", built, tmp_path / "bad.c"], check=True, timeout=60
    )
    content = built.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    changes = {"library": {"file": "bad.so", "sha256": digest}}
    name = "lib_" + request.node.callspec.id.replace(" ", "_")  # its own torch namespace
    text = native("bad.so").replace('"name": "bad"', f'"name": {name!r}')
    files = {"bad.so": content}
    _write(tmp_path, Broken(text, code, sentence, changes, name=name, files=files))
    _good(tmp_path)
    with fakes.on_path(tmp_path):
        opmux.silu_and_mul(torch.randn(2, 8), backend="good")
        (found,) = [f for f in opmux.failures() if f.dist == "opmux-z-bad"]
        assert found.reason.code is code
        assert sentence in found.reason.sentence
        assert not hasattr(getattr(torch.ops, f"opmux_{name}"), "silu_and_mul")
        with pytest.raises(opmux.NoKernelError, match=name):
            opmux.silu_and_mul(torch.randn(2, 8), backend=name)


def test_malformed_entry_points_of_one_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "opmux_broken-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: opmux-broken\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[opmux.backends]\nno equals sign here\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    loader.reset()
    try:
        assert opmux.silu_and_mul(torch.ones(1, 2)).shape == (1, 1)
        assert any("opmux_broken" in f.dist for f in opmux.failures())
    finally:
        monkeypatch.undo()
        loader.reset()


def test_a_distribution_without_metadata(tmp_path: Path) -> None:
    """A half-removed distribution has no name to sort by."""
    _good(tmp_path)
    _write(tmp_path, BROKEN["raises at import"])
    (tmp_path / "opmux_z_bad-0.1.0.dist-info" / "METADATA").unlink()
    with fakes.on_path(tmp_path):
        opmux.silu_and_mul(torch.randn(2, 8), backend="good")
        (found,) = [f for f in opmux.failures() if f.backend == "bad"]
        assert "no libx.so.2" in str(found)


# ---- deny list, laziness ----


@pytest.mark.parametrize("where", ["environment", "toml"])
def test_a_denied_plugin_is_not_imported(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it runs, and errors say who denied it."""
    marker = tmp_path / "imported"
    code = plugin(before=f"Path({str(marker)!r}).touch()\n")
    _write(tmp_path, Broken(code, Code.DENIED, ""))
    if where == "environment":
        monkeypatch.setenv("OPMUX_BACKENDS", "-bad")
    else:
        Path("opmux.toml").write_text('backends = ["-bad", "*"]')
    with fakes.on_path(tmp_path):
        (found,) = [f for f in opmux.failures() if f.backend == "bad"]
        assert found.reason.code is Code.DENIED
        assert not marker.exists()
        with pytest.raises(opmux.NoKernelError, match="denied: excluded by"):
            opmux.silu_and_mul(torch.randn(2, 8), backend="bad")
        assert not marker.exists()
    monkeypatch.delenv("OPMUX_BACKENDS", raising=False)
    Path("opmux.toml").unlink(missing_ok=True)
    with fakes.on_path(tmp_path):
        opmux.silu_and_mul(torch.randn(2, 8), backend="bad")
        assert marker.exists()


def test_importing_opmux_loads_nothing(tmp_path: Path) -> None:
    """Plugins are imported by the first call; a failure and the rest are as in-process."""
    _write(tmp_path, Broken(plugin(before="print('IMPORTED')\n"), Code.FAILED, ""))
    said = fakes.python(
        "import opmux, sys, torch\n"
        "from opmux import loader\n"
        "op = opmux.silu_and_mul\n"
        "assert loader._registry is None and 'opmux_bad_b' not in sys.modules\n"
        "print('FIRST CALL')\n"
        "op(torch.randn(2, 8)); op(torch.randn(2, 8)); opmux.load()\n",
        tmp_path,
    )
    assert said.split() == ["FIRST", "CALL", "IMPORTED"]


# ---- threads, fork, rollback ----


def test_eight_threads_load_once(tmp_path: Path) -> None:
    """The race for the first call has one winner, and all see its registry."""
    marker = tmp_path / "log"
    slow = f"import time\nwith open({str(marker)!r}, 'a') as f: f.write('x')\ntime.sleep(0.2)\n"
    _write(tmp_path, Broken(plugin(before=slow), Code.FAILED, ""))
    with fakes.on_path(tmp_path):
        start = threading.Barrier(8)
        results: list[Any] = []

        def first_call() -> None:
            start.wait()
            opmux.silu_and_mul(torch.ones(2, 8), backend="bad")
            results.append(opmux.load())

        threads = [threading.Thread(target=first_call) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(results) == 8
        assert len(set(map(id, results))) == 1
        assert marker.read_text() == "x"


def _in_child() -> int:
    """Fork; the child calls the op. Return its exit status; never hangs."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            with torch.inference_mode():
                out = opmux.silu_and_mul(torch.ones(2, 8), backend="bad")
            code = 0 if out.shape == (2, 4) else 2
        finally:
            os._exit(code)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError("the forked child hangs")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork_before_during_and_after_load(tmp_path: Path) -> None:
    """A child has a registry of its own or its parent's, never half of one or a held lock."""
    _write(tmp_path, Broken(plugin(before="import time\ntime.sleep(0.3)\n"), Code.FAILED, ""))
    with fakes.on_path(tmp_path):
        assert _in_child() == 0  # before
        thread = threading.Thread(target=opmux.load)
        thread.start()
        time.sleep(0.1)
        assert _in_child() == 0  # during
        thread.join()
        opmux.silu_and_mul(torch.ones(2, 8), backend="bad")
        assert _in_child() == 0  # after


def test_rollback_leaves_no_torch_op(tmp_path: Path) -> None:
    """The second kernel's schema is taken, so the first one's must go again."""
    clash = (
        "LIBRARY = torch.library.Library('opmux_rolled', 'FRAGMENT')\n"
        "LIBRARY.define('silu_and_mul(Tensor x) -> ()')\n"
        "SILU = {'gelu_quick': Kernel(opmux.FLOATS, fn=fn)} | SILU\n"
    )
    code = plugin("name='rolled'", clash)
    ops = ("gelu_quick", "silu_and_mul")
    _write(tmp_path, Broken(code, Code.FAILED, "", {"ops": ops}, name="rolled"))
    with fakes.on_path(tmp_path):
        (found,) = [f for f in opmux.failures() if f.backend == "rolled"]
        assert found.reason.code is Code.FAILED
        assert "silu_and_mul" in found.reason.sentence
        assert "Traceback" in found.detail
        assert not hasattr(torch.ops.opmux_rolled, "gelu_quick")
        assert not torch._C._dispatch_has_kernel("opmux_rolled::gelu_quick")
        sys.modules["opmux_rolled_b"].LIBRARY._destroy()


def test_loading_again_after_reset(tmp_path: Path) -> None:
    """A plugin that was repaired is in service after a reset."""
    _write(tmp_path, BROKEN["no manifest"])
    with fakes.on_path(tmp_path):
        assert [f.backend for f in opmux.failures() if f.dist == "opmux-z-bad"] == ["bad"]
        _write(tmp_path, Broken(plugin(), Code.FAILED, ""))
        loader.reset()
        assert [f for f in opmux.failures() if f.dist == "opmux-z-bad"] == []
        opmux.silu_and_mul(torch.ones(2, 8), backend="bad")


def test_core_checks_calls_of_python_kernels() -> None:
    """A Python callable gets only calls that the definition allows: it may not check a thing."""
    ran = fakes.recorder("acme")
    fakes.serve(Backend("acme", "cpu", {"rmsnorm": Kernel(opmux.FLOATS, fn=ran)}))
    x = torch.randn(2, 8)
    for weight in (torch.ones(4), torch.ones(8, dtype=torch.int32), torch.ones(8, device="meta")):
        with pytest.raises((ValueError, TypeError), match="rmsnorm: weight must"):
            opmux.rmsnorm(x, weight, out=torch.empty(2, 8), backend="acme")
    with pytest.raises(ValueError, match="rmsnorm: out must have shape"):
        opmux.rmsnorm(x, torch.ones(8), out=torch.empty(1, 8), backend="acme")
    assert fakes.RAN == []
    opmux.rmsnorm(x, torch.ones(8), backend="acme")
    assert fakes.RAN == ["acme"]

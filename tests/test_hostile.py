# SPDX-License-Identifier: Apache-2.0
"""Plugins that would end, hang or bend the process: all installed at once, and opmux serves.

tests/test_loader.py has the plugins that are merely broken. These are loaded in child processes
first; what gets past the child is refused here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import fakes
import plugins

CC = shutil.which("cc") or shutil.which("gcc")
HEAD = """
import ctypes, os, signal, sys, time
from pathlib import Path
import opmux, torch
from opmux.kernel import Backend, Capability, Kernel, Reason
def fn(x, out):
    gate, up = x.float().chunk(2, -1)
    out.copy_(torch.nn.functional.silu(gate) * up)
NAME = __name__.removeprefix("opmux_")
EXTRA = {}
"""
HOOK = """
@opmux.hookimpl
def opmux_backend():
    return Backend(**{"name": NAME, "device": "cpu",
                      "kernels": {"silu_and_mul": Kernel(opmux.FLOATS, fn=fn)}} | EXTRA)
"""
LIBRARY = """
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>
const char* opmux_interface(void) { return ""; }
const char* opmux_info(void) { return "{}"; }
"""
REGISTER = "const char* opmux_register(const char* ns) { %s return 0; }\n"
CONSTRUCTOR = "__attribute__((constructor)) void start(void) { %s }\n" + REGISTER % ""
SEGFAULT = "ctypes.string_at(1)"
WITH_LIBRARY = "EXTRA = {'library': Path(__file__).with_name('bad.so')}"


@dataclass(frozen=True)
class Hostile:
    """A plugin, the code of its failure and what must be said of it."""

    code: str
    reason: str
    words: str
    library: str = ""  # C
    damage: str = ""  # what is done to the library afterwards
    manifest: dict[str, Any] = field(default_factory=dict)
    raw: str | None = None  # code without anything around it
    alone: bool = False  # it is refused without a child, too


def probing(code: str) -> str:
    return (
        f"def probe(device, info):\n    {code}\n    return Capability()\nEXTRA = {{'probe': probe}}"
    )


def host(code: str) -> str:
    return f"def check():\n    {code}\nEXTRA = {{'check_host': check}}"


HOSTILE = {
    # ends the process
    "crash_at_import": Hostile(SEGFAULT, "crashed", "SIGSEGV"),
    "abort_at_import": Hostile("os.abort()", "crashed", "SIGABRT"),
    "kills_itself": Hostile("os.kill(os.getpid(), 9)", "crashed", "SIGKILL"),
    "illegal_instruction": Hostile(
        WITH_LIBRARY, "crashed", "SIGILL (an instruction that this CPU lacks)",
        LIBRARY + CONSTRUCTOR % "__builtin_trap();",
    ),
    "division_at_load": Hostile(
        WITH_LIBRARY, "crashed", "SIGFPE", LIBRARY + CONSTRUCTOR % "raise(SIGFPE);"
    ),
    "abort_in_register": Hostile(
        WITH_LIBRARY, "crashed", "SIGABRT", LIBRARY + REGISTER % "abort();"
    ),
    "exit_in_register": Hostile(
        WITH_LIBRARY, "crashed", "exit status 5", LIBRARY + REGISTER % "_exit(5);"
    ),
    "exit_at_import": Hostile("os._exit(0)", "crashed", "exit status 0"),
    "exit_in_check_host": Hostile(host("os._exit(7)"), "crashed", "exit status 7"),
    "crash_in_probe": Hostile(probing(SEGFAULT), "crashed", "SIGSEGV"),
    "exit_in_probe": Hostile(probing("os._exit(3)"), "crashed", "exit status 3"),
    "recursion_in_c": Hostile(
        WITH_LIBRARY, "crashed", "SIGSEGV",
        LIBRARY + "int deep(int n) { volatile char b[4096]; b[0] = n; return deep(n + 1) + b[0]; }"
        + REGISTER % "if (deep(0)) return ns;",
    ),
    # does not end
    "hang_at_import": Hostile("time.sleep(600)", "crashed", "did not end within"),
    "hang_at_load": Hostile(
        WITH_LIBRARY, "crashed", "did not end within", LIBRARY + CONSTRUCTOR % "for (;;) pause();"
    ),
    "hang_in_probe": Hostile(probing("time.sleep(600)"), "crashed", "did not end within"),
    "deaf_hang": Hostile(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)", "crashed", "did not end"
    ),
    # raises what nobody raises
    "raises_keyboard_interrupt": Hostile("raise KeyboardInterrupt", "crashed", "SIGINT"),
    "raises_base_exception": Hostile(
        "class Stop(BaseException): pass\nraise Stop('enough')", "crashed", "exit status 1"
    ),
    "recursion_at_import": Hostile(
        "def deep(): deep()\ndeep()", "failed to load", "RecursionError", alone=True
    ),
    "out_of_memory": Hostile("bytearray(1 << 60)", "failed to load", "MemoryError", alone=True),
    # libraries that are none for this machine
    "cut_library": Hostile(
        WITH_LIBRARY, "crashed", "SIGBUS", LIBRARY + REGISTER % "", "cut"
    ),
    "library_for_another_machine": Hostile(
        WITH_LIBRARY, "failed to load", "bad.so", LIBRARY + REGISTER % "", "machine", alone=True
    ),
    "library_for_32_bits": Hostile(
        WITH_LIBRARY, "failed to load", "wrong ELF class", LIBRARY + REGISTER % "", "class",
        alone=True,
    ),
    # bends the process
    "default_dtype": Hostile(
        "torch.set_default_dtype(torch.float64)", "crashed", "default dtype from torch.float32",
        alone=True,
    ),
    "default_device": Hostile(
        "torch.set_default_device('meta')", "crashed", "default device", alone=True
    ),
    "threads": Hostile(
        "torch.set_num_threads(torch.get_num_threads() + 1)", "crashed", "number of threads",
        alone=True,
    ),
    "gradients": Hostile("torch.set_grad_enabled(False)", "crashed", "gradient mode", alone=True),
    "seed": Hostile("torch.manual_seed(7)", "crashed", "torch's seed", alone=True),
    "denormals": Hostile("torch.set_flush_denormal(True)", "crashed", "denormal", alone=True),
    "deterministic": Hostile(
        "torch.use_deterministic_algorithms(True)", "crashed", "deterministic", alone=True
    ),
    "patched_function": Hostile(
        "torch.nn.functional.silu = lambda x: x * 0", "crashed", "functions of torch.nn.functional",
        alone=True,
    ),
    "patched_method": Hostile(
        "torch.Tensor.copy_ = lambda self, other: self", "crashed", "methods of torch.Tensor",
        alone=True,
    ),
    "kernel_of_torch": Hostile(
        "L = torch.library.Library('aten', 'IMPL')\n"
        "L.impl('softplus', lambda *a: a[0] * 0, 'CPU')", "crashed", "kernels of torch's own ops",
    ),
    "poisoned_modules": Hostile(
        "sys.modules['opmux.kernel'] = None", "crashed", "the modules torch and opmux", alone=True
    ),
    "working_directory": Hostile("os.chdir('/')", "crashed", "working directory", alone=True),
    "signal_handlers": Hostile(
        "signal.signal(signal.SIGINT, lambda *_: None)", "crashed", "SIGINT", alone=True
    ),
    "closes_files": Hostile("os.closerange(3, 4096)", "crashed", ""),
    # takes what is another's
    "defines_an_op_of_core": Hostile(
        "from opmux.op import op\n"
        "@op\ndef silu_and_mul(x: torch.Tensor) -> torch.Tensor: return x\n",
        "failed to load", "silu_and_mul is defined twice", alone=True,
    ),
    "twice_the_same_symbol": Hostile(
        "K = Kernel(opmux.FLOATS, fn=fn, symbol='one')\n"
        "EXTRA = {'kernels': {'silu_and_mul': (K, K)}}",
        "interface", "'one' is the symbol of two kernels", alone=True,
    ),
    "names_another_backend": Hostile(
        "NAME = 'good'", "interface", "the entry point says", alone=True
    ),
    # lies in its manifest
    "manifest_too_deep": Hostile(
        "", "failed to load", "RecursionError", raw="[" * 100_000, alone=True
    ),
    "manifest_of_bytes": Hostile("", "interface", "cannot be read", raw="\0\1\2", alone=True),
    "manifest_lies_about_the_digest": Hostile(
        WITH_LIBRARY, "failed to load", "not the one that its manifest names",
        LIBRARY + REGISTER % "", "after", alone=True,
    ),
    "manifest_lies_about_the_device": Hostile(
        "", "interface", "manifest's device says 'cuda'", manifest={"device": "cuda"}, alone=True
    ),
    "manifest_lies_about_ops": Hostile(
        "", "interface", "disagree about ops", manifest={"ops": {"rmsnorm": "0" * 12}}, alone=True
    ),
}  # fmt: skip

SCRIPT = """
import json, sys, time
import torch
import opmux
before = torch.get_num_threads()
x = torch.randn(3, 8)
gate, up = x.chunk(2, -1)
expected = torch.nn.functional.silu(gate) * up
start = time.time()
torch.testing.assert_close(opmux.silu_and_mul(x), expected)
assert opmux.silu_and_mul.explain(x).winner.backend == "good"
torch.testing.assert_close(opmux.silu_and_mul(x, backend="reference"), expected)
assert (torch.get_num_threads(), torch.get_default_dtype()) == (before, torch.float32)
from click.testing import CliRunner
from opmux.cli.app import cli
done = CliRunner().invoke(cli, ["doctor", "--json"])
assert done.exit_code == 0, done.output
data = json.loads(done.output)
data["seconds"] = time.time() - start
data["table"] = CliRunner().invoke(cli, ["doctor"]).output
print("\\n" + json.dumps(data))
"""


def compile_library(path: Path, source: str, damage: str) -> None:
    assert CC is not None
    path.with_suffix(".c").write_text(source)
    command = [CC, "-shared", "-fPIC", "-O0", "-o", str(path), str(path.with_suffix(".c"))]
    subprocess.run(command, check=True, timeout=60)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[len(data) // 3 :]
    elif damage == "machine":
        data[18] = 0xF3 if data[18] != 0xF3 else 0x3E  # RISC-V
    elif damage == "class":
        data[4] = 1
    path.write_bytes(data)


def write(site: Path, name: str, case: Hostile) -> None:
    manifest = plugins.manifest_for(name)
    package = site / f"opmux_{name}"
    package.mkdir()
    if case.library:
        library = package / "bad.so"
        compile_library(library, case.library, case.damage)
        digest = hashlib.sha256(library.read_bytes()).hexdigest()
        manifest["library"] = {"file": "bad.so", "sha256": digest}
        if case.damage == "after":
            with library.open("ab") as file:
                file.write(b"\0")
    plugins.make_plugin(
        site, f"opmux-h-{name.replace('_', '-')}", name, HEAD + case.code + HOOK,
        {**manifest, **case.manifest} if case.raw is None else case.raw,
    )  # fmt: skip


def doctor(folder: Path, names: list[str], **env: str) -> dict[str, Any]:
    """Install a good plugin and hostile ones, call an op, and return what doctor says."""
    site = folder / "site"
    site.mkdir()
    (site / "opmux_good").mkdir()
    plugins.make_plugin(site, "opmux-good", "good", HEAD + HOOK, plugins.manifest_for("good"))
    for name in names:
        write(site, name, HOSTILE[name])
    said = fakes.python(
        SCRIPT, site, *map(Path, filter(None, sys.path)),
        env={"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1", **env,
             "OPMUX_BACKENDS": "-cpu_amx,*"},
        timeout=400,
    )  # fmt: skip
    return dict(json.loads(said.splitlines()[-1]))


def possible(name: str) -> bool:
    return CC is not None or not HOSTILE[name].library


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    names = [name for name in HOSTILE if possible(name)]
    folder = tmp_path_factory.mktemp("hostile")
    return doctor(folder, names, OPMUX_PROBE="1", OPMUX_PROBE_TIMEOUT="10")


@pytest.mark.parametrize("name", HOSTILE)
def test_it_hurts_nobody_and_is_named(report: dict[str, Any], name: str) -> None:
    """All are there at once: the good one served, and doctor names each with its reason."""
    if not possible(name):
        pytest.skip("no C compiler on this machine")
    case = HOSTILE[name]
    (failure,) = [f for f in report["failures"] if f["backend"] == name]
    assert failure["code"] == case.reason, failure
    assert case.words in failure["reason"], failure
    assert failure["dist"] == f"opmux-h-{name.replace('_', '-')}"
    if case.reason == "crashed":
        assert failure["remedy"]
    assert name in report["table"].replace("\n", "") or name[:8] in report["table"]


def test_only_the_good_one_is_in_service(report: dict[str, Any]) -> None:
    assert [b["name"] for b in report["backends"]] == ["good"]


def test_there_are_enough() -> None:
    assert len(HOSTILE) >= 20


def test_without_a_child(tmp_path: Path) -> None:
    """OPMUX_PROBE=0: what does not end the process is refused here, and put back."""
    names = [name for name, case in HOSTILE.items() if case.alone and possible(name)]
    data = doctor(tmp_path, names, OPMUX_PROBE="0")
    ours = {"cpu_amx", "cuda", "rocm", "musa"}  # refused where the hardware is not theirs
    assert {f["backend"] for f in data["failures"]} - ours == set(names)
    for name in names:
        (failure,) = [f for f in data["failures"] if f["backend"] == name]
        assert failure["code"] == HOSTILE[name].reason, failure
        assert HOSTILE[name].words in failure["reason"], failure


def test_squatting_on_another_backends_ops(tmp_path: Path) -> None:
    """Whoever takes the torch ops of another backend stops that one, and not the op."""
    site = tmp_path / "site"
    squat = (
        "L = torch.library.Library('opmux_good', 'DEF')\nL.define('silu_and_mul(Tensor x) -> ()')"
    )
    plugins.make_plugin(site, "opmux-good", "good", HEAD + HOOK, plugins.manifest_for("good"))
    code = HEAD + squat + HOOK
    plugins.make_plugin(
        site, "opmux-a-squatter", "squatter", code, plugins.manifest_for("squatter")
    )
    said = fakes.python(
        "import opmux, torch\n"
        "x = torch.randn(3, 8)\n"
        "expected = opmux.silu_and_mul(x, backend='reference')\n"
        "torch.testing.assert_close(opmux.silu_and_mul(x), expected)\n"
        "print(*opmux.failures(), sep='\\n')\n",
        site, *map(Path, filter(None, sys.path)), env={"OPMUX_BACKENDS": "-cpu_amx,*"},
    )  # fmt: skip
    assert "good (opmux-good" in said

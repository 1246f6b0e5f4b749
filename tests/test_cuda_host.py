# SPDX-License-Identifier: Apache-2.0
"""What the CUDA backend says of a host before it loads anything, and of each GPU after."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import opmux
from opmux import Code, Reason

SOURCES = Path(__file__).resolve().parent.parent / "backends" / "cuda" / "src"
ARCHS = "80,89,90a,100a,120a,120-virtual"
INFO = {"archs": ARCHS, "toolkit": "13.0"}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module from the sources, as in a wheel built with CUDA 13.0 on a host that it suits."""
    monkeypatch.syspath_prepend(SOURCES)
    for name in [name for name in sys.modules if name.partition(".")[0] == "opmux_cuda"]:
        monkeypatch.delitem(sys.modules, name)
    module = importlib.import_module("opmux_cuda.host")
    monkeypatch.setattr(module, "_toolkit", lambda: "13.0")
    monkeypatch.setattr(module.ctypes, "CDLL", driver(13000))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] == "opmux_cuda"]:
        del sys.modules[name]  # an installed one comes back with monkeypatch


def driver(version: int | None, error: int = 0) -> Callable[[str], Any]:
    """Return a CDLL whose libcuda.so.1 supports a CUDA version."""

    class Driver:
        def __init__(self, name: str) -> None:
            assert name == "libcuda.so.1"
            if version is None:
                raise OSError(f"{name}: cannot open shared object file")

        @staticmethod
        def cuDriverGetVersion(pointer: Any) -> int:
            pointer._obj.value = version
            return error

    return Driver


def sentence(reason: Reason | None) -> str:
    """Every refusal names a stable code, says why, and what to do."""
    assert reason is not None and reason.code in (Code.RUNTIME, Code.ARCH) and reason.remedy
    return f"{reason.sentence} ({reason.remedy})"


def test_a_suitable_host_is_not_refused(host: ModuleType) -> None:
    assert host.check_host() is None


@pytest.mark.parametrize(
    ("cuda", "hip", "words"),
    [
        (None, None, ("was built without CUDA", "install a CUDA build of torch")),
        (None, "7.2", ("ROCm build (7.2)", "use the backend rocm")),
        ("12.9", None, ("torch is built for CUDA 12.9, the kernels for CUDA 13", "torch for CUDA")),
        ("14.0", None, ("torch is built for CUDA 14.0, the kernels for CUDA 13", "opmux-cuda")),
    ],
)
def test_another_torch_is_refused(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch, cuda: str, hip: str, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert all(word in sentence(host.check_host()) for word in words)


@pytest.mark.parametrize(
    ("cdll", "words"),
    [
        (driver(None), ("no NVIDIA driver is installed", "install the driver; in a container")),
        (driver(12080), ("supports CUDA 12.8, the kernels need 13.0", "driver for CUDA 13.0")),
        (driver(0, error=34), ("not a working driver", "error 34", "stubs")),
    ],
)
def test_a_driver_that_does_not_suit_is_refused(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch, cdll: Any, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(host.ctypes, "CDLL", cdll)
    assert all(word in sentence(host.check_host()) for word in words)


def test_a_cuda_12_wheel_needs_a_driver_that_unpacks_its_code(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_toolkit", lambda: "12.8")
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(host.ctypes, "CDLL", driver(12020))
    assert "the kernels need 12.4" in sentence(host.check_host())
    monkeypatch.setattr(host.ctypes, "CDLL", driver(12040))
    assert host.check_host() is None


def gpus(monkeypatch: pytest.MonkeyPatch, *found: tuple[str, tuple[int, int]]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: found[i][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: found[i][1])


H200, A10, T4 = ("NVIDIA H200", (9, 0)), ("NVIDIA A10", (8, 6)), ("Tesla T4", (7, 5))


@pytest.mark.parametrize(
    ("arch", "served"),
    [
        ("80", [(8, 0), (8, 6), (8, 9)]),
        ("89", [(8, 9)]),
        ("90a", [(9, 0)]),
        ("100f", [(10, 0), (10, 3)]),
        ("120a", [(12, 0)]),
        ("120-virtual", [(12, 0), (12, 1)]),
        ("90a-virtual", [(9, 0)]),
    ],
)
def test_which_gpu_runs_which_code(
    host: ModuleType, arch: str, served: list[tuple[int, int]]
) -> None:
    known = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1))
    assert [gpu for gpu in known if host.runs_on(arch, *gpu)] == served


def test_a_gpu_of_a_built_arch_is_served(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, H200)
    found = host.probe(torch.device("cuda", 0), INFO)
    assert found.arch == "sm90" and found.refused is None
    assert dict(found.facts)["gpu"] == "NVIDIA H200"


def test_an_older_gpu_is_refused(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, T4)
    text = sentence(host.probe(torch.device("cuda", 0), INFO).refused)
    assert "Tesla T4 has compute capability 7.5" in text and "before compute capability 8.0" in text


def test_a_gpu_that_was_left_out_is_refused(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, A10)
    text = sentence(host.probe(torch.device("cuda", 0), {**INFO, "archs": "90a"}).refused)
    assert "the kernels were built for 90a" in text and "OPMUX_CUDA_ARCHS=86" in text


def test_a_later_gpu_needs_a_driver_that_compiles_the_ptx(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, ("GPU of tomorrow", (13, 0)))
    monkeypatch.setattr(host, "_toolkit", lambda: "13.5")
    monkeypatch.setattr(host.ctypes, "CDLL", driver(13050))
    assert host.probe(torch.device("cuda", 0), INFO).refused is None
    monkeypatch.setattr(host.ctypes, "CDLL", driver(13040))
    text = sentence(host.probe(torch.device("cuda", 0), INFO).refused)
    assert "PTX of CUDA 13.5" in text and "supports CUDA 13.4" in text


def test_gpus_of_several_generations_answer_for_themselves(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, H200, T4, A10)
    answers = [host.probe(torch.device("cuda", i), INFO) for i in range(3)]
    assert [a.arch for a in answers] == ["sm90", "sm75", "sm86"]
    assert [a.refused is None for a in answers] == [True, False, True]
    whole = host.probe(torch.device("cuda"), INFO)
    facts = dict(whole.facts)
    assert whole.refused is None and facts["gpu"] == "NVIDIA H200"
    assert facts["cuda:1"] == "Tesla T4, sm75, not served"
    assert facts["cuda:2"] == "NVIDIA A10, sm86, served"


@pytest.mark.parametrize(
    ("visible", "words"),
    [(None, "the driver reports no GPU"), ("", "CUDA_VISIBLE_DEVICES is ''")],
)
def test_no_gpu_is_a_refusal_not_an_error(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch, visible: str | None, words: str
) -> None:
    gpus(monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert words in sentence(host.probe(torch.device("cuda"), INFO).refused)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("Cannot re-initialize CUDA in forked subprocess.\nTo use ...", "the method spawn"),
        ("Unexpected error from cudaGetDeviceCount()", "check nvidia-smi"),
    ],
)
def test_cuda_that_cannot_be_used_is_a_refusal(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch, error: str, words: str
) -> None:
    def fails(_: int) -> str:
        raise RuntimeError(error)

    gpus(monkeypatch, H200)
    monkeypatch.setattr(torch.cuda, "get_device_name", fails)
    text = sentence(host.probe(torch.device("cuda", 0), INFO).refused)
    assert words in text and error.splitlines()[0] in text


# ---- the wheel itself, where it is installed ----

# Whoever initialises it ends the process: importing and loading may ask for the version only.
DRIVER = """
#include <stdio.h>
#include <stdlib.h>
int cuDriverGetVersion(int* version) { *version = VERSION; return 0; }
int cuInit(unsigned flags) { fputs("CUDA was initialised\\n", stderr); abort(); }
"""


@pytest.fixture(scope="module")
def wheel() -> str:
    spec = importlib.util.find_spec("opmux_cuda")
    if spec is None or spec.origin is None or str(SOURCES) in spec.origin:
        pytest.skip("opmux-cuda is not installed")
    build = json.loads(Path(spec.origin).with_name("build.json").read_text())
    return str(build["toolkit"])


@pytest.fixture
def child(wheel: str, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python where torch believes that it was built for CUDA, beside a driver that lies."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("g++")
    assert compiler is not None
    source = tmp_path / "driver.c"
    source.write_text(DRIVER)

    def run(code: str, version: int = 99000) -> subprocess.CompletedProcess[str]:
        command = [compiler, "-x", "c", "-shared", "-fPIC", f"-DVERSION={version}", str(source)]
        subprocess.run([*command, "-o", str(tmp_path / "libcuda.so.1")], check=True)
        head = f"import torch\ntorch.version.hip, torch.version.cuda = None, {wheel!r}\n"
        env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
        return subprocess.run(
            [sys.executable, "-c", head + code],
            capture_output=True,
            text=True,
            check=False,
            env=env,
        )

    return run


def test_loading_initialises_nothing_and_a_child_can_load_too(
    child: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    code = """
import os, opmux
def look():
    names = [b.name for b in opmux.load().backends]
    assert "cuda" in names, opmux.failures()
    assert not torch.cuda.is_initialized()
if os.fork() == 0:  # before: the child loads by itself
    look()
    os._exit(0)
assert os.waitpid(-1, 0)[1] == 0
look()
if os.fork() == 0:  # after: it inherits what was loaded
    look()
    os._exit(0)
assert os.waitpid(-1, 0)[1] == 0
"""
    done = child(code)
    assert done.returncode == 0, done.stderr


def test_explain_names_the_driver_that_is_too_old(
    child: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    code = "from opmux.cli import report\n"
    code += "print(report.what_if('rmsnorm', 'bfloat16', None, 'cuda', None, ()))\n"
    done = child(code, version=11040)
    assert done.returncode == 0, done.stderr
    assert "the driver supports CUDA 11.4, the kernels need" in done.stdout


def test_a_host_without_cuda_refuses_the_wheel_and_keeps_the_others(wheel: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("this host can run it")
    failures = {f.backend: f for f in opmux.failures()}
    text = sentence(failures["cuda"].reason)
    wanted = "no NVIDIA driver" if torch.version.cuda else "was built without CUDA"
    assert wanted in text
    x = torch.ones(2, 8)
    if importlib.util.find_spec("opmux_cpu_amx"):
        assert opmux.silu_and_mul.explain(x).winner.backend == "cpu_amx"
    assert opmux.silu_and_mul(x).shape == (2, 4)
    shown = subprocess.run(
        [sys.executable, "-m", "opmux", "doctor", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    listed = {f["backend"]: f for f in json.loads(shown.stdout)["failures"]}
    assert wanted in listed["cuda"]["reason"] and listed["cuda"]["remedy"]

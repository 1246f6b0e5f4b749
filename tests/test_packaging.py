# SPDX-License-Identifier: Apache-2.0
"""The wheels' libraries keep the promises of a wheel that works everywhere; files are fresh."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What a glibc system offers beside torch; everything else must be compiled in.
SYSTEM = {"libtorch.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libdl.so.2",
          "ld-linux-x86-64.so.2"}  # fmt: skip
# The CUDA runtime is inside, and is older than the glibc that took these into libc.
ALLOWED = {"cpu_amx": SYSTEM, "cuda": {*SYSTEM, "libpthread.so.0", "librt.so.1"}}
# What a torch without CUDA does not have, so that the library loads there too.
WEAK = {"cpu_amx": set(), "cuda": {"aoti_torch_get_current_cuda_stream"}}


@pytest.fixture(params=sorted(ALLOWED))
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if importlib.util.find_spec(f"opmux_{name}") is None:
        pytest.skip(f"opmux-{name.replace('_', '-')} is not installed")
    return name


@pytest.fixture
def library(backend: str) -> Path:
    spec = importlib.util.find_spec(f"opmux_{backend}")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).with_name(f"_opmux_{backend}.so")


def dynamic(library: Path, tag: str) -> list[str]:
    from elftools.elf.elffile import ELFFile

    with library.open("rb") as f:
        section = ELFFile(f).get_section_by_name(".dynamic")
        key = {"DT_NEEDED": "needed", "DT_RPATH": "rpath", "DT_RUNPATH": "runpath"}[tag]
        return [getattr(t, key) for t in section.iter_tags(tag)]


def symbols(library: Path, defined: bool) -> dict[str, str]:
    """Return name -> binding."""
    from elftools.elf.elffile import ELFFile

    with library.open("rb") as f:
        table = ELFFile(f).get_section_by_name(".dynsym")
        return {s.name: s["st_info"]["bind"] for s in table.iter_symbols()
                if s.name and (s["st_shndx"] != "SHN_UNDEF") == defined}  # fmt: skip


def test_the_library_needs_libtorch_and_the_system_only(backend: str, library: Path) -> None:
    assert "libtorch.so" in dynamic(library, "DT_NEEDED")
    assert set(dynamic(library, "DT_NEEDED")) <= ALLOWED[backend]
    assert dynamic(library, "DT_RPATH") == dynamic(library, "DT_RUNPATH") == []


def test_no_python_and_no_unstable_torch_symbol(backend: str, library: Path) -> None:
    wanted = symbols(library, defined=False)
    assert wanted
    assert [s for s in wanted if s.startswith(("Py", "_Py"))] == []
    assert [s for s in wanted if re.match(r"_ZNK?(2at|3c10|5torch)", s)] == []
    # what remains of torch is the C shim, whose symbols of torch 2.10 are these prefixes
    shim = {s: bind for s, bind in wanted.items() if s.startswith(("aoti_", "torch_"))}
    assert shim and not shim.keys() & {"torch_dtype_float8_e8m0fnu", "torch_from_blob"}
    assert {s for s, bind in shim.items() if bind == "STB_WEAK"} == WEAK[backend]
    # the CUDA runtime is linked statically, and finds the driver itself
    assert [s for s in wanted if re.match(r"(cuda|cu)[A-Z]|__cuda", s)] == []


def test_the_library_exports_the_contract_and_nothing_else(library: Path) -> None:
    exported = {s for s in symbols(library, defined=True) if not s.startswith("_")}
    assert exported == {"opmux_register", "opmux_interface", "opmux_info"}


def test_glibc_and_libstdcxx_are_old_enough_for_manylinux_2_28(library: Path) -> None:
    from elftools.elf.elffile import ELFFile

    newest = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8, 0, 0)}
    with library.open("rb") as f:
        section = ELFFile(f).get_section_by_name(".gnu.version_r")
        names = [aux.name for _, auxes in section.iter_versions() for aux in auxes]
    assert names
    for name in names:
        family, _, version = name.rpartition("_")
        assert tuple(map(int, version.split("."))) <= newest[family], name


def test_the_stack_is_not_executable(library: Path) -> None:
    from elftools.elf.elffile import ELFFile

    with library.open("rb") as f:
        stack = [s for s in ELFFile(f).iter_segments() if s["p_type"] == "PT_GNU_STACK"]
    assert stack and not stack[0]["p_flags"] & 1


def test_the_wheel_serves_every_cpython(backend: str) -> None:
    dist = importlib.metadata.distribution(f"opmux-{backend.replace('_', '-')}")
    text = dist.read_text("WHEEL") or ""
    tags = re.findall(r"^Tag: (.+)$", text, re.MULTILINE)
    assert tags and all(re.fullmatch(r"py3-none-(linux|manylinux\w+)_x86_64", t) for t in tags)
    requires = dist.requires or []
    assert sorted(re.split(r"[<>=]", r)[0] for r in requires) == ["opmux", "torch"]
    assert not [r for r in requires if "==" in r]


def test_the_manifest_names_this_library_and_every_op(backend: str, library: Path) -> None:
    kernels = importlib.import_module(f"opmux_{backend}.kernels").KERNELS
    data = json.loads(library.with_name("opmux-backend.json").read_text())
    assert data["library"]["sha256"] == hashlib.sha256(library.read_bytes()).hexdigest()
    assert set(data["ops"]) == set(kernels)


def test_the_library_agrees_with_core_and_registers(backend: str) -> None:
    """On any torch, with or without the device."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "load_library.py"), backend],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernels = importlib.import_module(f"opmux_{backend}.kernels").KERNELS
    assert f"{len(kernels)} kernels loaded, agreed and registered" in done.stdout


def test_an_unknown_or_missing_isa_is_refused_with_a_sentence() -> None:
    pytest.importorskip("opmux_cpu_amx")
    code = (
        "import torch, opmux\n"
        "print(*opmux.failures())\n"
        "opmux.silu_and_mul(torch.ones(2, 4))\n"
        "opmux.silu_and_mul(torch.ones(2, 4), backend='cpu_amx')\n"
    )
    for isa, word in (("avx3", "avx512_bf16"), ("", "")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False,
            env={"OPMUX_CPU_ISA": isa, "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        if isa:
            assert word in done.stdout and isa in done.stdout
            assert "NoKernelError" in done.stderr and isa in done.stderr
        else:
            assert done.returncode == 0, done.stderr


def test_generated_files_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "generate.py"), "--check"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nrun: make tables"

# SPDX-License-Identifier: Apache-2.0
"""The CPU wheel's library keeps the promises of a wheel that works everywhere; files are fresh."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.find_spec("opmux_cpu_amx")
if spec is None or spec.origin is None:
    pytest.skip("opmux-cpu-amx is not installed", allow_module_level=True)
PACKAGE = Path(spec.origin).parent
LIBRARY = PACKAGE / "_opmux_cpu_amx.so"

# What an x86-64 glibc system offers beside torch; everything else must be compiled in.
SYSTEM = {"libtorch.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libdl.so.2",
          "ld-linux-x86-64.so.2"}  # fmt: skip


def dynamic(tag: str) -> list[str]:
    from elftools.elf.elffile import ELFFile

    with LIBRARY.open("rb") as f:
        section = ELFFile(f).get_section_by_name(".dynamic")
        key = {"DT_NEEDED": "needed", "DT_RPATH": "rpath", "DT_RUNPATH": "runpath"}[tag]
        return [getattr(t, key) for t in section.iter_tags(tag)]


def symbols(defined: bool) -> list[str]:
    from elftools.elf.elffile import ELFFile

    with LIBRARY.open("rb") as f:
        table = ELFFile(f).get_section_by_name(".dynsym")
        return [s.name for s in table.iter_symbols()
                if s.name and (s["st_shndx"] != "SHN_UNDEF") == defined]  # fmt: skip


def test_the_library_needs_libtorch_and_the_system_only() -> None:
    assert "libtorch.so" in dynamic("DT_NEEDED")
    assert set(dynamic("DT_NEEDED")) <= SYSTEM
    assert dynamic("DT_RPATH") == dynamic("DT_RUNPATH") == []


def test_no_python_and_no_unstable_torch_symbol() -> None:
    wanted = symbols(defined=False)
    assert wanted
    assert [s for s in wanted if s.startswith(("Py", "_Py"))] == []
    assert [s for s in wanted if re.match(r"_ZNK?(2at|3c10|5torch)", s)] == []
    # what remains of torch is the C shim, whose symbols of torch 2.10 are these prefixes
    shim = [s for s in wanted if s.startswith(("aoti_", "torch_"))]
    assert shim and not [s for s in shim if s in {"torch_dtype_float8_e8m0fnu", "torch_from_blob"}]


def test_the_library_exports_the_contract_and_nothing_else() -> None:
    exported = {s for s in symbols(defined=True) if not s.startswith("_")}
    assert exported == {"opmux_register", "opmux_interface", "opmux_info"}


def test_glibc_and_libstdcxx_are_old_enough_for_manylinux_2_28() -> None:
    from elftools.elf.elffile import ELFFile

    newest = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8, 0, 0)}
    with LIBRARY.open("rb") as f:
        section = ELFFile(f).get_section_by_name(".gnu.version_r")
        names = [aux.name for _, auxes in section.iter_versions() for aux in auxes]
    assert names
    for name in names:
        family, _, version = name.rpartition("_")
        assert tuple(map(int, version.split("."))) <= newest[family], name


def test_the_stack_is_not_executable() -> None:
    from elftools.elf.elffile import ELFFile

    with LIBRARY.open("rb") as f:
        stack = [s for s in ELFFile(f).iter_segments() if s["p_type"] == "PT_GNU_STACK"]
    assert stack and not stack[0]["p_flags"] & 1


def test_the_wheel_serves_every_cpython() -> None:
    dist = importlib.metadata.distribution("opmux-cpu-amx")
    text = dist.read_text("WHEEL") or ""
    tags = re.findall(r"^Tag: (.+)$", text, re.MULTILINE)
    assert tags and all(re.fullmatch(r"py3-none-(linux|manylinux\w+)_x86_64", t) for t in tags)
    requires = dist.requires or []
    assert sorted(re.split(r"[<>=]", r)[0] for r in requires) == ["opmux", "torch"]
    assert not [r for r in requires if "==" in r]


def test_the_manifest_names_this_library_and_every_op() -> None:
    import hashlib

    from opmux_cpu_amx.kernels import KERNELS

    data = json.loads((PACKAGE / "opmux-backend.json").read_text())
    assert data["library"]["sha256"] == hashlib.sha256(LIBRARY.read_bytes()).hexdigest()
    assert set(data["ops"]) == set(KERNELS)


def test_an_unknown_or_missing_isa_is_refused_with_a_sentence() -> None:
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

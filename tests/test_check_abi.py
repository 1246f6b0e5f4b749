# SPDX-License-Identifier: Apache-2.0
"""check-abi on wheels made to be wrong in one way each, and on the record of real ones."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from opmux import abi
from opmux.abi import elf
from opmux.abi.symbols import torch_symbols
from opmux.abi.wheel import WheelError
from opmux.cli.app import cli

ROOT = Path(__file__).resolve().parent.parent
CC = shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(CC is None, reason="no C compiler on this machine")
TAG = "py3-none-manylinux_2_28_x86_64"
GOOD = "int aoti_torch_get_dim(void); int f(void) { return aoti_torch_get_dim(); }"


def library(folder: Path, source: str = GOOD, *flags: str, name: str = "_acme.so") -> Path:
    assert CC is not None
    (folder / "acme.c").write_text(source)
    built = folder / name
    command = [CC, "-shared", "-fPIC", "-o", str(built), str(folder / "acme.c"), *flags]
    subprocess.run(command, check=True, timeout=60)
    return built


def wheel(
    folder: Path,
    files: dict[str, Path | bytes],
    tag: str = TAG,
    requires: tuple[str, ...] = ("torch>=2.10",),
    stated: str = "",
) -> Path:
    path = folder / f"acme-1.0-{tag}.whl"
    meta = "".join(f"Requires-Dist: {r}\n" for r in requires)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            archive.writestr(name, data)
        info = "acme-1.0.dist-info"
        head = "Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n"
        archive.writestr(f"{info}/METADATA", head + meta)
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nTag: {stated or tag}\n")
    return path


def codes(report: abi.Report, level: str = "error") -> set[str]:
    return {f.code for f in report.findings if f.level == level}


@needs_compiler
def test_a_right_wheel(tmp_path: Path) -> None:
    report = abi.check(wheel(tmp_path, {"acme/_acme.so": library(tmp_path)}))
    assert codes(report) == codes(report, "warning") == set()
    assert report.torch == ">= 2.10 (1 symbols of the stable ABI)"
    assert report.python == "any, it uses no symbol of CPython"
    assert report.system.startswith("x86_64")


@dataclass(frozen=True)
class Wrong:
    """A wheel that is wrong in one way, and what must be said of it."""

    level: str
    code: str
    words: str
    source: str = GOOD
    flags: tuple[str, ...] = ()
    inside: str = "acme/_acme.so"
    tag: str = TAG
    requires: tuple[str, ...] = ("torch>=2.10",)


CPP = "int _ZNK3c104impl3fooEv(void); int f(void) { return _ZNK3c104impl3fooEv(); }"
PY = "void* PyLong_FromLong(long); void* PyInit__acme(void) { return PyLong_FromLong(1); }"
SHIM = "int {0}(void); int f(void) {{ return {0}(); }}"
WRONG = {
    "C++ symbols of torch": Wrong(
        "error", "torch-cpp", "_ZNK3c104impl3fooEv", CPP, requires=("torch==2.13.0",)
    ),
    "C++ symbols without a pin": Wrong("error", "torch-requirement", "one torch only", CPP),
    "libtorch_python": Wrong(
        "error", "torch-python", "THPVariableClass",
        "extern int THPVariableClass; int f(void) { return THPVariableClass; }",
    ),
    "newer than it requires": Wrong(
        "error", "torch-requirement", "its symbols need 2.13",
        SHIM.format("torch_stream_native_handle"),
    ),
    "newer than any torch": Wrong(
        "warning", "torch-floor", "torch_from_the_future", SHIM.format("torch_from_the_future")
    ),
    "torch is not required": Wrong("warning", "torch-requirement", "does not require", requires=()),
    "torch is pinned": Wrong(
        "warning", "torch-requirement", "allow torch >= 2.10", requires=("torch==2.13.0",)
    ),
    "any platform": Wrong("error", "tag", "any platform", tag="py3-none-any"),
    "plain linux": Wrong("warning", "tag", "indexes refuse", tag="py3-none-linux_x86_64"),
    "one CPython": Wrong(
        "warning", "tag", "one wheel serves one CPython", tag="cp311-cp311-manylinux_2_28_x86_64"
    ),
    "false abi3": Wrong(
        "error", "tag", "imports in 3.10 only", PY,
        inside="acme/_acme.cpython-310-x86_64-linux-gnu.so", tag="cp310-abi3-manylinux_2_28_x86_64",
    ),
    "Python behind a none tag": Wrong("warning", "tag", "no CPython matters", PY),
    "private symbols of CPython": Wrong(
        "error", "python-private", "_PyThreadState_GetFrame",
        SHIM.format("_PyThreadState_GetFrame"), tag="cp310-abi3-manylinux_2_28_x86_64",
    ),
    "another machine": Wrong(
        "error", "machine", "is for x86_64", tag="py3-none-manylinux_2_28_aarch64"
    ),
    "newer glibc than its tag": Wrong(
        "error", "glibc", "promises glibc 2.2,", "int puts(char*); int f(void) { return puts(0); }",
        tag="py3-none-manylinux_2_2_x86_64",
    ),
    "rpath": Wrong(
        "warning", "rpath", "_acme.so in /home/builder/lib", flags=("-Wl,-rpath,/home/builder/lib",)
    ),
    "executable stack": Wrong("error", "stack", "executable stack", flags=("-z", "execstack")),
    "static libstdc++": Wrong(
        "error", "static-libstdc++", "libstdc++ linked in", GOOD + " void __cxa_throw(void) {}"
    ),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_said(kind: str, tmp_path: Path) -> None:
    case = WRONG[kind]
    built = library(tmp_path, case.source, *case.flags)
    report = abi.check(wheel(tmp_path, {case.inside: built}, case.tag, case.requires))
    hits = [f for f in report.findings if (f.level, f.code) == (case.level, case.code)]
    assert [f for f in hits if case.words in f.sentence], report.findings
    assert all(f.remedy for f in hits)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("libc10.so", "error"), ("libcudart.so.13", "error"), ("libtorch_cpu.so", "error"),
        ("libcudart.3eda8113.so.13", "warning"), ("libgomp-24e2ab19.so.1", "warning"),
    ],
)  # fmt: skip
def test_bundled_libraries(name: str, level: str, tmp_path: Path) -> None:
    """Under torch's name it may be taken for torch's; a renamed one is a second copy."""
    built = library(tmp_path)
    report = abi.check(wheel(tmp_path, {"acme/_acme.so": built, f"acme.libs/{name}": built}))
    assert "bundled" in codes(report, level)


@needs_compiler
def test_needed_libraries(tmp_path: Path) -> None:
    """libpython is an error, a CUDA major and a stranger are warnings."""
    for name in ("libpython3.11.so.1.0", "libcudart.so.12", "libtvm_ffi.so", "libtorch_cuda.so"):
        library(tmp_path, "int nothing;", f"-Wl,-soname,{name}", name=name)
    found = [str(tmp_path / n.name) for n in tmp_path.glob("lib*")]
    built = library(tmp_path, GOOD, "-Wl,--no-as-needed", *found)
    report = abi.check(wheel(tmp_path, {"acme/_acme.so": built}))
    assert codes(report) == {"libpython"}
    said = {f.code: f.sentence for f in report.findings}
    assert said["cuda-major"].endswith(": libcudart.so.12")
    assert said["needed"].endswith("has libtvm_ffi.so")


@needs_compiler
def test_what_a_sibling_library_defines_is_not_torchs(tmp_path: Path) -> None:
    other = library(tmp_path, "int _ZNK3c104impl3fooEv(void) { return 1; }", name="libother.so")
    built = library(tmp_path, CPP)
    files: dict[str, Path | bytes] = {"acme/_acme.so": built, "acme/libother.so": other}
    assert "torch-cpp" not in codes(abi.check(wheel(tmp_path, files)))


@needs_compiler
def test_weak_symbols_set_no_floor(tmp_path: Path) -> None:
    """A newer function that is used where it is there leaves the older torch in range."""
    source = GOOD + (
        "\n__attribute__((weak)) int torch_stream_native_handle(void);"
        "int g(void) { return torch_stream_native_handle ? torch_stream_native_handle() : 0; }"
    )
    report = abi.check(wheel(tmp_path, {"acme/_acme.so": library(tmp_path, source)}))
    assert report.torch.startswith(">= 2.10")
    assert "where torch has them: torch_stream_native_handle" in str(report.findings)


@needs_compiler
def test_the_digest_of_the_manifest(tmp_path: Path) -> None:
    built = library(tmp_path)
    good = hashlib.sha256(built.read_bytes()).hexdigest()
    for digest, wrong in ((good, set()), ("0" * 64, {"manifest"})):
        manifest = {"library": {"file": "_acme.so", "sha256": digest}}
        files = {"acme/_acme.so": built, "acme/opmux-backend.json": json.dumps(manifest).encode()}
        assert codes(abi.check(wheel(tmp_path, files))) == wrong  # type: ignore[arg-type]


@needs_compiler
def test_against_a_torch(tmp_path: Path) -> None:
    """The symbols that one torch lacks are named."""
    home = tmp_path / "torch"
    (home / "lib").mkdir(parents=True)
    (home / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    library(home / "lib", "int nothing;", name="libtorch_cpu.so")
    built = library(tmp_path)
    report = abi.check(wheel(tmp_path, {"acme/_acme.so": built}), [home])
    assert report.facts["missing_in"] == {"2.9.1+cpu": 1}
    assert "lacks 1 of its symbols: aoti_torch_get_dim" in str(report.findings)
    library(home / "lib", "int aoti_torch_get_dim(void) { return 0; }", name="libtorch_cpu.so")
    importlib.import_module("opmux.abi.check")._exports.cache_clear()
    report = abi.check(wheel(tmp_path, {"acme/_acme.so": built}), [home])
    assert report.facts["missing_in"] == {"2.9.1+cpu": 0}


@pytest.mark.parametrize("what", ["name", "zip", "empty"])
def test_what_is_no_wheel_is_refused(what: str, tmp_path: Path) -> None:
    path = tmp_path / ("acme.whl" if what == "name" else f"acme-1.0-{TAG}.whl")
    if what == "empty":
        zipfile.ZipFile(path, "w").close()
    else:
        path.write_bytes(b"no wheel")
    with pytest.raises(WheelError, match=r"acme"):
        abi.check(path)
    done = CliRunner().invoke(cli, ["check-abi", str(path)])
    assert done.exit_code == 1
    assert "Traceback" not in done.output and "Error: acme" in done.output


@needs_compiler
def test_a_damaged_library_is_said(tmp_path: Path) -> None:
    whole = library(tmp_path).read_bytes()
    for cut in (100, len(whole) // 2):
        report = abi.check(wheel(tmp_path, {"acme/_acme.so": whole[:cut]}))
        assert codes(report) == {"elf"}, cut


@needs_compiler
def test_the_command(tmp_path: Path) -> None:
    good = wheel(tmp_path, {"acme/_acme.so": library(tmp_path)})
    (tmp_path / "bad").mkdir()
    bad = wheel(tmp_path / "bad", {"acme/_acme.so": library(tmp_path, CPP)})
    done = CliRunner().invoke(cli, ["check-abi", str(good)])
    assert done.exit_code == 0
    assert ">= 2.10" in done.output
    done = CliRunner().invoke(cli, ["check-abi", "--json", str(good), str(bad)])
    assert done.exit_code == 1
    first, second = json.loads(done.output)
    assert first["findings"][0]["code"] == "torch-floor"
    assert {f["code"] for f in second["findings"]} >= {"torch-cpp", "torch-requirement"}


def test_the_table_of_symbols_is_sound() -> None:
    table = torch_symbols()
    assert len(table) > 500
    assert table["aoti_torch_get_dim"] == ("2.10", "cpu")
    assert table["torch_from_blob"] == ("2.11", "cpu")
    assert table["torch_library_def_with_tags"] == ("2.12", "cpu")
    assert table["torch_stream_native_handle"] == ("2.13", "cpu")
    assert table["torch_tensor_from_pyobject"] == ("2.14", "cpu")
    assert table["torch_dtype_from_pyobject"] == ("2.15", "cpu")
    assert table["torch_c10_cuda_check_msg"][1] == "cuda"


def test_the_torch_that_runs_has_what_the_table_says() -> None:
    """The table was read from six torches; this one is asked itself."""
    import torch

    found = elf.read(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so").defined
    here = torch.torch_version.TorchVersion(torch.__version__)
    wrong = [
        name for name, (release, library) in torch_symbols().items()
        if library == "cpu" and (here >= release) != (name in found)
    ]  # fmt: skip
    assert wrong == []


# ---- our own wheel, and the record of others ----


def own() -> list[Path]:
    return sorted((ROOT / "dist").glob("opmux_cpu_amx-*.whl"))


def test_our_wheel_is_free_of_torch_and_python() -> None:
    if not own():
        pytest.skip("no wheel in dist/: make build")
    report = abi.check(own()[0])
    assert report.errors == ()
    assert report.torch.startswith(">= 2.10")
    assert report.python.startswith("any")


def flip_stack(data: bytearray) -> None:
    """Set PF_X in PT_GNU_STACK: what an assembler file without its note does."""
    start = int.from_bytes(data[32:40], "little")
    for i in range(int.from_bytes(data[56:58], "little")):
        header = start + 56 * i
        if data[header : header + 4] == (0x6474E551).to_bytes(4, "little"):
            data[header + 4] |= 1


def rename_symbol(data: bytearray) -> None:
    """Make a stable symbol one of c10: the same length, so that nothing moves."""
    old = b"\0aoti_torch_get_storage_offset\0"
    for name in (old, b"\0aoti_torch_get_device_index\0", b"\0torch_get_const_data_ptr\0"):
        place = data.find(name)
        if place >= 0:
            new = b"\0_ZN3c10" + str(len(name) - 12).encode() + b"x" * (len(name) - 12) + b"Ev"
            data[place : place + len(name)] = (
                new.ljust(len(name) - 1, b"v")[: len(name) - 1] + b"\0"
            )
            return
    raise AssertionError("no such symbol")


def append(data: bytearray) -> None:
    """Change the file after its manifest was written."""
    data.extend(b"\0")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (flip_stack, {"stack", "manifest"}),
        (rename_symbol, {"torch-cpp", "torch-requirement", "manifest"}),
        (append, {"manifest"}),
    ],
)
def test_our_wheel_when_it_was_changed(
    change: Callable[[bytearray], None], expected: set[str], tmp_path: Path
) -> None:
    if not own():
        pytest.skip("no wheel in dist/: make build")
    path = tmp_path / own()[0].name
    with zipfile.ZipFile(own()[0]) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            data = bytearray(old.read(entry))
            if entry.filename.endswith(".so"):
                change(data)
            new.writestr(entry, bytes(data))
    assert codes(abi.check(path)) == expected


def record() -> list[dict[str, Any]]:
    return list(json.loads((ROOT / "docs" / "check-abi.json").read_text()))


def test_the_record_agrees_with_binutils() -> None:
    """What check-abi read from each wheel is what nm, c++filt and readelf say."""
    rows = record()
    others = [r for r in rows if not r["wheel"].startswith("opmux")]
    assert len(others) >= 8
    for row in rows:
        facts = {**row["facts"], "GLIBC": row["facts"]["versions"].get("GLIBC", "")}
        assert {k: facts[k] for k in row["binutils"]} == row["binutils"], row["wheel"]


def test_the_record_agrees_with_six_torches() -> None:
    """A wheel lacks nothing in any torch from its floor on, and something in each before it."""
    for row in record():
        floor, missing = row["facts"]["torch_floor"], row["facts"]["missing_in"]
        assert len(missing) >= 6
        if row["facts"]["torch_cpp_symbols"]:
            assert [v for v, count in missing.items() if count], row["wheel"]
            continue
        for version, count in missing.items():
            if "+cpu" in version and row["wheel"].split("-")[0] not in ("opmux_cpu_amx", "opmux"):
                continue  # a CPU torch lacks the CUDA half
            older = _release(version) < _release(floor or "0")
            assert (count > 0) == older, (row["wheel"], version)


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.partition("+")[0].split(".")[:2])


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "elftools", None)
    monkeypatch.setitem(sys.modules, "packaging.utils", None)
    path = tmp_path / f"acme-1.0-{TAG}.whl"
    path.touch()
    done = CliRunner().invoke(cli, ["check-abi", str(path)])
    assert done.exit_code == 1
    assert "opmux[abi]" in done.output

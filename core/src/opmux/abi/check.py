# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a wheel, and what to change."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from opmux.abi import elf
from opmux.abi.wheel import Wheel, open_wheel

# at::, c10::, torch:: and caffe2:: as the outermost namespace of a mangled name
_CPP = re.compile(
    r"_Z(?:T[VISTC]|GV|GR|Th?n?\d*_|Tv\w*_)?(?:N[rVK]*[RO]?)?(?:2at|3c10|5torch|6caffe2)"
)
_SHIM = re.compile(r"(aoti|torch)_[a-z0-9_]+")
_PYTHON = re.compile(r"_?Py[A-Z_]\w*")
_THP = re.compile(r"(_Z\w*)?THP[A-Z]\w*")
# CPython's private names that its stable ABI holds all the same
_PRIVATE = frozenset(
    "_Py_NoneStruct _Py_TrueStruct _Py_FalseStruct _Py_EllipsisObject _Py_NotImplementedStruct "
    "_Py_Dealloc _Py_BuildValue_SizeT _Py_VaBuildValue_SizeT _Py_CheckRecursiveCall _Py_IncRef "
    "_Py_DecRef _Py_RefTotal _Py_NegativeRefcount _Py_SwappedOp _Py_Version _Py_HashSecret "
    "_PyArg_Parse_SizeT _PyArg_ParseTuple_SizeT _PyArg_ParseTupleAndKeywords_SizeT "
    "_PyArg_VaParse_SizeT _PyArg_VaParseTupleAndKeywords_SizeT _PyErr_BadInternalCall "
    "_PyObject_CallFunction_SizeT _PyObject_CallMethod_SizeT _PyObject_GC_New "
    "_PyObject_GC_NewVar _PyObject_GC_Resize _PyObject_New _PyObject_NewVar _PyState_AddModule "
    "_PyThreadState_Init _PyThreadState_Prealloc _PyWeakref_CallableProxyType "
    "_PyWeakref_ProxyType _PyWeakref_RefType".split()
)
_TORCH = re.compile(r"lib(torch(_\w+)?|c10(_\w+)?|shm|caffe2_nvrtc)\.so.*")
# What CUDA builds of torch bring through their own requirements.
_CUDA = re.compile(
    r"lib(cudart|cublas|cublasLt|cudnn\w*|cufft|cufftw|curand|cusolver|cusolverMg|cusparse"
    r"|cusparseLt|nccl|nvJitLink|nvrtc\w*|nvrtc-builtins|cupti|nvToolsExt|nvshmem_host|cufile)\.so.*"
)
_RUNTIMES = re.compile(r"lib(gomp|iomp5|stdc\+\+|gcc_s|omp)(-\w+)?\.so.*")
_SYSTEM = re.compile(
    r"(lib(c|m|dl|rt|pthread|util|resolv|gcc_s|stdc\+\+|gomp|cuda|nvidia-ml|z)\.so\.\d+"
    r"|ld-linux[\w-]*\.so\.\d+)"
)
_MAJOR = re.compile(r"lib(cudart|cublas|cublasLt|nvrtc|cufft|amdhip64)\.so\.(\d+)")
# glibc -> what the compilers of that time's systems have of libstdc++ (auditwheel's policies)
_LIBSTDCXX = ((2, 17, (3, 4, 19)), (2, 24, (3, 4, 22)), (2, 27, (3, 4, 24)), (2, 28, (3, 4, 24)),
              (2, 31, (3, 4, 28)), (2, 34, (3, 4, 29)), (2, 35, (3, 4, 30)),
              (2, 39, (3, 4, 33)))  # fmt: skip
_LEGACY = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}
_MACHINES = {"x64": "x86_64", "AArch64": "aarch64", "x86": "i686", "ARM": "armv7l"}
_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """Something about a wheel: ``error``, ``warning`` or ``info``, and what to change."""

    level: str
    code: str
    sentence: str
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """What a wheel's libraries load in, and what is wrong with it."""

    wheel: str
    torch: str
    python: str
    system: str
    libraries: int
    findings: tuple[Finding, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that keep it from loading somewhere where its name says it does."""
        return tuple(f for f in self.findings if f.level == "error")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def is_cpp(symbol: str) -> bool:
    """Whether a symbol is one of torch's C++ interface, which has no stable form."""
    return _CPP.match(symbol) is not None


@cache
def torch_symbols() -> dict[str, tuple[str, str]]:
    """Return torch's C symbols: name -> (first release that has it, cpu, cuda or python)."""
    text = Path(__file__).with_name("torch_symbols.json").read_text(encoding="utf-8")
    return {
        name: (release, library)
        for release, libraries in json.loads(text).items()
        for library, names in libraries.items()
        for name in names
    }


@dataclass(frozen=True)
class _Needs:
    """What the wheel's libraries need from outside of it."""

    shim: dict[str, str]  # stable symbol -> release
    optional: dict[str, str]  # the same for weak ones
    unknown: list[str]  # named like torch's, in no release of the table
    cpp: dict[str, list[str]]  # library -> torch's C++ symbols
    python: dict[str, list[str]]  # library -> CPython's symbols
    thp: list[str]
    versions: dict[str, elf.Version]
    newest: dict[str, str]  # GLIBC -> "memcpy in libacme.so"

    @property
    def floor(self) -> str:
        """The oldest torch that has every stable symbol; "" when none is used."""
        return max(self.shim.values(), key=_number, default="")

    @property
    def cpp_count(self) -> int:
        return len({s for names in self.cpp.values() for s in names})


def _number(release: str) -> elf.Version:
    return tuple(map(int, release.split(".")))


def _needs(wheel: Wheel) -> _Needs:
    inside = {s for library in wheel.libraries for s in library.defined}
    table = torch_symbols()
    found = _Needs({}, {}, [], {}, {}, [], {}, {})
    for library in wheel.libraries:
        outside = library.undefined - inside
        for name in outside:
            if name in table:
                found.shim[name] = table[name][0]
            elif _SHIM.fullmatch(name):
                found.unknown.append(name)
        found.optional.update({n: table[n][0] for n in library.weak - inside if n in table})
        # A weak C++ symbol that nobody defines is null when it is used.
        cpp = sorted(s for s in outside | (library.weak - inside) if _CPP.match(s))
        python = sorted(s for s in outside if _PYTHON.fullmatch(s))
        found.thp.extend(sorted(s for s in outside if _THP.fullmatch(s)))
        if cpp:
            found.cpp[library.name] = cpp
        if python:
            found.python[library.name] = python
        for family, version in library.versions.items():
            if version > found.versions.get(family, ()):
                found.versions[family] = version
                symbol = library.newest.get(family, "something")
                found.newest[family] = f"{symbol} in {library.name}"
    return found


def check(path: Path, torches: Sequence[Path] = ()) -> Report:
    """Look at a wheel; ``torches`` are folders with a torch's libraries to compare with."""
    wheel = open_wheel(path)
    needs = _needs(wheel)
    findings = [f for look in _CHECKS for f in look(wheel, needs)]
    compared = {}
    for folder in torches:
        name, missing = _missing(folder, wheel)
        compared[name] = len(missing)
        if missing:
            findings.append(
                Finding(
                    "warning",
                    "torch-missing",
                    f"torch {name} lacks {len(missing)} of its symbols: {_few(missing)}",
                    "build it against this torch, or use the stable ABI",
                )
            )
    order = ("error", "warning", "info")
    findings.sort(key=lambda f: order.index(f.level))
    facts = {
        "tags": wheel.tags,
        "torch_stable_symbols": len(needs.shim),
        "torch_cpp_symbols": needs.cpp_count,
        "torch_floor": needs.floor,
        "python_symbols": len({s for names in needs.python.values() for s in names}),
        "versions": {k: ".".join(map(str, v)) for k, v in sorted(needs.versions.items())},
        "needed": sorted({n for lib in wheel.libraries for n in lib.needed}),
        "missing_in": compared,
    }
    return Report(
        wheel.file, _torch_sentence(needs), _python_sentence(wheel, needs),
        _system_sentence(wheel, needs), len(wheel.libraries), tuple(findings), facts,
    )  # fmt: skip


# ---- the three answers ----


def _torch_sentence(needs: _Needs) -> str:
    if needs.cpp or needs.thp:
        return f"the one that it was built with ({needs.cpp_count} C++ symbols of torch)"
    if not needs.floor:
        return "any, it uses no symbol of torch"
    return f">= {needs.floor} ({len(needs.shim)} symbols of the stable ABI)"


def _python_sentence(wheel: Wheel, needs: _Needs) -> str:
    if not wheel.libraries:
        return f"any that the metadata allows ({wheel.requires_python or 'no bound'})"
    bound = _bound_modules(wheel)
    if bound:
        return f"CPython {', '.join(sorted(set(bound.values())))} only: {_few(bound)}"
    tags = sorted({_python_tag(t) for t in wheel.tags})
    if not any("-abi3-" in t or "-none-" in t for t in wheel.tags):
        unused = "" if needs.python else ", though it uses no symbol of CPython"
        return f"CPython {', '.join(tags)} only, by its tag{unused}"
    if not needs.python:
        return "any, it uses no symbol of CPython"
    return f"CPython >= {tags[0]} (limited API)" if "-abi3-" in wheel.tags[0] else "see below"


def _system_sentence(wheel: Wheel, needs: _Needs) -> str:
    if not wheel.libraries:
        return "any"
    parts = [f"{_MACHINES.get(m, m)}" for m in sorted({lib.machine for lib in wheel.libraries})]
    for family, shown in (("GLIBC", "glibc"), ("GLIBCXX", "libstdc++ (GLIBCXX)")):
        if family in needs.versions:
            parts.append(f"{shown} >= {'.'.join(map(str, needs.versions[family]))}")
    majors = {found[0] for lib in wheel.libraries for n in lib.needed
              if (found := _MAJOR.fullmatch(n))}  # fmt: skip
    return ", ".join([*parts, *sorted(majors)])


def _python_tag(tag: str) -> str:
    """Return 3.10 for cp310-abi3-..., and py3 as it is."""
    python = tag.partition("-")[0]
    found = re.fullmatch(r"cp(\d)(\d+)", python)
    return f"{found[1]}.{found[2]}" if found else python


def _bound_modules(wheel: Wheel) -> dict[str, str]:
    """Return extension modules that one CPython alone imports, by their names -> its version."""
    found = {}
    for library in wheel.libraries:
        match = re.search(r"\.cpython-(\d)(\d+)\w*-[\w-]+\.so$", library.name)
        # Without PyInit it is no module: torch.ops.load_library takes it by its path.
        if match and any(s.startswith("PyInit_") for s in library.defined):
            found[Path(library.name).name] = f"{match[1]}.{match[2]}"
    return found


def _few(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


# ---- checks: each yields findings ----


def _readable(wheel: Wheel, needs: _Needs) -> Iterator[Finding]:
    for sentence in wheel.unreadable:
        yield Finding("error", "elf", sentence, "build the wheel again")


def _tags(wheel: Wheel, needs: _Needs) -> Iterator[Finding]:
    pure = [t for t in wheel.tags if t.endswith("-any")]
    if pure and wheel.libraries:
        yield Finding(
            "error", "tag",
            f"the tag {pure[0]} says any platform, it holds {len(wheel.libraries)} libraries",
            "tag it for its platform, such as py3-none-manylinux_2_28_x86_64",
        )  # fmt: skip
    if wheel.stated and not set(wheel.tags) <= _expanded(wheel.stated):
        yield Finding(
            "warning", "tag",
            f"the file's name says {_few(wheel.tags)}, its WHEEL file {_few(wheel.stated)}",
            "rename wheels with `wheel tags`: installers read the one, checkers the other",
        )  # fmt: skip
    bound = _bound_modules(wheel)
    free = [t for t in wheel.tags if "-abi3-" in t or "-none-" in t]
    if bound and free:
        yield Finding(
            "error", "tag",
            f"the tag {free[0]} promises several CPythons, {_few(bound)} imports in "
            f"{', '.join(sorted(set(bound.values())))} only",
            "build it with the limited API, or tag one wheel for each CPython",
        )  # fmt: skip
    elif wheel.libraries and not free:
        yield Finding(
            "warning", "tag",
            f"one wheel serves one CPython ({_few(wheel.tags)})",
            "register ops through the stable ABI without Python: py3-none, one wheel for all",
        )  # fmt: skip


def _expanded(tags: Iterable[str]) -> set[str]:
    from packaging.tags import parse_tag

    return {str(one) for tag in tags for one in parse_tag(tag)}


def _machine(wheel: Wheel, needs: _Needs) -> Iterator[Finding]:
    said = {t.split("-")[-1] for t in wheel.tags}
    for library in wheel.libraries:
        machine = _MACHINES.get(library.machine, library.machine)
        if not any(platform.endswith((machine, "any", "universal2")) for platform in said):
            yield Finding(
                "error", "machine",
                f"{library.name} is for {machine}, the tag says {_few(said)}", "build it there",
            )  # fmt: skip


def _platform(wheel: Wheel, needs: _Needs) -> Iterator[Finding]:
    promised = [v for t in wheel.tags if (v := _glibc(t)) is not None]
    have = needs.versions.get("GLIBC", ())
    if promised and have > min(promised):
        oldest = ".".join(map(str, min(promised)))
        yield Finding(
            "error", "glibc",
            f"the tag promises glibc {oldest}, {needs.newest['GLIBC']} needs "
            f"{'.'.join(map(str, have))}",
            "let auditwheel choose the tag, or build in an older image",
        )  # fmt: skip
    linked = needs.versions.get("GLIBCXX", ())
    if promised and not _bundles(wheel, "libstdc++"):
        allowed = max((v for a, b, v in _LIBSTDCXX if (a, b) <= min(promised)), default=(3, 4, 13))
        # manylinux_2_28 images compile with a toolset that links newer parts in.
        if linked > allowed:
            yield Finding(
                "warning", "libstdc++",
                f"systems with glibc {'.'.join(map(str, min(promised)))} have libstdc++ up to "
                f"GLIBCXX_{'.'.join(map(str, allowed))}, {needs.newest['GLIBCXX']} needs "
                f"{'.'.join(map(str, linked))}",
                "build in the image of the tag, or raise the tag",
            )  # fmt: skip
    plain = [t for t in wheel.tags if re.search(r"-linux_\w+$", t)]
    if plain:
        yield Finding(
            "warning", "tag", f"{plain[0]} says nothing of glibc: package indexes refuse it",
            "auditwheel repair --exclude libtorch.so",
        )  # fmt: skip


def _glibc(tag: str) -> elf.Version | None:
    platform = tag.rpartition("-")[2]
    found = re.match(r"manylinux_(\d+)_(\d+)_", platform)
    if found:
        return int(found[1]), int(found[2])
    return next((v for k, v in _LEGACY.items() if platform.startswith(k + "_")), None)


def _bundles(wheel: Wheel, stem: str) -> bool:
    return any(Path(f).name.startswith(stem) for f in wheel.files)


def _torch_abi(wheel: Wheel, needs: _Needs) -> Iterator[Finding]:
    if needs.cpp:
        counts = sorted(needs.cpp, key=lambda name: -len(needs.cpp[name]))
        shown = ", ".join(f"{Path(n).name} {len(needs.cpp[n])}" for n in counts[:_SHOWN])
        more = f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
        names = {s for symbols in needs.cpp.values() for s in symbols}
        yield Finding(
            "error", "torch-cpp",
            f"it uses {len(names)} C++ symbols of torch, which change with every release "
            f"({shown}{more}): {_few(names)}",
            "use torch/csrc/stable with TORCH_TARGET_VERSION, without at::, c10:: and torch::",
        )  # fmt: skip
    if needs.thp:
        yield Finding(
            "error", "torch-python",
            f"it uses libtorch_python, bound to torch and to CPython: {_few(needs.thp)}",
            "pass tensors through torch.ops, not through THPVariable",
        )  # fmt: skip
    if needs.floor and not needs.cpp:
        newest = [n for n, release in needs.shim.items() if release == needs.floor]
        text = f"torch >= {needs.floor}"
        if needs.floor != "2.10":  # every symbol is in the oldest torch of the table
            text += f", for {_few(newest)}"
        yield Finding("info", "torch-floor", text)
    later = {n: r for n, r in needs.optional.items() if _number(r) > _number(needs.floor or "0")}
    if later:
        yield Finding("info", "torch-floor", f"used where torch has them: {_few(later)}")
    if needs.unknown:
        yield Finding(
            "warning", "torch-floor",
            f"no torch up to {max(_releases(), key=_number)} exports {_few(needs.unknown)}",
            "it may be another library's, or a newer torch's",
        )  # fmt: skip


def _releases() -> set[str]:
    return {release for release, _ in torch_symbols().values()}


def _requirements(wheel: Wheel, needs: _Needs) -> Iterator[Finding]:
    from packaging.requirements import Requirement

    torch = [r for text in wheel.requires if (r := Requirement(text)).name == "torch"]
    extra = [r for r in torch if r.marker and "extra" in str(r.marker)]
    torch = [r for r in torch if r not in extra]
    uses = bool(needs.floor or needs.cpp)
    pins = [s for r in torch for s in r.specifier if s.operator in ("==", "===")]
    if needs.cpp and not pins:
        said = _few(str(r) for r in torch) if torch else "nothing"
        yield Finding(
            "error", "torch-requirement",
            f"it runs with one torch only, and requires {said}",
            "use the stable ABI; until then require the exact torch",
        )  # fmt: skip
    elif uses and not torch:
        yield Finding(
            "warning", "torch-requirement", "it uses torch and does not require it",
            f"require torch>={needs.floor}",
        )  # fmt: skip
    elif pins and not needs.cpp and uses:
        yield Finding(
            "warning", "torch-requirement",
            f"it requires torch{pins[0]}, its symbols allow torch >= {needs.floor}",
            f"require torch>={needs.floor}",
        )  # fmt: skip
    elif needs.floor and torch and not needs.cpp:
        older = [v for v in ("2.8", "2.9", *sorted(_releases(), key=_number))
                 if _number(v) < _number(needs.floor)]  # fmt: skip
        wrong = [v for v in older if any(r.specifier.contains(f"{v}.99") for r in torch)]
        if wrong and needs.floor != "2.10":
            yield Finding(
                "error", "torch-requirement",
                f"it requires {_few(str(r) for r in torch)}, which allows torch {wrong[0]}; its "
                f"symbols need {needs.floor}",
                f"require torch>={needs.floor}",
            )  # fmt: skip


def _python_abi(wheel: Wheel, needs: _Needs) -> Iterator[Finding]:
    linked = [
        lib.name for lib in wheel.libraries if any(n.startswith("libpython") for n in lib.needed)
    ]
    if linked:
        yield Finding(
            "error", "libpython", f"{_few(linked)} needs libpython, which many Pythons lack",
            "do not link libpython; symbols of CPython are found in the running program",
        )  # fmt: skip
    if not any("-abi3-" in t or "-none-" in t for t in wheel.tags):
        return
    private = {
        library: odd
        for library, names in needs.python.items()
        if (odd := [n for n in names if n.startswith("_Py") and n not in _PRIVATE])
    }
    for library, names in private.items():
        if Path(library).name not in _bound_modules(wheel):  # named already
            yield Finding(
                "error", "python-private",
                f"{library} uses private symbols of CPython: {_few(names)}",
                "define Py_LIMITED_API",
            )  # fmt: skip
    none = [t for t in wheel.tags if "-none-" in t]
    if none and needs.python and not private and not _bound_modules(wheel):
        count = len({s for names in needs.python.values() for s in names})
        yield Finding(
            "warning", "tag",
            f"the tag {none[0]} says that no CPython matters, {count} of its symbols are used",
            "tag it cp310-abi3 when it keeps to the limited API",
        )  # fmt: skip


def _bundled(wheel: Wheel, needs: _Needs) -> Iterator[Finding]:
    collide, copies, runtimes = [], [], []
    for library in wheel.libraries:
        base = Path(library.name).name
        plain = _RENAMED.sub("", base)
        if plain.split(".")[0] in _SHIPPED or _CUDA.fullmatch(plain):
            # Under a name of its own it is a second copy; under torch's it may be taken for it.
            (copies if plain != base else collide).append(library.name)
        elif _RUNTIMES.fullmatch(plain):
            runtimes.append(library.name)
    exclude = "auditwheel repair --exclude each of them; torch has loaded them already"
    if collide:
        yield Finding("error", "bundled", f"it bundles what torch ships: {_few(collide)}", exclude)
    if copies:
        yield Finding(
            "warning", "bundled", f"it bundles copies of what torch ships: {_few(copies)}", exclude
        )
    if runtimes:
        yield Finding(
            "warning", "bundled",
            f"it bundles a second runtime beside torch's: {_few(runtimes)}",
            "exclude it: two OpenMP runtimes double the threads",
        )  # fmt: skip


# libgomp-24e2ab19.so.1 of auditwheel, libcudart.3eda8113.so.13 of delocating scripts
_RENAMED = re.compile(r"[-.][0-9a-f]{8}(?=[.-])")
_SHIPPED = frozenset(
    "libtorch libtorch_cpu libtorch_cuda libtorch_python libtorch_hip libtorch_global_deps "
    "libtorch_cuda_linalg libtorch_nvshmem libc10 libc10_cuda libc10_hip libshm "
    "libcaffe2_nvrtc".split()
)


def _dependencies(wheel: Wheel, needs: _Needs) -> Iterator[Finding]:
    inside = {lib.soname or Path(lib.name).name for lib in wheel.libraries}
    inside |= {Path(lib.name).name for lib in wheel.libraries}
    wanted = {n for lib in wheel.libraries for n in lib.needed} - inside
    majors = sorted(n for n in wanted if _MAJOR.fullmatch(n))
    if majors:
        yield Finding(
            "warning", "cuda-major", f"it needs certain majors of CUDA or ROCm: {_few(majors)}",
            "link the runtime statically, or name the major in the distribution",
        )  # fmt: skip
    known = (_TORCH, _CUDA, _SYSTEM, _MAJOR, re.compile("libpython.*"))
    odd = {n for n in wanted if not any(pattern.fullmatch(n) for pattern in known)}
    if odd:
        yield Finding(
            "warning", "needed", f"neither torch nor the system nor the wheel has {_few(odd)}",
            "bundle it, or require the distribution that brings it",
        )  # fmt: skip


def _paths(wheel: Wheel, needs: _Needs) -> Iterator[Finding]:
    absolute = {lib.name: p for lib in wheel.libraries for p in lib.rpath if p.startswith("/")}
    beside = {p for lib in wheel.libraries for p in lib.rpath if re.search("torch/lib|nvidia/", p)}
    if absolute:
        where = ", ".join(f"{Path(n).name} in {absolute[n]}" for n in sorted(absolute)[:_SHOWN])
        more = f" and {len(absolute) - _SHOWN} more" if len(absolute) > _SHOWN else ""
        yield Finding(
            "warning", "rpath", f"it searches folders of its builder: {where}{more}",
            "build without rpath: CMAKE_SKIP_RPATH, or patchelf --remove-rpath",
        )  # fmt: skip
    if beside - set(absolute.values()):
        yield Finding(
            "info", "rpath", f"it searches beside itself: {_few(beside - set(absolute.values()))}",
            "not needed: torch is loaded first, and its libraries are found by their names",
        )  # fmt: skip


def _stack(wheel: Wheel, needs: _Needs) -> Iterator[Finding]:
    names = [lib.name for lib in wheel.libraries if lib.executable_stack]
    if names:
        yield Finding(
            "error", "stack",
            f"{_few(names)} asks for an executable stack, which glibc >= 2.41 refuses to load",
            "link with -z noexecstack; assembler files lack a .note.GNU-stack",
        )  # fmt: skip


def _runtime(wheel: Wheel, needs: _Needs) -> Iterator[Finding]:
    names = [
        lib.name for lib in wheel.libraries
        if "__cxa_throw" in lib.defined and (lib.undefined | lib.weak) & torch_symbols().keys()
    ]  # fmt: skip
    if names:
        yield Finding(
            "error", "static-libstdc++",
            f"{_few(names)} has libstdc++ linked in: every error of torch ends the process",
            "link libstdc++ and libgcc_s as shared libraries",
        )  # fmt: skip


def _manifest(wheel: Wheel, needs: _Needs) -> Iterator[Finding]:
    for name, wrong in wheel.manifests.items():
        if wrong:
            yield Finding(
                "error", "manifest", f"{name}: {wrong}",
                "write the manifest after the last change of the library",
            )  # fmt: skip


_CHECKS: tuple[Callable[[Wheel, _Needs], Iterator[Finding]], ...] = (
    _readable, _tags, _machine, _platform, _torch_abi, _requirements, _python_abi, _bundled,
    _dependencies, _paths, _stack, _runtime, _manifest,
)  # fmt: skip


# ---- against one torch ----


def _missing(folder: Path, wheel: Wheel) -> tuple[str, set[str]]:
    """Return the release of the torch in a folder and the wheel's symbols that it lacks."""
    version = (folder / "version.py").read_text(encoding="utf-8")
    found = re.search(r"__version__ = '([^']+)'", version)
    exported = _exports(folder / "lib")
    inside = {s for library in wheel.libraries for s in library.defined}
    table = torch_symbols()
    wanted = {
        s for library in wheel.libraries for s in library.undefined
        if s in table or _CPP.match(s) or _THP.fullmatch(s)
    }  # fmt: skip
    return found[1] if found else folder.name, wanted - exported - inside


@cache
def _exports(folder: Path) -> frozenset[str]:
    paths = [p for p in sorted(folder.glob("*.so*")) if _TORCH.fullmatch(p.name)]
    return frozenset().union(*(elf.read(p).defined for p in paths))

# SPDX-License-Identifier: Apache-2.0
"""The rules of check-abi: each looks at one thing and yields what is wrong, and what to change."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from opmux.abi import elf
from opmux.abi.symbols import (
    MACHINES,
    MAJOR,
    SHOWN,
    TORCH,
    Needs,
    bound_modules,
    few,
    number,
    torch_symbols,
)
from opmux.abi.wheel import Wheel

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
# glibc -> what the compilers of that time's systems have of libstdc++ (auditwheel's policies)
_LIBSTDCXX = ((2, 17, (3, 4, 19)), (2, 24, (3, 4, 22)), (2, 27, (3, 4, 24)), (2, 28, (3, 4, 24)),
              (2, 31, (3, 4, 28)), (2, 34, (3, 4, 29)), (2, 35, (3, 4, 30)),
              (2, 39, (3, 4, 33)))  # fmt: skip
_LEGACY = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}


@dataclass(frozen=True)
class Finding:
    """Something about a wheel: ``error``, ``warning`` or ``info``, and what to change."""

    level: str
    code: str
    sentence: str
    remedy: str = ""


def _readable(wheel: Wheel, needs: Needs) -> Iterator[Finding]:
    for sentence in wheel.unreadable:
        yield Finding("error", "elf", sentence, "build the wheel again")


def _tags(wheel: Wheel, needs: Needs) -> Iterator[Finding]:
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
            f"the file's name says {few(wheel.tags)}, its WHEEL file {few(wheel.stated)}",
            "rename wheels with `wheel tags`: installers read the one, checkers the other",
        )  # fmt: skip
    bound = bound_modules(wheel)
    free = [t for t in wheel.tags if "-abi3-" in t or "-none-" in t]
    if bound and free:
        yield Finding(
            "error", "tag",
            f"the tag {free[0]} promises several CPythons, {few(bound)} imports in "
            f"{', '.join(sorted(set(bound.values())))} only",
            "build it with the limited API, or tag one wheel for each CPython",
        )  # fmt: skip
    elif wheel.libraries and not free:
        yield Finding(
            "warning", "tag",
            f"one wheel serves one CPython ({few(wheel.tags)})",
            "register ops through the stable ABI without Python: py3-none, one wheel for all",
        )  # fmt: skip


def _expanded(tags: Iterable[str]) -> set[str]:
    from packaging.tags import parse_tag

    return {str(one) for tag in tags for one in parse_tag(tag)}


def _machine(wheel: Wheel, needs: Needs) -> Iterator[Finding]:
    said = {t.split("-")[-1] for t in wheel.tags}
    for library in wheel.libraries:
        machine = MACHINES.get(library.machine, library.machine)
        if not any(platform.endswith((machine, "any", "universal2")) for platform in said):
            yield Finding(
                "error", "machine",
                f"{library.name} is for {machine}, the tag says {few(said)}", "build it there",
            )  # fmt: skip


def _platform(wheel: Wheel, needs: Needs) -> Iterator[Finding]:
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


def _torch_abi(wheel: Wheel, needs: Needs) -> Iterator[Finding]:
    if needs.cpp:
        counts = sorted(needs.cpp, key=lambda name: -len(needs.cpp[name]))
        shown = ", ".join(f"{Path(n).name} {len(needs.cpp[n])}" for n in counts[:SHOWN])
        more = f" and {len(counts) - SHOWN} more" if len(counts) > SHOWN else ""
        names = {s for symbols in needs.cpp.values() for s in symbols}
        yield Finding(
            "error", "torch-cpp",
            f"it uses {len(names)} C++ symbols of torch, which change with every release "
            f"({shown}{more}): {few(names)}",
            "use torch/csrc/stable with TORCH_TARGET_VERSION, without at::, c10:: and torch::",
        )  # fmt: skip
    if needs.thp:
        yield Finding(
            "error", "torch-python",
            f"it uses libtorch_python, bound to torch and to CPython: {few(needs.thp)}",
            "pass tensors through torch.ops, not through THPVariable",
        )  # fmt: skip
    if needs.floor and not needs.cpp:
        newest = [n for n, release in needs.shim.items() if release == needs.floor]
        text = f"torch >= {needs.floor}"
        if needs.floor != "2.10":  # every symbol is in the oldest torch of the table
            text += f", for {few(newest)}"
        yield Finding("info", "torch-floor", text)
    later = {n: r for n, r in needs.optional.items() if number(r) > number(needs.floor or "0")}
    if later:
        yield Finding("info", "torch-floor", f"used where torch has them: {few(later)}")
    if needs.unknown:
        yield Finding(
            "warning", "torch-floor",
            f"no torch up to {max(_releases(), key=number)} exports {few(needs.unknown)}",
            "it may be another library's, or a newer torch's",
        )  # fmt: skip


def _releases() -> set[str]:
    return {release for release, _ in torch_symbols().values()}


def _requirements(wheel: Wheel, needs: Needs) -> Iterator[Finding]:
    from packaging.requirements import Requirement

    torch = [r for text in wheel.requires if (r := Requirement(text)).name == "torch"]
    extra = [r for r in torch if r.marker and "extra" in str(r.marker)]
    torch = [r for r in torch if r not in extra]
    uses = bool(needs.floor or needs.cpp)
    pins = [s for r in torch for s in r.specifier if s.operator in ("==", "===")]
    if needs.cpp and not pins:
        said = few(str(r) for r in torch) if torch else "nothing"
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
        older = [v for v in ("2.8", "2.9", *sorted(_releases(), key=number))
                 if number(v) < number(needs.floor)]  # fmt: skip
        wrong = [v for v in older if any(r.specifier.contains(f"{v}.99") for r in torch)]
        if wrong and needs.floor != "2.10":
            yield Finding(
                "error", "torch-requirement",
                f"it requires {few(str(r) for r in torch)}, which allows torch {wrong[0]}; its "
                f"symbols need {needs.floor}",
                f"require torch>={needs.floor}",
            )  # fmt: skip


def _python_abi(wheel: Wheel, needs: Needs) -> Iterator[Finding]:
    linked = [
        lib.name for lib in wheel.libraries if any(n.startswith("libpython") for n in lib.needed)
    ]
    if linked:
        yield Finding(
            "error", "libpython", f"{few(linked)} needs libpython, which many Pythons lack",
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
        if Path(library).name not in bound_modules(wheel):  # named already
            yield Finding(
                "error", "python-private",
                f"{library} uses private symbols of CPython: {few(names)}",
                "define Py_LIMITED_API",
            )  # fmt: skip
    none = [t for t in wheel.tags if "-none-" in t]
    if none and needs.python and not private and not bound_modules(wheel):
        count = len({s for names in needs.python.values() for s in names})
        yield Finding(
            "warning", "tag",
            f"the tag {none[0]} says that no CPython matters, {count} of its symbols are used",
            "tag it cp310-abi3 when it keeps to the limited API",
        )  # fmt: skip


def _bundled(wheel: Wheel, needs: Needs) -> Iterator[Finding]:
    collide: list[str] = []
    copies: list[str] = []
    runtimes: list[str] = []
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
        yield Finding("error", "bundled", f"it bundles what torch ships: {few(collide)}", exclude)
    if copies:
        yield Finding(
            "warning", "bundled", f"it bundles copies of what torch ships: {few(copies)}", exclude
        )
    if runtimes:
        yield Finding(
            "warning", "bundled",
            f"it bundles a second runtime beside torch's: {few(runtimes)}",
            "exclude it: two OpenMP runtimes double the threads",
        )  # fmt: skip


# libgomp-24e2ab19.so.1 of auditwheel, libcudart.3eda8113.so.13 of delocating scripts
_RENAMED = re.compile(r"[-.][0-9a-f]{8}(?=[.-])")
_SHIPPED = frozenset(
    "libtorch libtorch_cpu libtorch_cuda libtorch_python libtorch_hip libtorch_global_deps "
    "libtorch_cuda_linalg libtorch_nvshmem libc10 libc10_cuda libc10_hip libshm "
    "libcaffe2_nvrtc".split()
)


def _dependencies(wheel: Wheel, needs: Needs) -> Iterator[Finding]:
    inside = {lib.soname or Path(lib.name).name for lib in wheel.libraries}
    inside |= {Path(lib.name).name for lib in wheel.libraries}
    wanted = {n for lib in wheel.libraries for n in lib.needed} - inside
    majors = sorted(n for n in wanted if MAJOR.fullmatch(n))
    if majors:
        yield Finding(
            "warning", "cuda-major", f"it needs certain majors of CUDA or ROCm: {few(majors)}",
            "link the runtime statically, or name the major in the distribution",
        )  # fmt: skip
    known = (TORCH, _CUDA, _SYSTEM, MAJOR, re.compile("libpython.*"))
    odd = {n for n in wanted if not any(pattern.fullmatch(n) for pattern in known)}
    if odd:
        yield Finding(
            "warning", "needed", f"neither torch nor the system nor the wheel has {few(odd)}",
            "bundle it, or require the distribution that brings it",
        )  # fmt: skip


def _paths(wheel: Wheel, needs: Needs) -> Iterator[Finding]:
    absolute = {lib.name: p for lib in wheel.libraries for p in lib.rpath if p.startswith("/")}
    beside = {p for lib in wheel.libraries for p in lib.rpath if re.search("torch/lib|nvidia/", p)}
    if absolute:
        where = ", ".join(f"{Path(n).name} in {absolute[n]}" for n in sorted(absolute)[:SHOWN])
        more = f" and {len(absolute) - SHOWN} more" if len(absolute) > SHOWN else ""
        yield Finding(
            "warning", "rpath", f"it searches folders of its builder: {where}{more}",
            "build without rpath: CMAKE_SKIP_RPATH, or patchelf --remove-rpath",
        )  # fmt: skip
    if beside - set(absolute.values()):
        yield Finding(
            "info", "rpath", f"it searches beside itself: {few(beside - set(absolute.values()))}",
            "not needed: torch is loaded first, and its libraries are found by their names",
        )  # fmt: skip


def _stack(wheel: Wheel, needs: Needs) -> Iterator[Finding]:
    names = [lib.name for lib in wheel.libraries if lib.executable_stack]
    if names:
        yield Finding(
            "error", "stack",
            f"{few(names)} asks for an executable stack, which glibc >= 2.41 refuses to load",
            "link with -z noexecstack; assembler files lack a .note.GNU-stack",
        )  # fmt: skip


def _runtime(wheel: Wheel, needs: Needs) -> Iterator[Finding]:
    names = [
        lib.name for lib in wheel.libraries
        if "__cxa_throw" in lib.defined and (lib.undefined | lib.weak) & torch_symbols().keys()
    ]  # fmt: skip
    if names:
        yield Finding(
            "error", "static-libstdc++",
            f"{few(names)} has libstdc++ linked in: every error of torch ends the process",
            "link libstdc++ and libgcc_s as shared libraries",
        )  # fmt: skip


def _manifest(wheel: Wheel, needs: Needs) -> Iterator[Finding]:
    for name, wrong in wheel.manifests.items():
        if wrong:
            yield Finding(
                "error", "manifest", f"{name}: {wrong}",
                "write the manifest after the last change of the library",
            )  # fmt: skip


RULES: tuple[Callable[[Wheel, Needs], Iterator[Finding]], ...] = (
    _readable, _tags, _machine, _platform, _torch_abi, _requirements, _python_abi, _bundled,
    _dependencies, _paths, _stack, _runtime, _manifest,
)  # fmt: skip

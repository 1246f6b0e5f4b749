# SPDX-License-Identifier: Apache-2.0
"""What a wheel's libraries need from outside of it, by whose symbols they are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from opmux.abi import elf
from opmux.abi.wheel import Wheel

# at::, c10::, torch:: and caffe2:: as the outermost namespace of a mangled name
_CPP = re.compile(
    r"_Z(?:T[VISTC]|GV|GR|Th?n?\d*_|Tv\w*_)?(?:N[rVK]*[RO]?)?(?:2at|3c10|5torch|6caffe2)"
)
_SHIM = re.compile(r"(aoti|torch)_[a-z0-9_]+")
_PYTHON = re.compile(r"_?Py[A-Z_]\w*")
THP = re.compile(r"(_Z\w*)?THP[A-Z]\w*")
TORCH = re.compile(r"lib(torch(_\w+)?|c10(_\w+)?|shm|caffe2_nvrtc)\.so.*")
MAJOR = re.compile(r"lib(cudart|cublas|cublasLt|nvrtc|cufft|amdhip64)\.so\.(\d+)")
MACHINES = {"x64": "x86_64", "AArch64": "aarch64", "x86": "i686", "ARM": "armv7l"}
SHOWN = 3


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
class Needs:
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
        return max(self.shim.values(), key=number, default="")

    @property
    def cpp_count(self) -> int:
        """How many of torch's C++ symbols are needed."""
        return len({s for names in self.cpp.values() for s in names})


def number(release: str) -> elf.Version:
    """Return 2.10 as (2, 10), which compares."""
    return tuple(map(int, release.split(".")))


def needs_of(wheel: Wheel) -> Needs:
    """Return what the libraries of a wheel need together."""
    inside = {s for library in wheel.libraries for s in library.defined}
    table = torch_symbols()
    found = Needs({}, {}, [], {}, {}, [], {}, {})
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
        found.thp.extend(sorted(s for s in outside if THP.fullmatch(s)))
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


def python_tag(tag: str) -> str:
    """Return 3.10 for cp310-abi3-..., and py3 as it is."""
    python = tag.partition("-")[0]
    found = re.fullmatch(r"cp(\d)(\d+)", python)
    return f"{found[1]}.{found[2]}" if found else python


def bound_modules(wheel: Wheel) -> dict[str, str]:
    """Return extension modules that one CPython alone imports, by their names -> its version."""
    found = {}
    for library in wheel.libraries:
        match = re.search(r"\.cpython-(\d)(\d+)\w*-[\w-]+\.so$", library.name)
        # Without PyInit it is no module: torch.ops.load_library takes it by its path.
        if match and any(s.startswith("PyInit_") for s in library.defined):
            found[Path(library.name).name] = f"{match[1]}.{match[2]}"
    return found


def few(names: Iterable[str]) -> str:
    """Return the first names and how many more there are."""
    listed = sorted(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more

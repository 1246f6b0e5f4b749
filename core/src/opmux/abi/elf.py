# SPDX-License-Identifier: Apache-2.0
"""What one ELF library needs and offers, read without loading it."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Version = tuple[int, ...]
_VERSIONED = re.compile(r"(GLIBC|GLIBCXX|CXXABI|GCC|GOMP|OMP)_([\d.]+)")
_STACK_IS_EXECUTABLE = 1  # PF_X


@dataclass(frozen=True)
class Library:
    """A shared library, or a program."""

    name: str
    machine: str
    needed: tuple[str, ...]
    soname: str
    rpath: tuple[str, ...]
    undefined: frozenset[str]  # needed to load it
    weak: frozenset[str]  # used when something offers them
    defined: frozenset[str]
    versions: dict[str, Version]  # GLIBC -> the newest that a needed symbol carries
    newest: dict[str, str]  # GLIBC -> one symbol that carries it
    executable_stack: bool


class ElfError(Exception):
    """A file that is no library, or a damaged one."""


def read(path: Path, name: str = "") -> Library:
    """Read a library; ``name`` is how it is called in the answer."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        with path.open("rb") as file:
            return _library(ELFFile(file), name or path.name)
    except (ELFError, ValueError, KeyError, IndexError, struct.error, OSError) as error:
        raise ElfError(f"{name or path.name} is no ELF library: {error}") from None


def _library(elf: Any, name: str) -> Library:
    dynamic = elf.get_section_by_name(".dynamic")
    tags = list(dynamic.iter_tags()) if dynamic is not None else []

    def values(kind: str, field: str) -> tuple[str, ...]:
        return tuple(getattr(t, field) for t in tags if t.entry.d_tag == kind)

    undefined: set[str] = set()
    weak: set[str] = set()
    defined: set[str] = set()
    symbols = list(_symbols(elf))
    for symbol, is_weak, is_defined, _ in symbols:
        if is_defined:
            defined.add(symbol)
        else:
            (weak if is_weak else undefined).add(symbol)
    versions, newest = _versions(elf, symbols)
    stack = [s["p_flags"] for s in elf.iter_segments() if s["p_type"] == "PT_GNU_STACK"]
    paths = values("DT_RPATH", "rpath") + values("DT_RUNPATH", "runpath")
    return Library(
        name=name,
        machine=elf.get_machine_arch(),
        needed=values("DT_NEEDED", "needed"),
        soname=next(iter(values("DT_SONAME", "soname")), ""),
        rpath=tuple(p for path in paths for p in path.split(":") if p),
        undefined=frozenset(undefined),
        weak=frozenset(weak),
        defined=frozenset(defined),
        versions=versions,
        newest=newest,
        # Without the entry, the kernel takes the executable stack of old times.
        executable_stack=not stack or bool(stack[0] & _STACK_IS_EXECUTABLE),
    )


def _symbols(elf: Any) -> Iterator[tuple[str, bool, bool, int]]:
    """Yield (name, weak, defined, index) of the dynamic symbols."""
    table, text = elf.get_section_by_name(".dynsym"), elf.get_section_by_name(".dynstr")
    if table is None or text is None:
        return
    names = text.data()
    # Field by field, pyelftools takes a minute for libtorch's 75,000 symbols.
    layout = ("<" if elf.little_endian else ">") + ("IBBHQQ" if elf.elfclass == 64 else "IIIBBH")
    for index, entry in enumerate(struct.iter_unpack(layout, table.data())):
        info, section = (entry[1], entry[3]) if elf.elfclass == 64 else (entry[3], entry[5])
        if entry[0]:
            end = names.index(b"\0", entry[0])
            name = names[entry[0] : end].decode(errors="replace")
            yield name, info >> 4 == 2, section != 0, index


def _versions(
    elf: Any, symbols: list[tuple[str, bool, bool, int]]
) -> tuple[dict[str, Version], dict[str, str]]:
    """Return the newest version of each family that is needed, and a symbol that needs it."""
    needs, table = (elf.get_section_by_name(n) for n in (".gnu.version_r", ".gnu.version"))
    if needs is None:
        return {}, {}
    by_index: dict[int, tuple[str, Version]] = {}
    versions: dict[str, Version] = {}
    newest: dict[str, str] = {}
    for _, entries in needs.iter_versions():
        for entry in entries:
            found = _VERSIONED.fullmatch(entry.name)
            if found:
                version = tuple(map(int, found[2].split(".")))
                by_index[entry["vna_other"]] = found[1], version
                versions[found[1]] = max(version, versions.get(found[1], ()))
    indices = table.data() if table is not None else b""
    for name, _, defined, index in symbols:
        raw = indices[2 * index : 2 * index + 2]
        if defined or len(raw) < 2:
            continue
        (number,) = struct.unpack("<H" if elf.little_endian else ">H", raw)
        family, version = by_index.get(number & 0x7FFF, ("", ()))
        if family and version == versions[family]:
            newest.setdefault(family, name)
    return versions, newest

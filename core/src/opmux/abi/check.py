# SPDX-License-Identifier: Apache-2.0
"""What a wheel loads in: three answers, what the rules find, a comparison with a torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from opmux.abi import elf
from opmux.abi.rules import RULES, Finding
from opmux.abi.symbols import (
    MACHINES,
    MAJOR,
    THP,
    TORCH,
    Needs,
    bound_modules,
    few,
    is_cpp,
    needs_of,
    python_tag,
    torch_symbols,
)
from opmux.abi.wheel import Wheel, open_wheel


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


def check(path: Path, torches: Sequence[Path] = ()) -> Report:
    """Look at a wheel; ``torches`` are folders with a torch's libraries to compare with."""
    wheel = open_wheel(path)
    needs = needs_of(wheel)
    findings = [f for look in RULES for f in look(wheel, needs)]
    compared = {}
    for folder in torches:
        name, missing = _missing(folder, wheel)
        compared[name] = len(missing)
        if missing:
            findings.append(
                Finding(
                    "warning",
                    "torch-missing",
                    f"torch {name} lacks {len(missing)} of its symbols: {few(missing)}",
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


def _torch_sentence(needs: Needs) -> str:
    if needs.cpp or needs.thp:
        return f"the one that it was built with ({needs.cpp_count} C++ symbols of torch)"
    if not needs.floor:
        return "any, it uses no symbol of torch"
    return f">= {needs.floor} ({len(needs.shim)} symbols of the stable ABI)"


def _python_sentence(wheel: Wheel, needs: Needs) -> str:
    if not wheel.libraries:
        return f"any that the metadata allows ({wheel.requires_python or 'no bound'})"
    bound = bound_modules(wheel)
    if bound:
        return f"CPython {', '.join(sorted(set(bound.values())))} only: {few(bound)}"
    tags = sorted({python_tag(t) for t in wheel.tags})
    if not any("-abi3-" in t or "-none-" in t for t in wheel.tags):
        unused = "" if needs.python else ", though it uses no symbol of CPython"
        return f"CPython {', '.join(tags)} only, by its tag{unused}"
    if not needs.python:
        return "any, it uses no symbol of CPython"
    return f"CPython >= {tags[0]} (limited API)" if "-abi3-" in wheel.tags[0] else "see below"


def _system_sentence(wheel: Wheel, needs: Needs) -> str:
    if not wheel.libraries:
        return "any"
    parts = [f"{MACHINES.get(m, m)}" for m in sorted({lib.machine for lib in wheel.libraries})]
    for family, shown in (("GLIBC", "glibc"), ("GLIBCXX", "libstdc++ (GLIBCXX)")):
        if family in needs.versions:
            parts.append(f"{shown} >= {'.'.join(map(str, needs.versions[family]))}")
    majors = {found[0] for lib in wheel.libraries for n in lib.needed
              if (found := MAJOR.fullmatch(n))}  # fmt: skip
    return ", ".join([*parts, *sorted(majors)])


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
        if s in table or is_cpp(s) or THP.fullmatch(s)
    }  # fmt: skip
    return found[1] if found else folder.name, wanted - exported - inside


@cache
def _exports(folder: Path) -> frozenset[str]:
    paths = [p for p in sorted(folder.glob("*.so*")) if TORCH.fullmatch(p.name)]
    return frozenset().union(*(elf.read(p).defined for p in paths))

# SPDX-License-Identifier: Apache-2.0
"""Digests of what a plugin consists of: its library, its package."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

REPORT = "conformance.json"  # in the package, but not part of its digest: it names the digest
_SKIPPED = ("__pycache__", REPORT)


def sha256(path: Path) -> str:
    """Return the digest of a file; read once as long as the file stays the same."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


@lru_cache(maxsize=256)
def _sha256(path: Path, *_: int) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def folders(module: str) -> list[Path]:
    """Return the folders of a module's top-level package, or its one file, without importing."""
    spec = importlib.util.find_spec(module.partition(".")[0])
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return [Path(p) for p in spec.submodule_search_locations]
    return [Path(spec.origin)] if spec.origin else []


def package(module: str) -> str:
    """Return the digest of all files of a module's top-level package, or "" when there is none."""
    found = hashlib.sha256()
    for name, path in _files(folders(module)):
        # A changed file has another digest; data beside code may be large, so there the size does.
        what = sha256(path) if _is_code(path) else str(path.stat().st_size)
        found.update(f"{name}\0{what}\n".encode())
    return found.hexdigest()


def _is_code(path: Path) -> bool:
    return bool({".py", ".so", ".json", ".pyd", ".dll", ".dylib", ".toml"} & set(path.suffixes))


def _files(places: list[Path]) -> Iterator[tuple[str, Path]]:
    for place in places:
        if place.is_file():
            yield place.name, place
            continue
        paths = [Path(folder) / name for folder, _, names in os.walk(place) for name in names]
        for path in sorted(paths):
            inside = path.relative_to(place)
            if not any(part in _SKIPPED for part in inside.parts) and path.is_file():
                yield inside.as_posix(), path

# SPDX-License-Identifier: Apache-2.0
"""A wheel file taken apart: its tags, what it requires, its libraries."""

from __future__ import annotations

import email
import hashlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opmux.abi import elf
from opmux.manifest import FILE


class WheelError(Exception):
    """A file that is no wheel."""


@dataclass(frozen=True)
class Wheel:
    """What is in a wheel."""

    file: str
    name: str
    version: str
    tags: tuple[str, ...]  # of the file's name, such as py3-none-linux_x86_64
    stated: tuple[str, ...]  # of its WHEEL file
    requires: tuple[str, ...]
    requires_python: str
    files: tuple[str, ...]
    libraries: tuple[elf.Library, ...]
    unreadable: tuple[str, ...]
    manifests: dict[str, str]  # manifest -> what is wrong with the digest that it names, or ""


def open_wheel(path: Path) -> Wheel:
    """Read a wheel; every ELF file in it is looked at, whatever its name."""
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    try:
        name, version, _, tags = parse_wheel_filename(path.name)
    except InvalidWheelFilename as error:
        raise WheelError(f"{path.name} is no wheel: {error}") from None
    try:
        with zipfile.ZipFile(path) as archive:
            files = tuple(i.filename for i in archive.infolist() if not i.is_dir())
            info = next((f.rpartition("/")[0] for f in files if f.endswith(".dist-info/WHEEL")), "")
            if not info:
                raise WheelError(f"{path.name} has no WHEEL file")
            meta = email.message_from_bytes(_optional(archive, f"{info}/METADATA"))
            stated = email.message_from_bytes(archive.read(f"{info}/WHEEL")).get_all("Tag") or []
            found = list(_libraries(archive))
            manifests = {f: _digest(archive, f) for f in files if Path(f).name == FILE}
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise WheelError(f"{path.name} cannot be read: {error}") from None
    return Wheel(
        path.name,
        str(name),
        str(version),
        tuple(sorted(str(t) for t in tags)),
        tuple(sorted(str(t).strip() for t in stated)),
        tuple(str(r) for r in meta.get_all("Requires-Dist") or []),
        str(meta.get("Requires-Python") or ""),
        files,
        tuple(f for f in found if isinstance(f, elf.Library)),
        tuple(f for f in found if isinstance(f, str)),
        manifests,
    )


def _optional(archive: zipfile.ZipFile, name: str) -> bytes:
    return archive.read(name) if name in archive.namelist() else b""


def _libraries(archive: zipfile.ZipFile) -> Iterator[elf.Library | str]:
    """Yield every library; GPU libraries of a gigabyte are unpacked one at a time."""
    for entry in archive.infolist():
        if entry.is_dir() or entry.file_size < 64:
            continue
        with archive.open(entry) as packed:
            start = packed.read(20)
            # Shared objects and programs; device code in ELF clothes is neither.
            if start[:4] != b"\x7fELF" or start[16] not in (2, 3):
                continue
            with tempfile.NamedTemporaryFile() as copy:
                copy.write(start)
                shutil.copyfileobj(packed, copy, 1 << 20)
                copy.flush()
                try:
                    found = elf.read(Path(copy.name), entry.filename)
                except elf.ElfError as error:
                    yield str(error)
                    continue
        if found.machine != "<unknown>" and (found.needed or found.undefined or found.defined):
            yield found


def _digest(archive: zipfile.ZipFile, manifest: str) -> str:
    """Return what is wrong with the library that a manifest of opmux names, or ""."""
    try:
        data: Any = json.loads(archive.read(manifest))
        library = data.get("library") or {}
        if not library:
            return ""
        found = hashlib.sha256()
        with archive.open(f"{manifest.rpartition('/')[0]}/{library['file']}") as file:
            while block := file.read(1 << 20):
                found.update(block)
    except KeyError as error:
        return f"{error.args[0]}"
    except (ValueError, AttributeError, TypeError) as error:
        return f"it cannot be read: {error}"
    if found.hexdigest() != library["sha256"]:
        return f"{library['file']} has another digest than the one that it names"
    return ""

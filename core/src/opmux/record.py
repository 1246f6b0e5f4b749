# SPDX-License-Identifier: Apache-2.0
"""The conformance report of a backend, as core reads it: shipped in its package, or made here.

It counts as long as the package and its library are those that were tested. To ship one, test the
installed wheel and put the report into the same file::

    pytest --pyargs opmux.conformance --opmux-backend acme --opmux-report report.json
    python -m opmux.record opmux_acme-1.0-py3-none-manylinux_2_28_x86_64.whl report.json
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opmux import digest
from opmux.kernel import Backend

FORMAT = 2
LAST = 8


@dataclass(frozen=True)
class Record:
    """What a report says; ``level`` is the highest that passed, -1 for none that counts."""

    level: int
    sentence: str
    path: Path | None = None


def folder() -> Path | None:
    """Return where ``opmux conform`` keeps its reports, or None when this user has no home."""
    base = os.environ.get("XDG_DATA_HOME", "")
    if not Path(base).is_absolute():
        try:
            base = str(Path.home() / ".local" / "share")
        except RuntimeError:
            return None
    return Path(base) / "opmux" / "conformance"


def read(module: str, backend: Backend) -> Record:
    """Return the record of an installed backend: one that was made here before the shipped one."""
    if not module:  # put in service by hand
        return Record(-1, "it belongs to no package")
    package = digest.package(module)
    kept = folder()
    places = [kept / f"{backend.name}-{package[:16]}.json"] if kept is not None else []
    places += [place / digest.REPORT for place in digest.folders(module) if place.is_dir()]
    for path in places:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError:
            continue
        return _judge(text, path, package, backend)
    return Record(-1, "it has no conformance report")


def _judge(text: str, path: Path, package: str, backend: Backend) -> Record:
    try:
        data: Any = json.loads(text)
        if data["format"] != FORMAT:
            return Record(-1, f"its report has format {data['format']}, this core reads {FORMAT}")
        level = -1 if data["level"] is None else int(data["level"])
        library = data.get("library") or {}
        own = digest.sha256(backend.library) if backend.library is not None else ""
        if data["backend"] != backend.name or library.get("sha256", "") != own:
            return Record(-1, "its report is of another library", path)
        if data["package"] != package:
            return Record(-1, "its report is of another version of its package", path)
        if not data["complete"]:
            return Record(-1, "its report is of a part of its ops or tests", path)
        arch = data["device"].get("arch", "")
        where = f"torch {data['versions']['torch']}" + (f" on {arch}" if arch else "")
        failed = "" if data["passed"] else ", with failures above it"
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        return Record(-1, f"its report cannot be read: {error!r}", path)
    reached = f"level {level}" if level >= 0 else "no level"
    return Record(level, f"its report reaches {reached}, {where}{failed}", path)


def keep(report: Path) -> Path | None:
    """Keep a report that was made here; returns where, or None where nothing can be kept."""
    data = json.loads(report.read_text(encoding="utf-8"))
    place = folder()
    if place is None or not data.get("package"):
        return None
    path = place / f"{data['backend']}-{data['package'][:16]}.json"
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        shutil.copyfile(report, path)
    except OSError:
        return None
    return path


def ship(wheel: Path, report: Path) -> str:
    """Put a report into a wheel, beside its manifest; returns its name there."""
    from opmux.manifest import FILE

    content = report.read_bytes()
    with zipfile.ZipFile(wheel) as old:
        manifests = [n for n in old.namelist() if Path(n).name == FILE]
        lists = [n for n in old.namelist() if n.endswith(".dist-info/RECORD")]
        if len(manifests) != 1 or len(lists) != 1:
            raise ValueError(f"{wheel.name} holds {len(manifests)} manifests, not one")
        name = f"{manifests[0].rpartition('/')[0]}/{digest.REPORT}"
        hashed = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows = [r for r in old.read(lists[0]).decode().splitlines() if not r.startswith(f"{name},")]
        rows.append(f"{name},sha256={hashed},{len(content)}")
        fresh = wheel.with_suffix(".tmp")
        with zipfile.ZipFile(fresh, "w", zipfile.ZIP_DEFLATED) as new:
            for entry in old.infolist():
                if entry.filename not in (name, lists[0]):
                    new.writestr(entry, old.read(entry))
            new.writestr(name, content)
            new.writestr(lists[0], "\n".join(rows) + "\n")
    fresh.replace(wheel)
    return name


def main() -> None:
    """Put a report into a wheel."""
    parser = argparse.ArgumentParser(prog="python -m opmux.record", description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("report", type=Path)
    args = parser.parse_args()
    print(f"{args.wheel.name} now holds {ship(args.wheel, args.report)}")


if __name__ == "__main__":
    main()

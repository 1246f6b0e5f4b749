# SPDX-License-Identifier: Apache-2.0
"""Run ``opmux check-abi`` on real wheels, compare it with readelf and nm, and record both.

    python tools/record_abi.py WHEEL...    # those of dist/ are always among them

Every torch that ``make abi-matrix`` has installed is compared with, too. docs/check-abi.json holds
the record, tools/generate.py makes docs/check-abi.md of it.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from opmux import abi

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "check-abi.json"
# what c++filt prints for torch's own names: the outermost namespace, after "vtable for" and such
CPP = re.compile(
    r"^(?:(?:vtable|typeinfo|typeinfo name|VTT|guard variable|construction vtable) for )?"
    r"(?:at|c10|torch|caffe2)::"
)
SHIM = re.compile(r"^(aoti_torch|aoti_record|torch)_[a-z0-9_]+$")


def independent(wheel: Path) -> dict[str, Any]:
    """Return what binutils say of a wheel's libraries; shares no code with check-abi."""
    cpp: set[str] = set()
    shim: set[str] = set()
    python: set[str] = set()
    defined: set[str] = set()
    glibc = [0, 0]
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as file:
                if file.read(4) != b"\x7fELF":
                    continue
            with tempfile.TemporaryDirectory() as folder:
                path = archive.extract(entry, folder)
                listed = _run("nm", "-D", "--without-symbol-versions", path)
                for line in listed.splitlines():
                    kind, name = line.split()[-2:]
                    if kind in "Uvw":
                        if re.match(r"_?Py[A-Z_]", name) and kind == "U":
                            python.add(name)
                        (shim if SHIM.match(name) and kind == "U" else cpp).add(name)
                    else:
                        defined.add(name)
                for found in re.findall(r"GLIBC_(\d+)\.(\d+)", _run("readelf", "-V", path)):
                    glibc = max(glibc, [int(found[0]), int(found[1])])
    outside = sorted(cpp - defined)
    readable = _run("c++filt", "-p", stdin="\n".join(outside)).splitlines()
    torch = [m for m, d in zip(outside, readable, strict=True) if m != d and CPP.match(d)]
    return {
        "torch_cpp_symbols": len(torch),
        "torch_stable_symbols": len(shim - defined),
        "python_symbols": len(python - defined),
        "GLIBC": ".".join(map(str, glibc)) if glibc[0] else "",
    }


def _run(*command: str, stdin: str = "") -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    return done.stdout


def torches() -> list[Path]:
    """Return the torches of the ABI matrix."""
    return sorted(ROOT.glob("build/abi/torch-*/lib/python*/site-packages/torch"))


def main() -> None:
    """Check, compare, record."""
    wheels = [*sorted((ROOT / "dist").glob("*.whl")), *map(Path, sys.argv[1:])]
    rows = []
    wrong = 0
    for wheel in wheels:
        report = abi.check(wheel, torches())
        data = json.loads(json.dumps(report.to_dict()))
        second = independent(wheel)
        first = {k: data["facts"].get(k, 0) for k in second if k != "GLIBC"}
        first["GLIBC"] = data["facts"]["versions"].get("GLIBC", "")
        if first != second:
            wrong += 1
            print(f"{wheel.name}: check-abi says {first}, binutils say {second}")
        data["sha256"] = hashlib.sha256(wheel.read_bytes()).hexdigest()
        data["binutils"] = second
        # The lists are long and the same as in the wheel.
        data["facts"] = {k: v for k, v in data["facts"].items() if k != "needed"}
        rows.append(data)
        print(f"{wheel.name}: {len(report.errors)} errors, torch {report.torch}", flush=True)
    RECORD.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows) - wrong} passed, {wrong} failed")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

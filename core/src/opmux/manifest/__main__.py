# SPDX-License-Identifier: Apache-2.0
"""Write the manifest of a backend; a step of its build.

``python -m opmux.manifest --package src/opmux_acme --library build/_opmux_acme.so --output FILE``.
``--cmake-dir`` prints where the CMake functions for backends in C++ are, with the headers beside.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from opmux.manifest import FILE, describe
from opmux.op import find


def build(package: Path, library: Path | None = None) -> dict[str, Any]:
    """Return the manifest of a package, whose ``opmux_backend`` hook is called for it."""
    sys.path.insert(0, str(package.resolve().parent))
    backend = importlib.import_module(package.name).opmux_backend()
    ops = {name: find(name).schema_hash for name in sorted(backend.kernels)}
    data = describe(backend.name, backend.device, ops)
    if library is not None:
        digest = hashlib.sha256(library.read_bytes()).hexdigest()
        data["library"] = {"file": library.name, "sha256": digest}
    return data


def cmake_dir() -> Path:
    """Return the folder of ``opmux.cmake``: in the installed wheel, or in a checkout."""
    here = Path(__file__).resolve().parents[1]
    installed = here / "native" / "cmake"
    return installed if installed.is_dir() else here.parents[2] / "backends" / "common" / "cmake"


def main() -> None:
    """Write a manifest, or print a folder."""
    parser = argparse.ArgumentParser(prog="python -m opmux.manifest", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--package", type=Path, help="the package's folder")
    what.add_argument("--cmake-dir", action="store_true", help="print the folder of opmux.cmake")
    parser.add_argument("--library", type=Path, help="the native library that it ships")
    parser.add_argument("--output", type=Path, help="default: the package's folder")
    args = parser.parse_args()
    if args.cmake_dir:
        print(cmake_dir())
        return
    text = json.dumps(build(args.package, args.library), indent=2) + "\n"
    output: Path = args.output or args.package / FILE
    output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

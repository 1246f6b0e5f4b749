# SPDX-License-Identifier: Apache-2.0
"""The static manifest of a backend: what it needs and implements, readable without importing it.

``opmux-backend.json`` lies in the backend's package. Builds write it with
``python -m opmux.manifest --package src/opmux_acme --library build/_opmux_acme.so --output FILE``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "opmux-backend.json"
FORMAT = 1


class ManifestError(Exception):
    """A manifest that is missing or wrong."""

    def __init__(
        self, sentence: str, remedy: str = "build it with python -m opmux.manifest"
    ) -> None:
        """Keep the remedy."""
        super().__init__(sentence)
        self.remedy = remedy


@dataclass(frozen=True)
class Manifest:
    """The fields of ``opmux-backend.json``; version ranges are (lowest, below)."""

    backend: str
    device: str
    opmux: tuple[str, str]
    torch: tuple[str, str]
    ops: Mapping[str, str]
    sha256: str = ""


def find(module: str) -> Manifest:
    """Read the manifest that lies beside a module, without importing the module."""
    top = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError) as error:
        raise ManifestError(f"module {top} cannot be found: {error}", "install it again") from None
    if spec is None or (spec.origin is None and not spec.submodule_search_locations):
        raise ManifestError(f"module {top} does not exist", "install it again")
    folders = [Path(p) for p in spec.submodule_search_locations or ()]
    paths = [folder / FILE for folder in folders]
    if not folders and spec.origin:  # a plugin that is one file
        paths = [Path(spec.origin).with_name(f"{top}.{FILE}")]
    for path in paths:
        if path.is_file():
            return read(path)
    raise ManifestError(f"it has no manifest {paths[0].name}")


def read(path: Path) -> Manifest:
    """Read and check one manifest."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ManifestError(f"manifest {path.name} cannot be read: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        got = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ManifestError(f"manifest format is {got}, this core reads {FORMAT}")
    try:
        library = data.get("library") or {}
        return Manifest(
            backend=_text(data["backend"]),
            device=_text(data["device"]),
            opmux=_range(data["requires"]["opmux"]),
            torch=_range(data["requires"]["torch"]),
            ops={_text(k): _text(v) for k, v in data["ops"].items()},
            sha256=_text(library.get("sha256", "")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ManifestError(f"manifest {path.name} is not complete: {error!r}") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _range(value: Any) -> tuple[str, str]:
    low, below = value
    return _text(low), _text(below)


def build(
    package: Path,
    library: Path | None = None,
    opmux: tuple[str, str] = ("0.1", "0.2"),
    torch: tuple[str, str] = ("2.10", ""),
) -> dict[str, Any]:
    """Return the manifest of a package, whose ``opmux_backend`` hook is called for it."""
    from opmux.op import find as find_op

    sys.path.insert(0, str(package.resolve().parent))
    backend = importlib.import_module(package.name).opmux_backend()
    data: dict[str, Any] = {
        "format": FORMAT,
        "backend": backend.name,
        "device": backend.device,
        "requires": {"opmux": list(opmux), "torch": list(torch)},
        "ops": {name: find_op(name).schema_hash for name in sorted(backend.kernels)},
    }
    if library is not None:
        digest = hashlib.sha256(library.read_bytes()).hexdigest()
        data["library"] = {"file": library.name, "sha256": digest}
    return data


def main() -> None:
    """Write a manifest; the last step of a backend's build."""
    parser = argparse.ArgumentParser(prog="python -m opmux.manifest", description=__doc__)
    parser.add_argument("--package", type=Path, required=True, help="the package's folder")
    parser.add_argument("--library", type=Path, help="the native library that it ships")
    parser.add_argument("--output", type=Path, help="default: the package's folder")
    args = parser.parse_args()
    text = json.dumps(build(args.package, args.library), indent=2) + "\n"
    output: Path = args.output or args.package / FILE
    output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The static manifest of a backend: what it needs and implements, readable without importing it.

``opmux-backend.json`` lies in the backend's package; ``python -m opmux.manifest`` writes it.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "opmux-backend.json"
FORMAT = 1
# What a backend that is built now needs, as (lowest, below).
OPMUX = ("0.1", "0.2")
TORCH = ("2.10", "")


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


def describe(
    backend: str,
    device: str,
    ops: Mapping[str, str],
    opmux: tuple[str, str] = OPMUX,
    torch: tuple[str, str] = TORCH,
) -> dict[str, Any]:
    """Return the manifest of a backend without a library; ``ops`` maps names to digests."""
    return {
        "format": FORMAT,
        "backend": backend,
        "device": device,
        "requires": {"opmux": list(opmux), "torch": list(torch)},
        "ops": dict(ops),
    }

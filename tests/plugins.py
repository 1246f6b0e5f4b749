# SPDX-License-Identifier: Apache-2.0
"""Backends made on the spot: real distributions in a folder, found through their entry points.

``make_plugin(tmp_path, code=...)`` writes one; put the folder that it returns on ``PYTHONPATH`` of
a child process, or on ``sys.path`` with ``monkeypatch.syspath_prepend`` and call
``opmux.loader.reset()``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from opmux import manifest as manifests
from opmux.op import find


def manifest_for(
    name: str = "acme",
    ops: Iterable[str] = ("silu_and_mul",),
    device: str = "cpu",
    **changes: Any,
) -> dict[str, Any]:
    """Return a manifest that this core accepts; ``changes`` replace top-level fields."""
    return {
        "format": manifests.FORMAT,
        "backend": name,
        "device": device,
        "requires": {"opmux": ["0.1", "0.2"], "torch": ["2.10", ""]},
        "ops": {op: find(op).schema_hash for op in ops},
        **changes,
    }


def make_plugin(
    tmp_path: Path,
    dist: str = "opmux-acme",
    name: str = "acme",
    code: str = "",
    manifest: dict[str, Any] | str | None = None,
    entry: str | None = None,
    version: str = "0.1.0",
) -> Path:
    """Write a distribution into ``tmp_path`` and return the folder for ``sys.path``.

    Several plugins may share a folder when their distributions and modules differ.

    Args:
        tmp_path: the folder; made when it is not there.
        dist: name of the distribution.
        name: name of the entry point, which the backend must carry too.
        code: text of the package's ``__init__.py``.
        manifest: what ``opmux-backend.json`` holds, as a dict or as raw text; None writes no file.
        entry: the entry point's value, ``module`` or ``module:attribute``; ``opmux_NAME`` if None.
        version: version of the distribution.
    """
    value = entry if entry is not None else f"opmux_{name}"
    package = tmp_path / value.partition(":")[0].partition(".")[0]
    info = tmp_path / f"{dist.replace('-', '_')}-{version}.dist-info"
    for folder in (package, info):
        folder.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(code, encoding="utf-8")
    if manifest is not None:
        text = manifest if isinstance(manifest, str) else json.dumps(manifest)
        (package / manifests.FILE).write_text(text, encoding="utf-8")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[opmux.backends]\n{name} = {value}\n")
    return tmp_path

# SPDX-License-Identifier: Apache-2.0
"""A complete backend distribution, written from templates: what ``opmux new-backend`` does.

A project is made of layers, each a folder of ``templates``; a file of a later layer replaces that
of an earlier one. ``@NAME@`` and the like stand for values, in files and in their names.
"""

from __future__ import annotations

import json
import keyword
import re
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from opmux import loader, manifest, policy
from opmux.op import find
from opmux.scaffold import texts

DEVICES = ("cpu", "cuda", "privateuse1")
BINDINGS = ("stable-abi", "pybind11", "python", "triton")
_TEMPLATES = Path(__file__).parent / "templates"
_LAYERS = {
    "stable-abi": ("native", "stable-abi"),
    "pybind11": ("native", "pybind11"),
    "python": ("python",),
    "triton": ("python", "triton"),
}


def write(name: str, device: str, binding: str, target: Path) -> list[Path]:
    """Write a distribution into a new folder and return its files.

    Raises:
        ValueError: the name is not allowed or taken, or the binding cannot serve the device.
        FileExistsError: the folder exists; nothing in it was touched.
    """
    check_name(name)
    if (device, binding) == ("cpu", "triton"):
        raise ValueError(
            "Triton compiles for GPUs: use --device cuda, --device privateuse1 for a device with a "
            "Triton of its own, or --binding python for the CPU"
        )
    if target.exists():
        raise FileExistsError(f"{target} exists; nothing was written")
    files = render(name, device, binding)
    # Written aside and renamed: an error leaves no half of a project.
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
        project = Path(folder) / target.name
        for path, text in files.items():
            (project / path).parent.mkdir(parents=True, exist_ok=True)
            (project / path).write_text(text, encoding="utf-8")
        shutil.move(project, target)
    return [target / path for path in files]


def check_name(name: str) -> None:
    """Raise ValueError for a backend name that is not allowed or that is taken."""
    wanted = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_").removeprefix("opmux_")
    good = re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) and not keyword.iskeyword(name)
    if not good or name.startswith("opmux"):
        usable = re.fullmatch(r"[a-z]\w*", wanted) and not keyword.iskeyword(wanted)
        hint = f"; try {wanted}" if usable and wanted != name else ""
        raise ValueError(
            f"backend name {name!r} must be lower-case words joined by _, such as acme or "
            f"acme_npu, without opmux{hint}"
        )
    if name in ("reference", "core", *policy.KNOWN):
        raise ValueError(f"the backend name {name!r} belongs to opmux")
    for entry in loader.discover():
        if not isinstance(entry, loader.Failure) and entry.name == name:
            dist = entry.dist.name if entry.dist else "a package"
            raise ValueError(f"the backend name {name!r} is taken by {dist}, which is installed")
    if find_spec(f"opmux_{name}") is not None:
        raise ValueError(f"a package opmux_{name} is installed already")


def render(name: str, device: str, binding: str) -> dict[str, str]:
    """Return path -> text of every file."""
    values = texts.values(name, device, binding)
    layers = ["common", "package", *_LAYERS[binding], f"{binding}-{device}"]
    if texts.runs_on_cpu_tensors(device, binding):
        layers.append("plain")
    paths: dict[str, Path] = {}
    for layer in layers:
        for path in sorted((_TEMPLATES / layer).rglob("*.in")):
            relative = path.relative_to(_TEMPLATES / layer).as_posix()
            paths[_fill(relative.removesuffix(".in"), values)] = path
    files = {to: _fill(path.read_text("utf-8"), values) for to, path in sorted(paths.items())}
    if binding in ("python", "triton"):  # the others' build writes it, with the library's digest
        files[f"src/{values['PACKAGE']}/{manifest.FILE}"] = _manifest(name, values["DEVICE"])
    return files


def _fill(text: str, values: dict[str, str]) -> str:
    return re.sub(r"@([A-Z_]+)@", lambda found: values[found[1]], text)


def _manifest(name: str, device: str) -> str:
    op = find("silu_and_mul")
    data = manifest.describe(name, device, {op.name: op.schema_hash})
    return json.dumps(data, indent=2) + "\n"

# SPDX-License-Identifier: Apache-2.0
"""What would run elsewhere: hosts as files, and the registry that a host would have.

A host file says what the backends' probes would report there. ``opmux doctor --save-host FILE``
writes that of this machine; the files beside this one are of machines by their published facts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from opmux import loader
from opmux.dispatch import unknown
from opmux.kernel import Backend, Capability, Code, Reason
from opmux.policy import KNOWN

FORMAT = 1


@dataclass(frozen=True)
class Device:
    """A device by its type alone: torch makes none whose backend is not in this process."""

    type: str
    index: int | None = None

    def __str__(self) -> str:
        """Return the type, as torch prints a device without an index."""
        return self.type


@dataclass(frozen=True)
class Host:
    """A machine: its devices as probes would find them, and the backends that it refuses."""

    name: str
    title: str
    device: str  # what a call's tensors are on
    devices: Mapping[str, Capability]
    refused: Mapping[str, Reason]


@dataclass(eq=False)
class Described(loader.Loaded):
    """A backend of another host: its claims, without its library."""

    def overload(self, symbol: str) -> Callable[..., Any]:
        """Return what a call would run there; here it cannot."""

        def elsewhere(*_: Any) -> None:
            raise RuntimeError(f"{self.name} was described for another host, not loaded")

        return elsewhere


def names() -> list[str]:
    """Return the hosts of this package."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.json"))


def load(name: str) -> Host:
    """Return a host by its name here or by the path of a file."""
    path = Path(name)
    if not name.endswith(".json") and path.name == name:
        if name not in names():
            raise ValueError(unknown("host", name, names()))
    if name in names() or (not path.exists() and path.stem in names() and path.name == name):
        path = Path(__file__).with_name(f"{path.stem}.json")
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"host file {name}: {error}") from None
    try:
        if data["format"] != FORMAT:
            raise ValueError(f"format is {data['format']}, this core reads {FORMAT}")
        devices = {
            kind: Capability(str(d["arch"]), tuple(d.get("facts", {}).items()))
            for kind, d in data["devices"].items()
        }
        refused = {
            backend: Reason(Code(r["code"]), str(r["sentence"]), str(r.get("remedy", "")))
            for backend, r in data.get("refused", {}).items()
        }
        if data["device"] not in devices:
            raise ValueError(f"device {data['device']!r} is not among its devices")
        return Host(path.stem, str(data["title"]), str(data["device"]), devices, refused)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"host file {name}: {what}") from None


def device(kind: str) -> Any:
    """Return torch's device of a type, or one by its name alone where torch does not know it."""
    try:
        return torch.device(kind)
    except RuntimeError:
        return Device(kind)


def registry(host: Host, plugins: Iterable[tuple[Backend, str, str]] | None = None) -> Any:
    """Return the registry that a host would have.

    ``plugins`` are (backend, distribution, version); default: all that are installed here, also
    those that this host refuses.
    """
    from opmux.op import all_ops

    failures: list[loader.Failure] = []
    found = _installed(failures) if plugins is None else plugins
    backends = []
    for backend, dist, version in found:
        if backend.name in host.refused:
            continue
        missing = {
            op: Reason(Code.INTERFACE, unknown("op", op, all_ops()), "upgrade opmux or the backend")
            for op in backend.kernels
            if op not in all_ops()
        }
        there = replace(backend, probe=lambda where, _: _probe(host, where.type))
        backends.append(Described(there, dist, version, f"opmux_{backend.name}", {}, missing))
    backends.sort(key=lambda b: (b.dist, b.name))
    failures = [f for f in failures if f.backend not in host.refused]
    failures += [
        loader.Failure(name, f"opmux-{name.replace('_', '-')}", reason)
        for name, reason in host.refused.items()
    ]
    return loader.Registry(tuple(backends), tuple(failures))


def _probe(host: Host, kind: str) -> Capability:
    found = host.devices.get(kind)
    if found is not None:
        return found
    return Capability(refused=Reason(Code.RUNTIME, f"{host.title} has no {kind} device"))


def _installed(failures: list[loader.Failure]) -> Iterable[tuple[Backend, str, str]]:
    """Yield the plugins that are installed here; those that crash or lie fail as ever."""
    here = loader.load()
    for loaded in here.backends:
        yield loaded.backend, loaded.dist, loaded.version
    refused = {f.backend: f for f in here.failures if not f.op}
    # A plugin that only its own check of this host refused may serve another one.
    mine = {name for name, f in refused.items() if f.reason.code is Code.RUNTIME}
    failures += [f for name, f in sorted(refused.items()) if name not in mine]
    for name in KNOWN:
        if name not in here.names:
            dist = f"opmux-{name.replace('_', '-')}"
            sentence = f"{dist} is not installed here, so its claims are not known"
            reason = Reason(Code.ABSENT, sentence, f"pip install {dist}, which any machine takes")
            failures.append(loader.Failure(name, dist, reason))
    for entry in loader.discover():
        if not isinstance(entry, loader.Failure) and entry.name in mine:
            mine.discard(entry.name)
            yield loader.hook(entry), refused[entry.name].dist, ""


def describe() -> dict[str, Any]:
    """Return this machine as a host file."""
    here = loader.load()
    devices = {}
    for loaded in here.backends:
        kind = loaded.backend.device
        found = loaded.capability(torch.device(kind))
        if found.refused is None:
            devices[kind] = {"arch": found.arch, "facts": dict(found.facts)}
    accelerators = [kind for kind in devices if kind != "cpu"]
    return {
        "format": FORMAT,
        "title": "recorded by opmux doctor",
        "device": accelerators[0] if accelerators else "cpu",
        "devices": devices or {"cpu": {"arch": ""}},
        "refused": {
            f.backend: {
                "code": f.reason.code.value,
                "sentence": f.reason.sentence,
                "remedy": f.reason.remedy,
            }
            for f in here.failures
            if not f.op
        },
    }

# SPDX-License-Identifier: Apache-2.0
"""The backend meets older and newer hosts: what it needs, it says; what it does not know, it loses.

``hosts/*.json`` are frozen: cores and torches that were, and such as may come.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opmux import loader, manifest
from opmux.conformance import probe
from opmux.conformance.cases import Target
from opmux.conformance.test_load import run_apart
from opmux.kernel import Code
from opmux.op import all_ops

pytestmark = pytest.mark.opmux_level(2)
HOSTS = sorted(Path(__file__).with_name("hosts").glob("*.json"))
OLDEST_TORCH = "2.10"


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.partition("+")[0].split(".")[:2])


def _inside(version: str, bounds: tuple[str, str]) -> bool:
    low, below = bounds
    return _number(version) >= _number(low) and (not below or _number(version) < _number(below))


@pytest.mark.parametrize("path", HOSTS, ids=lambda path: path.stem)
def test_negotiates_with_another_host(
    target: Target, static: manifest.Manifest, path: Path
) -> None:
    """Out of range: refused as a whole. In range: refused op by op, the others serve."""
    if target.loaded is None:
        pytest.skip("the backend is not in service: level 1 says why")
    host: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    inside = _inside(host["opmux"], static.opmux) and _inside(host["torch"], static.torch)
    try:
        loader.check_versions(static, host["opmux"], host["torch"])
    except loader.RefusedError as refusal:
        assert not inside, refusal
        assert refusal.reason.code is Code.INTERFACE and refusal.reason.remedy
        return
    assert inside, f"it does not refuse {path.stem}"
    core = {n: op.schema_hash for n, op in all_ops().items() if n not in host["missing"]}
    core |= host["ops"]
    refused = loader.refused_ops(static, target.loaded.backend, core)
    assert set(refused) == {n for n, h in static.ops.items() if core.get(n) != h}
    assert all(r.code is Code.INTERFACE and r.remedy for r in refused.values())


@pytest.mark.parametrize("way", sorted(probe.NEGOTIATIONS))
def test_negotiates_in_a_fresh_process(backend: str, way: str) -> None:
    """A core with another interface of one op loads the rest."""
    run_apart(backend, way)


def test_ends_with_the_series_of_core(static: manifest.Manifest) -> None:
    """The plugin interface may change with the next series; an open range would promise it not."""
    low, below = static.opmux
    assert below, f"the manifest allows every opmux from {low} on"
    assert _number(below) <= (_number(low)[0], _number(low)[1] + 1), f"opmux {low} to {below}"


def test_needs_no_newer_torch_than_it_says(target: Target, static: manifest.Manifest) -> None:
    """The library's symbols exist in the oldest torch of the manifest's range."""
    assert _number(static.torch[0]) >= _number(OLDEST_TORCH), (
        f"the manifest promises torch {static.torch[0]}, core needs {OLDEST_TORCH}"
    )
    library = _library(target)
    if library is None:
        return
    pytest.importorskip("elftools", reason='pip install "opmux[abi]" to look into the library')
    from opmux.abi import elf
    from opmux.abi.symbols import is_cpp, torch_symbols

    found = elf.read(library)
    table = torch_symbols()
    needed = {name: table[name][0] for name in found.undefined if name in table}
    newer = {n: r for n, r in needed.items() if _number(r) > _number(static.torch[0])}
    assert not newer, f"the manifest promises torch {static.torch[0]}, its library needs {newer}"
    assert not any(n.startswith("libpython") for n in found.needed), "it links libpython"
    cpp = sorted(name for name in found.undefined if is_cpp(name))
    if cpp:  # bound to one torch: then it must say so
        low, below = static.torch
        here = ".".join(torch.__version__.split(".")[:2])
        assert below and _number(low) == _number(here), (
            f"it uses {len(cpp)} C++ symbols of torch ({cpp[0]} ...), which other releases lack, "
            f"and promises torch >= {low}"
        )


def _library(target: Target) -> Path | None:
    if target.loaded is None:
        pytest.skip("the backend is not in service: level 1 says why")
    backend = target.loaded.backend
    if backend.library is not None:
        return backend.library
    spec = importlib.util.find_spec(backend.extension) if backend.extension else None
    return Path(spec.origin) if spec is not None and spec.origin else None

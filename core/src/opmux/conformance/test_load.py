# SPDX-License-Identifier: Apache-2.0
"""The backend loads, everywhere and again; each way in a process of its own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest

from opmux import loader, manifest
from opmux.conformance import probe
from opmux.conformance.cases import Target
from opmux.op import all_ops
from opmux.selection import REFERENCE


@pytest.fixture
def backend(target: Target) -> str:
    """Return the backend's name; the reference is never loaded."""
    if target.name == REFERENCE:
        pytest.skip("the reference needs no loading")
    return target.name


def _manifest(backend: str) -> manifest.Manifest:
    entries = [
        e for e in loader.discover() if not isinstance(e, loader.Failure) and e.name == backend
    ]
    assert len({e.value for e in entries}) == 1, f"entry points of {backend}: {entries}"
    return manifest.find(entries[0].module)


def test_loads(backend: str) -> None:
    """It is in service, with every op that it brings."""
    failures = [str(f) for f in loader.failures() if f.backend == backend]
    assert not failures, "\n".join(failures)
    assert backend in {b.name for b in loader.load().backends}


def test_manifest_is_consistent(backend: str, target: Target) -> None:
    """What the manifest says without an import is what the backend and its library are."""
    static = _manifest(backend)
    assert target.loaded is not None, f"{backend} is not loaded"
    described = target.loaded.backend
    assert (static.backend, static.device) == (described.name, described.device)
    ops = all_ops()
    assert dict(static.ops) == {name: ops[name].schema_hash for name in described.kernels}
    if described.library is not None:
        digest = hashlib.sha256(described.library.read_bytes()).hexdigest()
        assert static.sha256 == digest, "the manifest names another library"


@pytest.mark.parametrize("way", sorted(probe.WAYS))
def test_loads_in_a_fresh_process(backend: str, way: str) -> None:
    """Again after a reset, in a forked child, from racing threads, after a load that failed."""
    if way == "fork" and not hasattr(os, "fork"):
        pytest.skip("this platform has no fork")
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-m", "opmux.conformance.probe", way, backend],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{way} ended with {done.returncode}\n{done.stdout}{done.stderr}"

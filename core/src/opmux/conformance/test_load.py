# SPDX-License-Identifier: Apache-2.0
"""The backend loads, everywhere and again; each way in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from opmux import loader
from opmux.conformance import probe

pytestmark = pytest.mark.opmux_level(1)


def test_loads(backend: str) -> None:
    """It is in service, with every op that it brings."""
    failures = [str(f) for f in loader.failures() if f.backend == backend]
    assert not failures, "\n".join(failures)
    assert backend in {b.name for b in loader.load().backends}


@pytest.mark.parametrize("way", sorted(probe.WAYS))
def test_loads_in_a_fresh_process(backend: str, way: str) -> None:
    """Again after a reset, in a forked child, from racing threads, after a load that failed."""
    run_apart(backend, way)


def run_apart(backend: str, way: str) -> None:
    """Run a way of loading in a process of its own, with a sentence when it fails or hangs."""
    if way == "fork" and not hasattr(os, "fork"):
        pytest.skip("this platform has no fork")
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-m", "opmux.conformance.probe", way, backend],
        env={**os.environ, "PYTHONPATH": path, "OPMUX_PROBE": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{way} ended with {done.returncode}\n{done.stdout}{done.stderr}"

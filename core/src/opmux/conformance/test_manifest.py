# SPDX-License-Identifier: Apache-2.0
"""What a backend says before anything of it is imported: its manifest and its metadata."""

from __future__ import annotations

import importlib.metadata
import re
import sys

import pytest

from opmux import digest, manifest
from opmux.conformance.cases import Target
from opmux.op import all_ops

pytestmark = pytest.mark.opmux_level(0)


def test_the_manifest_is_read_without_an_import(
    entry: importlib.metadata.EntryPoint, static: manifest.Manifest
) -> None:
    """The deny list and the handshake work on it alone."""
    assert static.backend == entry.name
    assert static.ops, "it names no op"
    for module in [m for m in sys.modules if m.partition(".")[0] == entry.module]:
        assert sys.modules[module] is not None
    assert manifest.find(entry.module) == static


def test_manifest_is_consistent(static: manifest.Manifest, target: Target) -> None:
    """What the manifest says without an import is what the backend and its library are."""
    if target.loaded is None:
        pytest.skip("the backend is not in service: level 1 says why")
    described = target.loaded.backend
    assert (static.backend, static.device) == (described.name, described.device)
    assert set(static.ops) == set(described.kernels)
    stale = {
        n for n, op in all_ops().items() if n in static.ops and static.ops[n] != op.schema_hash
    }
    assert not stale, f"built for other interfaces of {', '.join(sorted(stale))}"
    if described.library is not None:
        digest_of = digest.sha256(described.library)
        assert static.sha256 == digest_of, "the manifest names another library"


def test_the_distribution_pins_no_torch(entry: importlib.metadata.EntryPoint) -> None:
    """One that wants an exact torch or core cannot be installed beside another."""
    dist = entry.dist
    assert dist is not None and dist.name, "the entry point belongs to no distribution"
    pins = [r for r in dist.requires or () if re.match(r"(torch|opmux)\b[^;]*===?[^;*]*$", r)]
    assert not pins, f"{dist.name} requires {', '.join(pins)}"


def test_the_manifest_states_ranges(static: manifest.Manifest) -> None:
    """From which core and torch on; versions are numbers that compare."""
    for low, below in (static.opmux, static.torch):
        for version in filter(None, (low, below)):
            assert re.fullmatch(r"\d+(\.\d+)+\w*", version), f"{version!r} is no version"
    assert static.torch[0] and static.opmux[0], "an empty lower bound promises every version"

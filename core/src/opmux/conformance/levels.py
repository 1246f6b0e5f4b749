# SPDX-License-Identifier: Apache-2.0
"""The levels of conformance: each rests on those below it."""

from __future__ import annotations

LEVELS = (
    "manifest and metadata",
    "load: again, in a fork, from threads, after a failure",
    "ABI and interfaces, with older and newer hosts",
    "numerics",
    "claims: what is claimed is served, what is not is refused",
    "memory: guard zones, aliases, streams, graphs, devices",
    "torch.compile: schema, full graph, no recompile",
    "determinism and batch invariance, where claimed",
    "speed: not slower than the reference",
)


class Fault(AssertionError):
    """A failure that belongs to another level than the test that met it."""

    opmux_level = 0


class MemoryFault(Fault):
    """A byte changed that the op does not write; met by every call from level 3 on."""

    opmux_level = 5


class ClaimFault(Fault):
    """A call that the kernel claims to serve raised."""

    opmux_level = 4

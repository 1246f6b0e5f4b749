# SPDX-License-Identifier: Apache-2.0
"""opmux: a plugin-based registry of LLM-inference kernels.

``opmux.silu_and_mul(x)`` runs the best kernel that is installed for the tensor's device;
``opmux.silu_and_mul.explain(x)`` says which one and why. Importing this module loads no backend
and touches no device.
"""

from __future__ import annotations

import importlib
from typing import Any

from opmux.hookspecs import hookimpl
from opmux.kernel import (
    FLOATS,
    Backend,
    Capability,
    Code,
    Kernel,
    NoKernelError,
    Property,
    Reason,
    Signature,
    Tier,
    last_dim_multiple_of,
)
from opmux.loader import failures, load
from opmux.policy import configure, effective_config, use

__version__ = "0.1.0"

__all__ = [
    "FLOATS",
    "Backend",
    "Capability",
    "Code",
    "Kernel",
    "NoKernelError",
    "Property",
    "Reason",
    "Signature",
    "Tier",
    "configure",
    "effective_config",
    "failures",
    "hookimpl",
    "last_dim_multiple_of",
    "load",
    "use",
]


def __getattr__(name: str) -> Any:
    """Import an op's definition when it is first named."""
    ops = importlib.import_module("opmux.ops")
    if name not in ops.families():
        raise AttributeError(f"module 'opmux' has no attribute {name!r}")
    call = ops.get(name).call
    globals()[name] = call
    return call


def __dir__() -> list[str]:
    """Return the public names, ops included."""
    ops = importlib.import_module("opmux.ops")
    return sorted({*globals(), *ops.families()})

# SPDX-License-Identifier: Apache-2.0
"""opmux-cpu-amx: kernels for x86-64 CPUs, with AMX and without.

Importing this package loads no library; opmux does, after the handshake.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from opmux import Backend, Capability, Code, Reason, hookimpl
from opmux_cpu_amx.kernels import KERNELS


def check_host() -> Reason | None:
    """Say why this host cannot load the library."""
    machine = platform.machine()
    if machine in ("x86_64", "AMD64"):
        return None
    return Reason(Code.RUNTIME, f"this CPU is {machine}, the kernels are for x86-64")


def probe(device: torch.device, info: Mapping[str, Any]) -> Capability:
    """Report the instruction set that the library chose and what it says of AMX."""
    facts = (
        ("isas", ", ".join(info["isas"])),
        ("amx", info["amx"] or "not on this CPU"),
        ("cpu", info["cpu"]),
    )
    return Capability(arch=info["isa"], facts=facts)


@hookimpl
def opmux_backend() -> Backend:
    """Return the backend."""
    return Backend(
        name="cpu_amx",
        device="cpu",
        kernels=KERNELS,
        library=Path(__file__).with_name("_opmux_cpu_amx.so"),
        check_host=check_host,
        probe=probe,
    )

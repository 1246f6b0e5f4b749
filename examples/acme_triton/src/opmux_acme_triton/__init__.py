# SPDX-License-Identifier: Apache-2.0
"""Kernels in Triton. Importing this package imports no Triton; opmux does, after the handshake."""

from __future__ import annotations

from importlib.util import find_spec

from opmux import Backend, Code, Reason, hookimpl
from opmux_acme_triton.kernels import KERNELS


def check_host() -> Reason | None:
    """Say why the kernels cannot be imported here."""
    if find_spec("triton") is not None:
        return None
    return Reason(Code.RUNTIME, "Triton is not installed", "pip install triton")


@hookimpl
def opmux_backend() -> Backend:
    """Return the backend."""
    return Backend(name="acme_triton", device="cuda", kernels=KERNELS, check_host=check_host)

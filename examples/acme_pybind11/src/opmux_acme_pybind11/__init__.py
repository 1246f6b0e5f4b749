# SPDX-License-Identifier: Apache-2.0
"""The kernels of a vendor who had them before opmux: plain C++ behind pybind11.

Importing this package loads nothing native; opmux does, after the handshake.
"""

from __future__ import annotations

from opmux import Backend, hookimpl
from opmux_acme_pybind11.kernels import KERNELS


@hookimpl
def opmux_backend() -> Backend:
    """Return the backend."""
    return Backend(
        name="acme_pybind11",
        device="cpu",
        kernels=KERNELS,
        extension="opmux_acme_pybind11._native",
    )

# SPDX-License-Identifier: Apache-2.0
"""opmux-cuda: kernels for NVIDIA GPUs.

Importing this package touches no device and loads no library; opmux loads it, after the handshake.
"""

from __future__ import annotations

from pathlib import Path

from opmux import Backend, hookimpl
from opmux_cuda.host import check_host, probe
from opmux_cuda.kernels import KERNELS


@hookimpl
def opmux_backend() -> Backend:
    """Return the backend."""
    return Backend(
        name="cuda",
        device="cuda",
        kernels=KERNELS,
        library=Path(__file__).with_name("_opmux_cuda.so"),
        check_host=check_host,
        probe=probe,
    )

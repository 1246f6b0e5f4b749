# SPDX-License-Identifier: Apache-2.0
"""The support matrix: one line per op."""

from __future__ import annotations

from opmux import FLOATS, Kernel

KERNELS = {
    "rmsnorm": Kernel(FLOATS, fn="opmux_acme_triton.calls:rmsnorm"),
    "silu_and_mul": Kernel(FLOATS, fn="opmux_acme_triton.calls:silu_and_mul"),
}

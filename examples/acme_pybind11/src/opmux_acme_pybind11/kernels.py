# SPDX-License-Identifier: Apache-2.0
"""The support matrix: one line per op."""

from __future__ import annotations

import torch

from opmux import Kernel, last_dim_multiple_of

DTYPES = (torch.float32, torch.bfloat16)
CALLS = "opmux_acme_pybind11.calls"

# Fewer dtypes than those of a general backend, or fewer shapes: between kernels of one tier, the
# narrower domain is chosen.
KERNELS = {
    "fused_add_rmsnorm": Kernel(DTYPES, layout="contiguous", fn=f"{CALLS}:fused_add_rmsnorm"),
    "rmsnorm": Kernel(DTYPES, fn=f"{CALLS}:rmsnorm"),
    "silu_and_mul": Kernel(DTYPES, rejects=last_dim_multiple_of(16), fn=f"{CALLS}:silu_and_mul"),
}

# SPDX-License-Identifier: Apache-2.0
"""The support matrix: one line per op."""

from __future__ import annotations

import torch

from opmux import FLOATS, Kernel

COPIED = (*FLOATS, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)

KERNELS = {
    "apply_token_bitmask": Kernel(dtypes=FLOATS),
    "fused_add_rmsnorm": Kernel(dtypes=FLOATS),
    "gelu_and_mul": Kernel(dtypes=FLOATS),
    "gelu_quick": Kernel(dtypes=FLOATS),
    "gelu_tanh_and_mul": Kernel(dtypes=FLOATS),
    "gemma_fused_add_rmsnorm": Kernel(dtypes=FLOATS),
    "gemma_rmsnorm": Kernel(dtypes=FLOATS),
    "min_p_sample": Kernel(dtypes=FLOATS),
    "rmsnorm": Kernel(dtypes=FLOATS),
    "rotary_embedding": Kernel(dtypes=FLOATS),
    "silu_and_mul": Kernel(dtypes=FLOATS),
    "store_kv_cache": Kernel(dtypes=COPIED),
    "top_k_renorm_prob": Kernel(dtypes=FLOATS),
    "top_k_top_p_sample": Kernel(dtypes=FLOATS),
    "top_p_renorm_prob": Kernel(dtypes=FLOATS),
}

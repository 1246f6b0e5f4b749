# SPDX-License-Identifier: Apache-2.0
"""The support matrix: one line per op."""

from __future__ import annotations

import torch

from opmux import FLOATS, Kernel, Property, Signature

INDICES = (torch.int32, torch.int64)
COPIED = (*FLOATS, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
# What one row gives depends on the others: a scale's place, the one scale, a slot's place.
NOT_BATCH_INVARIANT = frozenset(Property) - {Property.BATCH_INVARIANT}


def _many_groups(signature: Signature) -> str | None:
    # as in moe_fused_gate.cu: a block ranks the groups in shared memory
    groups = signature.axis("num_expert_group")
    return f"{groups} groups of experts are more than 1024" if groups > 1024 else None


KERNELS = {
    "apply_penalties": Kernel(dtypes=FLOATS),
    "apply_shuffle_mul_sum": Kernel(dtypes=FLOATS),
    "apply_token_bitmask": Kernel(dtypes=FLOATS),
    "concat_mla_absorb_q": Kernel(dtypes=FLOATS),
    "concat_mla_k": Kernel(dtypes=FLOATS),
    "fused_add_rmsnorm": Kernel(dtypes=FLOATS),
    "fused_add_rmsnorm_per_token_group_quant": Kernel(
        dtypes=FLOATS, properties=NOT_BATCH_INVARIANT
    ),
    "fused_add_rmsnorm_per_token_quant": Kernel(dtypes=FLOATS),
    "fused_qk_norm_rope": Kernel(dtypes=FLOATS),
    "fused_qk_norm_rope_store_kv": Kernel(dtypes=FLOATS),
    "gelu_and_mul": Kernel(dtypes=FLOATS),
    "gelu_quick": Kernel(dtypes=FLOATS),
    "gelu_tanh_and_mul": Kernel(dtypes=FLOATS),
    "gemma_fused_add_rmsnorm": Kernel(dtypes=FLOATS),
    "gemma_rmsnorm": Kernel(dtypes=FLOATS),
    "layernorm": Kernel(dtypes=FLOATS),
    "merge_state": Kernel(dtypes=FLOATS),
    "min_p_sample": Kernel(dtypes=FLOATS),
    "moe_align_block_size": Kernel(dtypes=INDICES, properties=NOT_BATCH_INVARIANT),
    "moe_fused_gate": Kernel(dtypes=FLOATS, rejects=_many_groups),
    "moe_sum": Kernel(dtypes=FLOATS),
    "moe_sum_reduce": Kernel(dtypes=FLOATS),
    "mrope": Kernel(dtypes=FLOATS),
    "per_tensor_quant": Kernel(dtypes=FLOATS, properties=NOT_BATCH_INVARIANT),
    "per_token_group_quant": Kernel(dtypes=FLOATS, properties=NOT_BATCH_INVARIANT),
    "per_token_quant": Kernel(dtypes=FLOATS),
    "prepare_moe_input": Kernel(dtypes=INDICES, properties=NOT_BATCH_INVARIANT),
    "rmsnorm": Kernel(dtypes=FLOATS),
    "rmsnorm_per_token_group_quant": Kernel(dtypes=FLOATS, properties=NOT_BATCH_INVARIANT),
    "rmsnorm_per_token_quant": Kernel(dtypes=FLOATS),
    "rotary_embedding": Kernel(dtypes=FLOATS),
    "shuffle_rows": Kernel(dtypes=COPIED),
    "silu_and_mul": Kernel(dtypes=FLOATS),
    "silu_and_mul_masked_per_token_group_quant": Kernel(
        dtypes=FLOATS, properties=NOT_BATCH_INVARIANT
    ),
    "silu_and_mul_per_token_group_quant": Kernel(dtypes=FLOATS, properties=NOT_BATCH_INVARIANT),
    "store_kv_cache": Kernel(dtypes=COPIED),
    "top_k_renorm_prob": Kernel(dtypes=FLOATS),
    "top_k_top_p_sample": Kernel(dtypes=FLOATS),
    "top_p_renorm_prob": Kernel(dtypes=FLOATS),
    "topk_sigmoid": Kernel(dtypes=FLOATS),
    "topk_softmax": Kernel(dtypes=FLOATS),
}

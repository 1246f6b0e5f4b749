# SPDX-License-Identifier: Apache-2.0
"""The six memory-bound ops of the model, as one value that can be swapped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from . import eager_ops


@dataclass(frozen=True)
class Ops:
    """One implementation of each op; ``dataclasses.replace`` swaps a single one."""

    name: str
    # (x, out=None) -> (..., d) from x (..., 2 * d)
    silu_and_mul: Callable[..., Tensor]
    # (x, weight, eps, out=None)
    rmsnorm: Callable[..., Tensor]
    # (x, residual, weight, eps), both updated in place; what the in-place ops return is not used
    fused_add_rmsnorm: Callable[..., object]
    # (positions, query, key, head_dim, cos_sin_cache, is_neox), query and key in place
    rotary_embedding: Callable[..., object]
    # (k_cache, v_cache, slot_mapping, k, v), both caches in place
    store_kv_cache: Callable[..., object]
    # (probs, top_k, top_p, uniform, joint=False, out=None) -> int32 token of each row
    top_k_top_p_sample: Callable[..., Tensor]


def eager() -> Ops:
    """Plain torch, written as a model author would."""
    return Ops(
        name="eager",
        silu_and_mul=eager_ops.silu_and_mul,
        rmsnorm=eager_ops.rmsnorm,
        fused_add_rmsnorm=eager_ops.fused_add_rmsnorm,
        rotary_embedding=eager_ops.rotary_embedding,
        store_kv_cache=eager_ops.store_kv_cache,
        top_k_top_p_sample=eager_ops.top_k_top_p_sample,
    )


def opmux_ops() -> Ops:
    """The public ops of opmux: the best kernel that this host has."""
    import opmux  # here, so that the eager set (training, comparison) loads no registry

    return Ops(
        name="opmux",
        silu_and_mul=opmux.silu_and_mul,
        rmsnorm=opmux.rmsnorm,
        fused_add_rmsnorm=opmux.fused_add_rmsnorm,
        rotary_embedding=opmux.rotary_embedding,
        store_kv_cache=opmux.store_kv_cache,
        top_k_top_p_sample=opmux.top_k_top_p_sample,
    )

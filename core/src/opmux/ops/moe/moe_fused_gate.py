# SPDX-License-Identifier: Apache-2.0
"""Choose experts within the best groups of experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.op import op
from opmux.ops.moe._routing import TINY, check_gate, choose, finite, gate_outputs
from opmux.samples import Sample, TensorSpec, randn


@op(out=("topk_weights", "topk_ids"))
def moe_fused_gate(
    gating_output: Tensor,
    bias: Tensor,
    num_expert_group: int,
    topk_group: int,
    topk: int,
    num_fused_shared_experts: int = 0,
    routed_scaling_factor: float = 1.0,
    apply_routed_scaling_factor_on_output: bool = False,
    renormalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """Choose experts by ``sigmoid(logit) + bias`` within the topk_group best groups.

    A group of E / num_expert_group neighbouring experts scores the sum of its two largest choices
    (its only one, for groups of one). Of the experts in the best groups the best are chosen, in
    descending order; of equals the lower id, for groups too. Their weights w are the sigmoids
    without the bias. The last num_fused_shared_experts s of the topk are the shared experts: ids E,
    E + 1, ... with the weight ``sum(w) / routed_scaling_factor``; topk - s are routed. renormalize
    divides all by ``sum(w) + 1e-20`` of the routed; apply_routed_scaling_factor_on_output then
    multiplies all by routed_scaling_factor, which otherwise touches the shared experts alone. All
    in float32; in the logits infinities count as the largest float32 and NaN as the lowest.

    Shapes:
        gating_output: (T, E), float32, bfloat16 or float16; last dimension contiguous
        bias: (E,), float32, without NaN
        topk_weights: (T, topk), float32
        topk_ids: (T, topk), int32

    Raises:
        ValueError: a shape does not fit, num_expert_group does not divide E, topk_group or topk is
            out of range, or routed_scaling_factor is 0.
        TypeError: bias is not float32.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437
    """
    scores = torch.sigmoid(finite(gating_output))
    key = scores + bias
    experts = key.shape[1]
    if num_expert_group > 1:
        groups = torch.unflatten(key, -1, (num_expert_group, experts // num_expert_group))
        best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, choose(best, topk_group), True)
        key = groups.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
    ids = choose(key, topk - num_fused_shared_experts)
    weights = scores.gather(-1, ids)
    total = weights.sum(-1, keepdim=True)
    if num_fused_shared_experts:
        shared = experts + torch.arange(num_fused_shared_experts, device=ids.device)
        ids = torch.cat((ids, shared.expand(ids.shape[0], -1)), dim=-1)
        share = (total / routed_scaling_factor).expand(-1, num_fused_shared_experts)
        weights = torch.cat((weights, share), dim=-1)
    if renormalize:
        weights = weights / (total + TINY)
    if apply_routed_scaling_factor_on_output:
        weights = weights * routed_scaling_factor
    return weights, ids.to(torch.int32)


@moe_fused_gate.outputs
def _(
    gating_output: Tensor,
    bias: Tensor,
    num_expert_group: int,
    topk_group: int,
    topk: int,
    num_fused_shared_experts: int,
    routed_scaling_factor: float,
    apply_routed_scaling_factor_on_output: bool,
    renormalize: bool,
) -> tuple[Tensor, Tensor]:
    name = "moe_fused_gate"
    if num_fused_shared_experts < 0:
        raise ValueError(
            f"{name}: num_fused_shared_experts must not be negative, got {num_fused_shared_experts}"
        )
    routed = topk - num_fused_shared_experts
    check_gate(name, gating_output, routed, bias, "bias")
    experts = gating_output.shape[1]
    if num_expert_group < 1 or experts % num_expert_group:
        raise ValueError(
            f"{name}: num_expert_group must divide the {experts} experts, got {num_expert_group}"
        )
    if not 1 <= topk_group <= num_expert_group:
        raise ValueError(
            f"{name}: topk_group must be within 1 and {num_expert_group} groups, got {topk_group}"
        )
    if routed > experts // num_expert_group * topk_group:
        raise ValueError(
            f"{name}: topk must leave at most the {experts // num_expert_group * topk_group} "
            f"experts of {topk_group} groups to choose, got {routed}"
        )
    if routed_scaling_factor == 0:
        raise ValueError(f"{name}: routed_scaling_factor must not be 0")
    return gate_outputs(gating_output, topk)


@moe_fused_gate.samples
def _() -> Iterator[Sample]:
    def bias(experts: int) -> TensorSpec:
        return randn(experts, dtype=torch.float32)

    for tokens in (1, 17, 0):  # decode, ragged, empty
        yield Sample(randn(tokens, 256), bias(256), 8, 4, 8, 0, 2.5)  # DeepSeek-V3
        yield Sample(randn(tokens, 384), bias(384), 1, 1, 8, 0, 2.827, True)  # Kimi-K2
    yield Sample(randn(5, 256), bias(256), 8, 4, 9, 1, 2.5, True)  # a fused shared expert
    yield Sample(randn(5, 64), bias(64), 1, 1, 8, 2, 2.5, False, False)  # two, not renormalised
    yield Sample(randn(5, 6), bias(6), 6, 3, 3)  # groups of one
    yield Sample(randn(5, 9), bias(9), 3, 1, 3)  # a whole group, odd

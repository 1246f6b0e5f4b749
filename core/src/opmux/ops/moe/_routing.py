# SPDX-License-Identifier: Apache-2.0
"""What the routing definitions share: logits without surprises, the choice of experts, counting."""

from __future__ import annotations

import torch
from torch import Tensor

from opmux.checks import INDEX_DTYPES, check_rows

LARGEST = torch.finfo(torch.float32).max
TINY = 1e-20  # keeps a sum of weights that all underflowed from dividing by zero


def finite(gating_output: Tensor) -> Tensor:
    """Return the logits in float32; infinities become the largest float32, NaN the lowest."""
    return gating_output.float().nan_to_num(nan=-LARGEST, posinf=LARGEST, neginf=-LARGEST)


def choose(key: Tensor, topk: int) -> Tensor:
    """Return the places of the topk largest keys in descending order; of equals the first."""
    return key.sort(dim=-1, descending=True, stable=True).indices[:, :topk]


def renormalised(weights: Tensor) -> Tensor:
    """Return weights over their sum."""
    return weights / (weights.sum(-1, keepdim=True) + TINY)


def check_gate(op: str, gating_output: Tensor, topk: int, bias: Tensor | None, name: str) -> None:
    """Raise unless gating_output is (T, E), topk is within [1, E] and bias is (E,) float32."""
    check_rows(op, "gating_output", gating_output)
    experts = gating_output.shape[1]
    if not 1 <= topk <= experts:
        raise ValueError(f"{op}: topk must be within 1 and {experts} experts, got {topk}")
    if bias is None:
        return
    if bias.dtype != torch.float32:
        raise TypeError(f"{op}: {name} must be float32, got {bias.dtype}")
    if tuple(bias.shape) != (experts,):
        raise ValueError(f"{op}: {name} must have shape ({experts},), got {tuple(bias.shape)}")


def gate_outputs(gating_output: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Allocate (topk_weights, topk_ids)."""
    shape = (gating_output.shape[0], topk)
    return (
        gating_output.new_empty(shape, dtype=torch.float32),
        gating_output.new_empty(shape, dtype=torch.int32),
    )


def check_topk_ids(op: str, topk_ids: Tensor, num_experts: int) -> None:
    """Raise unless topk_ids is an integer (T, topk) and there are experts."""
    check_rows(op, "topk_ids", topk_ids)
    if topk_ids.dtype not in INDEX_DTYPES:
        raise TypeError(f"{op}: topk_ids must be int32 or int64, got {topk_ids.dtype}")
    if num_experts < 1:
        raise ValueError(f"{op}: num_experts must be positive, got {num_experts}")


def grouped(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Group flat slots by expert.

    Returns (order, expert, rank, counts): slots sorted by expert and then by number, those of ids
    outside [0, num_experts) last with expert num_experts; the expert of each; its rank among the
    expert's slots; and the slots of each of the num_experts + 1.
    """
    flat = topk_ids.flatten().long()
    flat = torch.where((flat < 0) | (flat >= num_experts), num_experts, flat)
    expert, order = flat.sort(stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    counts = counts.scatter_add(0, flat, torch.ones_like(flat))
    start = counts.cumsum(0) - counts
    rank = torch.arange(flat.shape[0], device=flat.device) - start[expert]
    return order, expert, rank, counts


def rounded_up(count: Tensor, multiple: int) -> Tensor:
    """Return counts rounded up to a multiple."""
    return (count + multiple - 1) // multiple * multiple

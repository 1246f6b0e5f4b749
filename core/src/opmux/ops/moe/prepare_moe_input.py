# SPDX-License-Identifier: Apache-2.0
"""What a grouped matrix multiplication needs to know of the routing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.op import op
from opmux.ops.moe._routing import check_topk_ids, grouped, rounded_up
from opmux.samples import Sample, randint

_OUTS = (
    "expert_offsets", "blockscale_offsets", "problem_sizes1", "problem_sizes2",
    "input_permutation", "output_permutation",
)  # fmt: skip
_Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@op(out=_OUTS, dtypes=(torch.int32, torch.int64))
def prepare_moe_input(topk_ids: Tensor, num_experts: int, n: int, k: int) -> _Six:
    """Sort slots ``t * topk + j`` by expert: sizes, offsets and both permutations.

    Expert e gets m_e rows from ``expert_offsets[e]`` on, its slots in ascending order. Row p holds
    token ``input_permutation[p]``; slot (t, j) is row ``output_permutation[t, j]``. An id
    outside [0, num_experts) gives its slot row -1; the rows left over at the end hold token -1.
    shuffle_rows and apply_shuffle_mul_sum leave out both.

    Shapes:
        topk_ids: (T, topk), int32 or int64
        n: width of an expert's hidden layer; the gated first layer has 2 * n
        k: width of the model
        expert_offsets: (num_experts + 1,), int32, sums of m
        blockscale_offsets: (num_experts + 1,), int32, sums of m rounded up to 128
        problem_sizes1: (num_experts, 3), int32: (m, 2 * n, k)
        problem_sizes2: (num_experts, 3), int32: (m, k, n)
        input_permutation: (T * topk,), int32
        output_permutation: (T, topk), int32

    Raises:
        ValueError: topk_ids does not have two dimensions, or num_experts is below 1.
        TypeError: topk_ids holds no integers.

    Source: MegaBlocks, arXiv:2211.15841
    """
    order, expert, rank, counts = grouped(topk_ids, num_experts)
    m = counts[:-1]
    sums = counts.cumsum(0) - counts  # the last is where those left out would start
    blocks = rounded_up(counts, 128).cumsum(0) - rounded_up(counts, 128)
    valid = expert < num_experts
    tokens = torch.where(valid, order // max(topk_ids.shape[1], 1), -1)
    rows = torch.empty_like(order).scatter(0, order, torch.where(valid, sums[expert] + rank, -1))
    wide, model, narrow = (torch.full_like(m, size) for size in (2 * n, k, n))
    results = (
        sums, blocks, torch.stack((m, wide, model), -1), torch.stack((m, model, narrow), -1),
        tokens, rows.view(topk_ids.shape),
    )  # fmt: skip
    a, b, c, d, e, f = (result.to(torch.int32) for result in results)
    return a, b, c, d, e, f


@prepare_moe_input.outputs
def _(topk_ids: Tensor, num_experts: int, n: int, k: int) -> _Six:
    check_topk_ids("prepare_moe_input", topk_ids, num_experts)

    def ints(*shape: int) -> Tensor:
        return topk_ids.new_empty(shape, dtype=torch.int32)

    return (
        ints(num_experts + 1), ints(num_experts + 1), ints(num_experts, 3), ints(num_experts, 3),
        ints(topk_ids.numel()), ints(*topk_ids.shape),
    )  # fmt: skip


@prepare_moe_input.samples
def _() -> Iterator[Sample]:
    for tokens in (1, 17, 0):  # decode, ragged, empty
        yield Sample(randint(0, 256, tokens, 8, dtype=None), 256, 2048, 7168)  # DeepSeek-V3
    yield Sample(randint(0, 8, 512, 2, dtype=None), 8, 14336, 4096)  # Mixtral 8x7B, over 128 rows
    yield Sample(randint(-1, 9, 33, 3, dtype=None), 7, 5, 3)  # some left out, odd

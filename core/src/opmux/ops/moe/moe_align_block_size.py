# SPDX-License-Identifier: Apache-2.0
"""Group token slots by expert, each expert padded to whole blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from opmux.op import op
from opmux.ops.moe._routing import check_topk_ids, grouped, rounded_up
from opmux.samples import Sample, randint


@op(
    out=("sorted_token_ids", "expert_ids", "num_tokens_post_pad"), dtypes=(torch.int32, torch.int64)
)
def moe_align_block_size(
    topk_ids: Tensor, num_experts: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort slots ``t * topk + j`` by expert and pad each expert's to a multiple of block_size.

    Slots of an expert come in ascending order, so that equal inputs give equal results. Padding
    holds T * topk. Ids outside [0, num_experts) are left out, which expert parallelism uses. All of
    the results is written: blocks behind num_tokens_post_pad have expert -1 and padding alone.

    Shapes:
        topk_ids: (T, topk), int32 or int64
        sorted_token_ids: (blocks * block_size,), int32, with
            ``blocks = (N + min(N, num_experts) * (block_size - 1)) // block_size`` of N = T * topk
        expert_ids: (blocks,), int32, the expert of each block
        num_tokens_post_pad: (1,), int32, how many of sorted_token_ids count

    Raises:
        ValueError: topk_ids does not have two dimensions, num_experts or block_size is below 1.
        TypeError: topk_ids holds no integers.

    Source: MegaBlocks, arXiv:2211.15841
    """
    order, expert, rank, counts = grouped(topk_ids, num_experts)
    numel, blocks = topk_ids.numel(), _blocks(topk_ids, num_experts, block_size)
    padded = rounded_up(counts[:-1], block_size)
    ends = padded.cumsum(0)
    # slots that are left out go to one place behind the end
    start = torch.cat((ends - padded, ends.new_full((1,), blocks * block_size)))
    place = start[expert] + torch.where(expert < num_experts, rank, 0)
    ids = torch.full((blocks * block_size + 1,), numel, dtype=torch.int32, device=order.device)
    ids = ids.scatter(0, place, order.to(torch.int32))[:-1]
    first = torch.arange(blocks, device=order.device) * block_size
    owner = torch.searchsorted(ends, first, right=True)
    owner = torch.where(first < ends[-1:], owner, -1)
    return ids, owner.to(torch.int32), ends[-1:].to(torch.int32)


def _blocks(topk_ids: Tensor, num_experts: int, block_size: int) -> int:
    numel = topk_ids.numel()
    # min() of a symbolic size would decide and recompile. Dynamo shows such sizes as plain ints and
    # does not: it traces min(), and up to torch 2.11 refuses sym_min of two ints.
    smaller: Any = min if type(numel) is int else torch.sym_min
    experts = smaller(numel, num_experts)
    blocks: int = (numel + experts * (block_size - 1)) // block_size
    return blocks


@moe_align_block_size.outputs
def _(topk_ids: Tensor, num_experts: int, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    check_topk_ids("moe_align_block_size", topk_ids, num_experts)
    if block_size < 1:
        raise ValueError(f"moe_align_block_size: block_size must be positive, got {block_size}")
    blocks = _blocks(topk_ids, num_experts, block_size)
    return (
        topk_ids.new_empty(blocks * block_size, dtype=torch.int32),
        topk_ids.new_empty(blocks, dtype=torch.int32),
        topk_ids.new_empty(1, dtype=torch.int32),
    )


@moe_align_block_size.samples
def _() -> Iterator[Sample]:
    for tokens in (1, 17, 0):  # decode, ragged, empty
        for block_size in (16, 128):
            yield Sample(randint(0, 256, tokens, 8, dtype=None), 256, block_size)  # DeepSeek-V3
    yield Sample(randint(0, 128, 1024, 8, dtype=None), 128, 64)  # Qwen3 235B, several blocks each
    yield Sample(randint(-1, 9, 33, 3, dtype=None), 7, 4)  # some left out, odd
    yield Sample(randint(2, 3, 50, 1, dtype=None), 5, 16)  # one expert takes all
    yield Sample(randint(0, 3, 5, 2, dtype=None), 3, 1)  # no padding

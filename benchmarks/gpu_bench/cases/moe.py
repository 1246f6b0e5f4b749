# SPDX-License-Identifier: Apache-2.0
"""Routing of experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import opmux

from .. import case as on
from ..case import BF16, F32, LARGE, Case, Set, Way, distance, poison, randint, randn, wrong
from ..peers import compiled, fi, sgl
from .activation import keep

OPS, K, I32 = torch.ops, 8, torch.int32


def eager_topk(x: Tensor) -> tuple[Tensor, Tensor]:
    """Torch."""
    weights, ids = x.float().softmax(-1).topk(K, -1)
    return weights / weights.sum(-1, keepdim=True), ids.int()


def chosen(way: Way) -> Way:
    """Store what a run returns as weights and ids."""

    def run(s: Set) -> None:
        s.w, s.ids = way(s)

    return run


def routing_error(scores: Tensor, actual: Set, expected: Set) -> float:
    """Compare weights in descending order, and with what the chosen ids would weigh.

    Equal logits may be chosen in any order, so ids are not compared themselves.
    """
    if bool(((actual.ids < 0) | (actual.ids >= scores.shape[-1])).any()):
        return float("inf")
    sums = expected.w.sum(-1, keepdim=True)
    looked_up = scores.gather(-1, actual.ids.long())
    looked_up = looked_up / looked_up.sum(-1, keepdim=True) * sums
    ordered = (t.sort(-1, descending=True).values for t in (actual.w, expected.w))
    return max(distance(*ordered), distance(actual.w, looked_up))


def softmax(tokens: int, experts: int, goal_us: float = 0.0) -> Case:
    """Top-k of the softmax, renormalised."""
    return Case(
        "topk_softmax", f"T={tokens} E={experts} K={K} bf16", tokens * (2 * experts + 8 * K),
        lambda: Set(x=randn(tokens, experts), w=poison(tokens, K, dtype=F32),
                    ids=poison(tokens, K, dtype=I32), slots=poison(tokens, K, dtype=I32)),
        lambda s, b: opmux.topk_softmax(
            s.x, K, True, topk_weights=s.w, topk_ids=s.ids, backend=b),
        lambda s: (s.w, s.ids),
        {
            "vllm": lambda s: OPS._moe_C.topk_softmax(s.w, s.ids, s.slots, s.x, True, None),
            "sglang": lambda s: sgl("moe").topk_softmax(s.w, s.ids, s.x, True),
            "torch": chosen(lambda s: eager_topk(s.x)),
            "compile": chosen(lambda s: compiled(eager_topk)(s.x)),
        },
        error=lambda a, e: routing_error(e.x.float().softmax(-1), a, e), goal_us=goal_us,
    )  # fmt: skip


def sigmoid(tokens: int, experts: int) -> Case:
    """Top-k of the sigmoid with a bias for the choice."""
    return Case(
        "topk_sigmoid", f"T={tokens} E={experts} K={K} bf16 bias",
        tokens * (2 * experts + 8 * K),
        lambda: Set(x=randn(tokens, experts), bias=randn(experts, dtype=F32),
                    w=poison(tokens, K, dtype=F32), ids=poison(tokens, K, dtype=I32),
                    slots=poison(tokens, K, dtype=I32)),
        lambda s, b: opmux.topk_sigmoid(
            s.x, K, True, s.bias, topk_weights=s.w, topk_ids=s.ids, backend=b),
        lambda s: (s.w, s.ids),
        {
            "vllm": lambda s: OPS._moe_C.topk_sigmoid(s.w, s.ids, s.slots, s.x, True, s.bias),
            "sglang": lambda s: sgl("moe").topk_sigmoid(s.w, s.ids, s.x, True, s.bias),
        },
        error=lambda a, e: routing_error(e.x.float().sigmoid(), a, e),
    )  # fmt: skip


def gate(tokens: int, experts: int, groups: int, goal_us: float = 0.0) -> Case:
    """DeepSeek-V3 (8 groups of 256, 4 of them) and Kimi-K2 (one group of 384); float32 logits."""
    kept, factor = max(1, groups // 2), 2.5

    def sglang(s: Set) -> None:
        if groups == 1:
            s.w, s.ids = sgl("moe").kimi_k2_moe_fused_gate(s.x, s.bias, K, True, factor, True)
        else:
            s.w, s.ids = sgl("moe").moe_fused_gate(s.x, s.bias, groups, kept, K, 0, factor, True)

    return Case(
        "moe_fused_gate", f"T={tokens} E={experts} groups={groups} K={K}",
        tokens * (4 * experts + 8 * K),
        lambda: Set(x=randn(tokens, experts, dtype=F32), bias=randn(experts, dtype=F32),
                    w=poison(tokens, K, dtype=F32), ids=poison(tokens, K, dtype=I32)),
        lambda s, b: opmux.moe_fused_gate(
            s.x, s.bias, groups, kept, K, 0, factor, True,
            topk_weights=s.w, topk_ids=s.ids, backend=b),
        lambda s: (s.w, s.ids),
        {
            "vllm": chosen(lambda s: OPS._moe_C.grouped_topk(
                s.x, groups, kept, K, True, factor, s.bias, 1)),
            "sglang": sglang,
            "flashinfer": lambda s: fi("fused_moe.fused_routing_dsv3").fused_topk_deepseek(
                s.x, s.bias, groups, kept, K, factor, s.w, s.ids),
        },
        error=lambda a, e: routing_error(e.x.sigmoid(), a, e), goal_us=goal_us,
    )  # fmt: skip


def align(tokens: int, experts: int, goal_us: float = 0.0, block: int = 64) -> Case:
    """Slots by expert, in blocks. Peers get the larger buffers that they ask for."""
    slots = tokens * K
    blocks = (slots + min(slots, experts) * (block - 1)) // block
    room = -(-(slots + (experts + 1) * (block - 1)) // block)

    def make() -> Set:
        ids = torch.rand(tokens, experts, device=on.device).topk(K, -1).indices.int()
        return Set(
            ids=ids, order=poison(blocks * block, dtype=I32), of=poison(blocks, dtype=I32),
            n=poison(1, dtype=I32), more=poison(room * block, dtype=I32),
            more_of=poison(room, dtype=I32), sums=torch.zeros_like(ids).new_zeros(experts + 2),
            peer=False,
        )  # fmt: skip

    def vllm(s: Set) -> None:
        OPS._moe_C.moe_align_block_size(s.ids, experts, block, s.more, s.more_of, s.n, None)
        s.peer = True

    def sglang(s: Set) -> None:
        sgl("moe").moe_align_block_size(
            s.ids, experts + 1, block, s.more, s.more_of, s.n, s.sums, True
        )
        s.peer = True

    def error(actual: Set, expected: Set) -> float:
        order, of = (actual.more, actual.more_of) if actual.peer else (actual.order, actual.of)
        n = int(expected.n)
        if int(actual.n) != n:
            return float("inf")
        order, of = order[:n].long(), of[: n // block]
        real = order < slots
        experts_of = expected.ids.flatten()[order.clamp(0, slots - 1)]
        misplaced = wrong(experts_of[real] != of.repeat_interleave(block)[real])
        every = torch.arange(slots, device=order.device)
        return misplaced + float(not torch.equal(order[real].sort().values, every))

    return Case(
        "moe_align_block_size", f"T={tokens} E={experts} K={K} block={block}",
        4 * (slots + blocks * block + blocks + 1), make,
        lambda s, b: opmux.moe_align_block_size(
            s.ids, experts, block, s.order, s.of, s.n, backend=b),
        lambda s: (s.order, s.of, s.n), {"vllm": vllm, "sglang": sglang},
        error=error, bound=0.0, goal_us=goal_us,
    )  # fmt: skip


def prepare(tokens: int, experts: int) -> Case:
    """Sizes, offsets and permutations for grouped matrix products."""
    slots, n, k = tokens * K, 2048, 7168

    def make() -> Set:
        ids = torch.rand(tokens, experts, device=on.device).topk(K, -1).indices.int()
        return Set(
            ids=ids, offsets=poison(experts + 1, dtype=I32), scales=poison(experts + 1, dtype=I32),
            sizes1=poison(experts, 3, dtype=I32), sizes2=poison(experts, 3, dtype=I32),
            ins=poison(slots, dtype=I32), outs=poison(tokens, K, dtype=I32),
        )  # fmt: skip

    def error(actual: Set, expected: Set) -> float:
        same = (wrong(getattr(actual, x) != getattr(expected, x)) for x in ("offsets", "sizes1"))
        place = actual.outs.view(-1).long().clamp(0, slots - 1)
        token = torch.arange(slots, device=place.device) // K
        expert, offsets = actual.ids.flatten().long(), expected.offsets.long()
        inside = (place >= offsets[expert]) & (place < offsets[expert + 1])
        moved = actual.ins.long()[place] != token
        return sum(same) + wrong(~inside) + wrong(moved)

    return Case(
        "prepare_moe_input", f"T={tokens} E={experts} K={K}",
        4 * (3 * slots + 2 * (experts + 1) + 6 * experts), make,
        lambda s, b: opmux.prepare_moe_input(
            s.ids, experts, n, k, s.offsets, s.scales, s.sizes1, s.sizes2, s.ins, s.outs,
            backend=b),
        lambda s: (s.offsets, s.ins, s.outs),
        {
            "vllm": lambda s: OPS._C.get_cutlass_moe_mm_data(
                s.ids, s.offsets, s.sizes1, s.sizes2, s.ins, s.outs.view(-1), experts, n, k,
                s.scales, True),
            "sglang": lambda s: sgl("moe").prepare_moe_input(
                s.ids, s.offsets, s.sizes1, s.sizes2, s.ins, s.outs.view(-1), experts, n, k,
                s.scales),
        }, error=error, bound=0.0,
    )  # fmt: skip


def reduce(name: str, tokens: int, h: int, goal: float = 0.0) -> Case:
    """Sum over a token's experts, scaled or not."""
    factor = (2.5,) if name == "moe_sum_reduce" else ()

    def eager(x: Tensor) -> Tensor:
        return x.sum(1) * factor[0] if factor else x.sum(1)

    peers: dict[str, Way] = {
        "sglang": lambda s: getattr(sgl("moe"), name)(s.x, s.out, *factor),
        "torch": keep(lambda s: eager(s.x)),
        "compile": keep(lambda s: compiled(eager)(s.x)),
    }
    if not factor:
        peers["vllm"] = lambda s: OPS._moe_C.moe_sum(s.x, s.out)
    return Case(
        name, f"T={tokens} K={K} h={h}", tokens * h * 2 * (K + 1),
        lambda: Set(x=randn(tokens, K, h), out=poison(tokens, h)),
        lambda s, b: getattr(opmux, name)(s.x, *factor, out=s.out, backend=b),
        lambda s: (s.out,), peers, goal=goal,
    )  # fmt: skip


def shuffle(tokens: int, h: int) -> Case:
    """Rows for their experts; the input is counted once, as it stays in the L2 in part."""
    rows = tokens * K

    def fresh(s: Set) -> None:
        s.out = sgl("gemm").shuffle_rows(s.x, s.map, (rows, h))

    return Case(
        "shuffle_rows", f"T={tokens} K={K} h={h}", 2 * h * (tokens + rows) + 4 * rows,
        lambda: Set(x=randn(tokens, h), map=randint(tokens, rows), out=poison(rows, h)),
        lambda s, b: opmux.shuffle_rows(s.x, s.map, out=s.out, backend=b), lambda s: (s.out,),
        {"vllm": lambda s: OPS._moe_C.shuffle_rows(s.x, s.map, s.out), "sglang": fresh},
    )  # fmt: skip


def unshuffle(tokens: int, h: int) -> Case:
    """The way back, weighed."""
    rows = tokens * K

    def make() -> Set:
        order = torch.randperm(rows, device=on.device).int().view(tokens, K)
        f = randn(tokens, K, dtype=F32)
        return Set(x=randn(rows, h), order=order, f=f, own=f.to(BF16), out=poison(tokens, h))

    return Case(
        "apply_shuffle_mul_sum", f"T={tokens} K={K} h={h}",
        2 * h * (tokens + rows) + 8 * rows, make,
        lambda s, b: opmux.apply_shuffle_mul_sum(s.x, s.order, s.f, out=s.out, backend=b),
        lambda s: (s.out,),
        {"sglang": lambda s: sgl("moe").apply_shuffle_mul_sum(
            s.x, s.out, s.order.view(-1), s.own.view(-1))}, goal=LARGE,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """Yield the family's cases."""
    yield softmax(64, 128)
    yield softmax(4096, 128, 5.0)
    yield softmax(8192, 128)
    yield sigmoid(4096, 128)
    yield gate(64, 256, 8)
    yield gate(128, 256, 8, 3.0)
    yield gate(8192, 256, 8)
    yield gate(128, 384, 1)
    yield align(64, 128)
    yield align(4096, 256, 7.0)
    yield align(8192, 128)
    yield prepare(4096, 256)
    yield reduce("moe_sum", 4096, 7168, LARGE)
    yield reduce("moe_sum_reduce", 4096, 7168, LARGE)
    yield shuffle(4096, 7168)
    yield unshuffle(4096, 7168)

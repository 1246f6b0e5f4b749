# SPDX-License-Identifier: Apache-2.0
"""Choose experts by softmax."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.op import op
from opmux.ops.moe._routing import check_gate, choose, finite, gate_outputs, renormalised
from opmux.samples import Sample, randn


@op(out=("topk_weights", "topk_ids"))
def topk_softmax(
    gating_output: Tensor,
    topk: int,
    renormalize: bool = False,
    moe_softcapping: float = 0.0,
    correction_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the topk experts of each token; their weights are the softmax of the logits.

    With moe_softcapping c the logits become ``c * tanh(x / c)`` before the softmax over all of E.
    Experts are chosen, in descending order, by their logit (before the cap, which keeps the order),
    or with correction_bias by ``softmax + bias``; of equals the lower id. The bias does not enter
    the weights. renormalize divides the weights by their sum + 1e-20. All in float32; in the logits
    infinities count as the largest float32 and NaN as the lowest.

    Shapes:
        gating_output: (T, E), float32, bfloat16 or float16; last dimension contiguous
        topk: within 1 and E
        moe_softcapping: positive, or 0 for none
        correction_bias: (E,), float32, without NaN; None adds nothing
        topk_weights: (T, topk), float32
        topk_ids: (T, topk), int32

    Raises:
        ValueError: a shape does not fit, topk is out of range or moe_softcapping negative.
        TypeError: correction_bias is not float32.

    Source: Outrageously Large Neural Networks, arXiv:1701.06538
    """
    logits = finite(gating_output)
    capped = moe_softcapping * torch.tanh(logits / moe_softcapping) if moe_softcapping else logits
    scores = torch.softmax(capped, dim=-1)
    ids = choose(logits if correction_bias is None else scores + correction_bias, topk)
    weights = scores.gather(-1, ids)
    return renormalised(weights) if renormalize else weights, ids.to(torch.int32)


@topk_softmax.outputs
def _(
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    moe_softcapping: float,
    correction_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_gate("topk_softmax", gating_output, topk, correction_bias, "correction_bias")
    if moe_softcapping < 0:
        raise ValueError(
            f"topk_softmax: moe_softcapping must not be negative, got {moe_softcapping}"
        )
    return gate_outputs(gating_output, topk)


@topk_softmax.samples
def _() -> Iterator[Sample]:
    for tokens in (1, 17, 0):  # decode, ragged, empty
        yield Sample(randn(tokens, 128), 8, True)  # Qwen3 235B
        yield Sample(randn(tokens, 8), 2, True, 30.0)  # Grok-1
    yield Sample(randn(5, 1), 1)  # one expert
    yield Sample(randn(5, 60), 4)  # Qwen1.5-MoE, no power of two
    yield Sample(randn(5, 7), 7, True)  # all experts
    yield Sample(randn(9, 64), 6, False, 0.0, randn(64, dtype=torch.float32, scale=0.01))
    yield Sample(randn(3, 512), 10, True)  # Qwen3-Next

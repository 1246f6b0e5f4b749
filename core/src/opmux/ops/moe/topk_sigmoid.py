# SPDX-License-Identifier: Apache-2.0
"""Choose experts by sigmoid."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.op import op
from opmux.ops.moe._routing import check_gate, choose, finite, gate_outputs, renormalised
from opmux.samples import Sample, randn


@op(out=("topk_weights", "topk_ids"))
def topk_sigmoid(
    gating_output: Tensor,
    topk: int,
    renormalize: bool = False,
    correction_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the topk experts of each token; their weights are the sigmoid of the logits.

    Experts are chosen, in descending order, by their logit, or with correction_bias by
    ``sigmoid + bias``; of equals the lower id. The bias does not enter the weights. renormalize
    divides the weights by their sum + 1e-20. All in float32; in the logits infinities count as the
    largest float32 and NaN as the lowest.

    Shapes:
        gating_output: (T, E), float32, bfloat16 or float16; last dimension contiguous
        topk: within 1 and E
        correction_bias: (E,), float32, without NaN; None adds nothing
        topk_weights: (T, topk), float32
        topk_ids: (T, topk), int32

    Raises:
        ValueError: a shape does not fit or topk is out of range.
        TypeError: correction_bias is not float32.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437
    """
    logits = finite(gating_output)
    scores = torch.sigmoid(logits)
    ids = choose(logits if correction_bias is None else scores + correction_bias, topk)
    weights = scores.gather(-1, ids)
    return renormalised(weights) if renormalize else weights, ids.to(torch.int32)


@topk_sigmoid.outputs
def _(
    gating_output: Tensor, topk: int, renormalize: bool, correction_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    check_gate("topk_sigmoid", gating_output, topk, correction_bias, "correction_bias")
    return gate_outputs(gating_output, topk)


@topk_sigmoid.samples
def _() -> Iterator[Sample]:
    for tokens in (1, 17, 0):  # decode, ragged, empty
        yield Sample(randn(tokens, 128), 8, True, randn(128, dtype=torch.float32))  # GLM-4.5 Air
        yield Sample(randn(tokens, 16), 1)  # Llama 4 Scout
    yield Sample(randn(5, 1), 1, True)  # one expert
    yield Sample(randn(5, 7), 7, True)  # all experts, odd
    yield Sample(randn(9, 256), 8, True, randn(256, dtype=torch.float32))  # MiniMax-M2

# SPDX-License-Identifier: Apache-2.0
"""Keep the k likeliest tokens and renormalise."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.checks import INDEX_DTYPES, check_per_row, check_rows
from opmux.op import op
from opmux.ops.sampling._filter import keep_top_k, masses, renormalise
from opmux.samples import Sample, probabilities, randint


@op
def top_k_renorm_prob(probs: Tensor, top_k: Tensor | int) -> Tensor:
    """Zero all but the k largest probabilities of each row and divide by what is left.

    Values equal to the k-th largest stay, so more than k may. Masses are summed in float64 and the
    result is rounded once. NaN and negative values count as 0; a row without mass gives zeros.

    Shapes:
        probs: (B, V), float32, bfloat16 or float16
        top_k: one int, or (B,) int32 or int64; below 1, or V and more, keeps all
        returns: (B, V), float32

    Raises:
        ValueError: a shape does not fit.
        TypeError: top_k holds no integers.

    Source: Hierarchical Neural Story Generation, arXiv:1805.04833
    """
    mass = masses(probs)
    return renormalise(mass, keep_top_k(mass, top_k))


@top_k_renorm_prob.outputs
def _(probs: Tensor, top_k: Tensor | int) -> Tensor:
    check_rows("top_k_renorm_prob", "probs", probs)
    check_per_row("top_k_renorm_prob", "top_k", top_k, probs, INDEX_DTYPES)
    return probs.new_empty(probs.shape, dtype=torch.float32)


@top_k_renorm_prob.samples
def _() -> Iterator[Sample]:
    for rows, size in ((1, 1), (3, 1000), (0, 7), (2, 128256)):  # smallest, odd, empty, Llama 3
        yield Sample(probabilities(rows, size), 50)
        yield Sample(probabilities(rows, size), randint(0, 60, rows, dtype=torch.int32))
    yield Sample(probabilities(2, 300), 0)  # keeps all
    yield Sample(probabilities(2, 300), 1)  # keeps the maximum

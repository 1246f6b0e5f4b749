# SPDX-License-Identifier: Apache-2.0
"""Keep the likeliest tokens up to a mass and renormalise."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.checks import check_per_row, check_rows
from opmux.op import op
from opmux.ops.sampling._filter import keep_top_p, masses, renormalise
from opmux.samples import Sample, probabilities, rand


@op
def top_p_renorm_prob(probs: Tensor, top_p: Tensor | float) -> Tensor:
    """Zero what lies outside the nucleus of each row and divide by what is left.

    The nucleus is every value >= t, for the largest t whose values sum to at least top_p of the
    row. Masses are summed in float64 and the result is rounded once. NaN and negative values count
    as 0; a row without mass gives zeros.

    Shapes:
        probs: (B, V), float32, bfloat16 or float16
        top_p: one float, or (B,) float32; 1 and more keeps all, 0 and less the maximum
        returns: (B, V), float32

    Raises:
        ValueError: a shape does not fit.
        TypeError: top_p is not float32.

    Source: The Curious Case of Neural Text Degeneration, arXiv:1904.09751
    """
    mass = masses(probs)
    return renormalise(mass, keep_top_p(mass, top_p))


@top_p_renorm_prob.outputs
def _(probs: Tensor, top_p: Tensor | float) -> Tensor:
    check_rows("top_p_renorm_prob", "probs", probs)
    check_per_row("top_p_renorm_prob", "top_p", top_p, probs, torch.float32)
    return probs.new_empty(probs.shape, dtype=torch.float32)


@top_p_renorm_prob.samples
def _() -> Iterator[Sample]:
    for rows, size in ((1, 1), (3, 1000), (0, 7), (2, 128256)):  # smallest, odd, empty, Llama 3
        yield Sample(probabilities(rows, size), 0.9)
        yield Sample(probabilities(rows, size), rand(rows, dtype=torch.float32))
    yield Sample(probabilities(2, 300), 1.0)  # keeps all
    yield Sample(probabilities(2, 300), 0.0)  # keeps the maximum

# SPDX-License-Identifier: Apache-2.0
"""Draw one token a row after top-k and top-p filtering."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.checks import INDEX_DTYPES, check_per_row, check_rows
from opmux.op import op
from opmux.ops.sampling._filter import draw, keep_top_k, keep_top_p, masses
from opmux.samples import Sample, probabilities, rand, randint


@op
def top_k_top_p_sample(
    probs: Tensor,
    top_k: Tensor | int,
    top_p: Tensor | float,
    uniform: Tensor,
    joint: bool = False,
) -> Tensor:
    """Draw one token of each row among the k likeliest and inside the nucleus.

    With ``joint`` both filters look at probs; without it the nucleus is taken of what top-k left,
    renormalised. The token is the first, in vocabulary order, whose running mass exceeds uniform of
    the kept mass, so equal inputs give equal tokens. Masses are summed in float64. NaN and negative
    values count as 0; a row without mass gives -1.

    Shapes:
        probs: (B, V), float32, bfloat16 or float16
        top_k: one int, or (B,) int32 or int64; below 1, or V and more, keeps all
        top_p: one float, or (B,) float32; 1 and more keeps all, 0 and less the maximum
        uniform: (B,), float32, random numbers in [0, 1)
        returns: (B,), int32, token ids

    Raises:
        ValueError: a shape does not fit.
        TypeError: an argument has the wrong dtype.

    Source: The Curious Case of Neural Text Degeneration, arXiv:1904.09751
    """
    mass = masses(probs)
    keep = keep_top_k(mass, top_k)
    keep &= keep_top_p(mass if joint else torch.where(keep, mass, 0.0), top_p)
    return draw(mass, keep, uniform)


@top_k_top_p_sample.outputs
def _(
    probs: Tensor, top_k: Tensor | int, top_p: Tensor | float, uniform: Tensor, joint: bool
) -> Tensor:
    check_rows("top_k_top_p_sample", "probs", probs)
    check_per_row("top_k_top_p_sample", "top_k", top_k, probs, INDEX_DTYPES)
    check_per_row("top_k_top_p_sample", "top_p", top_p, probs, torch.float32)
    check_per_row("top_k_top_p_sample", "uniform", uniform, probs, torch.float32)
    return probs.new_empty(probs.shape[:1], dtype=torch.int32)


@top_k_top_p_sample.samples
def _() -> Iterator[Sample]:
    for rows, size in ((1, 1), (3, 1000), (0, 7), (2, 128256)):  # smallest, odd, empty, Llama 3
        yield Sample(probabilities(rows, size), 50, 0.9, rand(rows, dtype=torch.float32))
        yield Sample(
            probabilities(rows, size), randint(0, 60, rows), rand(rows, dtype=torch.float32),
            rand(rows, dtype=torch.float32), joint=True,
        )  # fmt: skip
    yield Sample(probabilities(4, 300), 0, 1.0, rand(4, dtype=torch.float32))  # keeps all
    yield Sample(probabilities(4, 300), 1, 0.0, rand(4, dtype=torch.float32))  # the maximum

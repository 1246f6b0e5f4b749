# SPDX-License-Identifier: Apache-2.0
"""Draw one token a row among those near the likeliest."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.checks import check_per_row, check_rows
from opmux.op import op
from opmux.ops.sampling._filter import column, draw, masses
from opmux.samples import Sample, probabilities, rand


@op
def min_p_sample(probs: Tensor, min_p: Tensor | float, uniform: Tensor) -> Tensor:
    """Draw one token of each row among those with ``probs >= min_p * max(probs)``.

    The token is the first, in vocabulary order, whose running mass exceeds uniform of the kept
    mass. The threshold is computed in float32, masses are summed in float64. NaN and negative
    values count as 0; a row without mass gives -1.

    Shapes:
        probs: (B, V), float32, bfloat16 or float16
        min_p: one float, or (B,) float32; 0 and less keeps all
        uniform: (B,), float32, random numbers in [0, 1)
        returns: (B,), int32, token ids

    Raises:
        ValueError: a shape does not fit.
        TypeError: an argument has the wrong dtype.

    Source: Turning Up the Heat: Min-p Sampling, arXiv:2407.01082
    """
    mass = masses(probs)
    if not probs.shape[-1]:
        return torch.full(probs.shape[:1], -1, dtype=torch.int32, device=probs.device)
    p = torch.as_tensor(column(min_p, mass), dtype=torch.float32, device=probs.device)
    threshold = p * mass.amax(-1, keepdim=True).float()
    return draw(mass, mass.float() >= threshold, uniform)


@min_p_sample.outputs
def _(probs: Tensor, min_p: Tensor | float, uniform: Tensor) -> Tensor:
    check_rows("min_p_sample", "probs", probs)
    check_per_row("min_p_sample", "min_p", min_p, probs, torch.float32)
    check_per_row("min_p_sample", "uniform", uniform, probs, torch.float32)
    return probs.new_empty(probs.shape[:1], dtype=torch.int32)


@min_p_sample.samples
def _() -> Iterator[Sample]:
    for rows, size in ((1, 1), (3, 1000), (0, 7), (2, 128256)):  # smallest, odd, empty, Llama 3
        yield Sample(probabilities(rows, size), 0.05, rand(rows, dtype=torch.float32))
        yield Sample(
            probabilities(rows, size), rand(rows, dtype=torch.float32),
            rand(rows, dtype=torch.float32),
        )  # fmt: skip
    yield Sample(probabilities(4, 300), 0.0, rand(4, dtype=torch.float32))  # keeps all
    yield Sample(probabilities(4, 300), 1.0, rand(4, dtype=torch.float32))  # the maximum

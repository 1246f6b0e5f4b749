# SPDX-License-Identifier: Apache-2.0
"""Penalise tokens that were used before, in place."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.checks import check_per_row, check_rows
from opmux.op import op
from opmux.ops.sampling._filter import column
from opmux.samples import Sample, TensorSpec, rand, randint, randn


@op(mutates=("logits",))
def apply_penalties(
    logits: Tensor,
    token_counts: Tensor,
    repetition_penalty: Tensor | float = 1.0,
    frequency_penalty: Tensor | float = 0.0,
    presence_penalty: Tensor | float = 0.0,
    prompt_mask: Tensor | None = None,
) -> None:
    """In place: lower the logits of tokens that the output, or the prompt, already holds.

    In this order, in float32, rounded once: a token that was generated or is in the prompt has its
    logit divided by repetition_penalty where it is positive and multiplied otherwise; from a
    generated one ``frequency_penalty * count + presence_penalty`` is subtracted. A token that is
    neither keeps its logit bit for bit.

    Shapes:
        logits: (B, V), float32, bfloat16 or float16; written
        token_counts: (B, V), int32, how often a token was generated; below 1 is never
        repetition_penalty: one float, or (B,) float32; positive, 1 changes nothing
        frequency_penalty: one float, or (B,) float32; 0 changes nothing
        presence_penalty: one float, or (B,) float32; 0 changes nothing
        prompt_mask: (B, V), bool, which tokens the prompt holds; None for none

    Raises:
        ValueError: a shape does not fit.
        TypeError: an argument has the wrong dtype.

    Source: CTRL, arXiv:1909.05858
    """

    def per_row(value: Tensor | float) -> Tensor:
        return torch.as_tensor(column(value, logits), dtype=torch.float32, device=logits.device)

    value = logits.float()
    generated = token_counts > 0
    used = generated if prompt_mask is None else generated | prompt_mask
    repetition = per_row(repetition_penalty)
    lowered = torch.where(value > 0, value / repetition, value * repetition)
    result = torch.where(used, lowered, value)
    spent = per_row(frequency_penalty) * token_counts + per_row(presence_penalty)
    logits.copy_(torch.where(generated, result - spent, result))


@apply_penalties.outputs
def _(
    logits: Tensor,
    token_counts: Tensor,
    repetition_penalty: Tensor | float,
    frequency_penalty: Tensor | float,
    presence_penalty: Tensor | float,
    prompt_mask: Tensor | None,
) -> None:
    name = "apply_penalties"
    check_rows(name, "logits", logits)
    for label, tensor, dtype in (
        ("token_counts", token_counts, torch.int32),
        ("prompt_mask", prompt_mask, torch.bool),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: {label} must be {dtype}, got {tensor.dtype}")
        if tensor.shape != logits.shape:
            raise ValueError(
                f"{name}: {label} must have the shape of logits, {tuple(logits.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
    for label, value in (
        ("repetition_penalty", repetition_penalty),
        ("frequency_penalty", frequency_penalty),
        ("presence_penalty", presence_penalty),
    ):
        check_per_row(name, label, value, logits, torch.float32)


@apply_penalties.samples
def _() -> Iterator[Sample]:
    for rows, size in ((1, 1), (3, 1001), (0, 64), (2, 128256)):  # smallest, odd, empty, Llama 3
        counts = randint(-3, 4, rows, size, dtype=torch.int32)  # half never, some several times
        yield Sample(randn(rows, size), counts, 1.2, 0.5, 0.25)
        yield Sample(
            randn(rows, size), counts, _penalty(rows), rand(rows, dtype=torch.float32),
            rand(rows, dtype=torch.float32), randint(0, 2, rows, size, dtype=torch.bool),
        )  # fmt: skip
    yield Sample(randn(4, 300), randint(0, 2, 4, 300, dtype=torch.int32))  # changes nothing
    yield Sample(randn(4, 300), randint(0, 2, 4, 300, dtype=torch.int32), 0.8, -0.5)  # encourages


def _penalty(rows: int) -> TensorSpec:
    return TensorSpec((rows,), lambda g: 0.5 + torch.rand(rows, generator=g) * 1.5, torch.float32)

# SPDX-License-Identifier: Apache-2.0
"""Merge two partial attention results."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.op import op
from opmux.samples import Sample, TensorSpec, randn


@op(out=("v_merged", "s_merged"))
def merge_state(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two attentions over disjoint keys: ``s = log(exp(s_a) + exp(s_b))``, v accordingly.

    ``v = v_a * exp(s_a - s) + v_b * exp(s_b - s)``. s is the natural log-sum-exp (lse) of the
    attention scores. An lse of -inf, and +inf, says that nothing was attended: that side does not
    count, whatever its v holds; where neither side does, v is 0 and s is -inf. Computed in float32,
    v is rounded once.

    Shapes:
        v_a: (T, heads, head_dim), float32, bfloat16 or float16; last dimension contiguous
        s_a: (T, heads), float32
        v_b: shape and dtype of v_a
        s_b: (T, heads), float32
        v_merged: shape and dtype of v_a
        s_merged: (T, heads), float32

    Raises:
        ValueError: a shape does not fit.
        TypeError: v_b has another dtype than v_a, or an lse is not float32.

    Source: FlashInfer, arXiv:2501.01005
    """
    none = float("-inf")
    s_a = torch.where(s_a == float("inf"), none, s_a)
    s_b = torch.where(s_b == float("inf"), none, s_b)
    peak = torch.maximum(s_a, s_b)
    peak = torch.where(peak == none, 0.0, peak)
    w_a, w_b = torch.exp(s_a - peak), torch.exp(s_b - peak)
    total = w_a + w_b
    divisor = torch.where(total == 0, 1.0, total)
    value = torch.zeros_like(v_a, dtype=torch.float32)
    for v, s, w in ((v_a, s_a, w_a), (v_b, s_b, w_b)):
        share = (w / divisor)[..., None]
        value = value + torch.where(s[..., None] == none, 0.0, v.float() * share)
    return value.to(v_a.dtype), total.log() + peak


@merge_state.outputs
def _(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    if v_a.dim() != 3:
        raise ValueError(
            f"merge_state: v_a must be (tokens, heads, head_dim), got {tuple(v_a.shape)}"
        )
    for name, tensor, shape, dtype in (
        ("v_b", v_b, v_a.shape, v_a.dtype),
        ("s_a", s_a, v_a.shape[:2], torch.float32),
        ("s_b", s_b, v_a.shape[:2], torch.float32),
    ):
        if tensor.shape != shape:
            raise ValueError(
                f"merge_state: {name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype != dtype:
            raise TypeError(f"merge_state: {name} must be {dtype}, got {tensor.dtype}")
    return v_a.new_empty(v_a.shape), s_a.new_empty(s_a.shape)


@merge_state.samples
def _() -> Iterator[Sample]:
    def sample(tokens: int, heads: int, head_dim: int) -> Sample:
        v = randn(tokens, heads, head_dim)
        s = randn(tokens, heads, dtype=torch.float32, scale=4.0)
        return Sample(v, s, v, s)

    for tokens in (1, 17, 0):  # decode, ragged, empty
        yield sample(tokens, 32, 128)  # Llama 3 8B
    yield sample(3, 5, 7)  # odd
    yield sample(2, 128, 512)  # DeepSeek-V3, absorbed
    # one side, the other, neither: what a split without keys leaves
    yield Sample(randn(4, 2, 64), _partial(0), randn(4, 2, 64), _partial(1))


def _partial(side: int) -> TensorSpec:
    def fill(generator: torch.Generator) -> Tensor:
        s = torch.randn(4, 2, generator=generator)
        s[side] = float("-inf")
        s[2] = float("-inf")
        s[3, side] = float("inf")
        return s

    return TensorSpec((4, 2), fill, torch.float32)

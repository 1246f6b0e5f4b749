# SPDX-License-Identifier: Apache-2.0
"""Put the absorbed queries of multi-head latent attention together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opmux.op import op
from opmux.samples import Sample, Tolerance, randn


@op(tolerance=Tolerance((0, 0), (0, 0), (0, 0), reason="copied bit for bit"))
def concat_mla_absorb_q(a: Tensor, b: Tensor) -> Tensor:
    """Concatenate each head's latent and rotary query: ``concat(a, b)`` on the last dimension.

    Copied bit for bit.

    Shapes:
        a: (T, heads, latent_dim), float32, bfloat16 or float16; last dimension contiguous
        b: (T, heads, rope_dim), dtype of a
        returns: (T, heads, latent_dim + rope_dim), dtype of a

    Raises:
        ValueError: a and b differ in tokens or heads.
        TypeError: dtypes differ.

    Source: DeepSeek-V2, arXiv:2405.04434
    """
    return torch.cat((a, b), dim=-1)


@concat_mla_absorb_q.outputs
def _(a: Tensor, b: Tensor) -> Tensor:
    if a.dim() != 3:
        raise ValueError(
            f"concat_mla_absorb_q: a must be (tokens, heads, latent_dim), got {tuple(a.shape)}"
        )
    if b.dim() != 3 or b.shape[:2] != a.shape[:2]:
        raise ValueError(
            f"concat_mla_absorb_q: b must have shape ({a.shape[0]}, {a.shape[1]}, rope_dim), "
            f"got {tuple(b.shape)}"
        )
    if b.dtype != a.dtype:
        raise TypeError(
            f"concat_mla_absorb_q: b must have the dtype of a, {a.dtype}, got {b.dtype}"
        )
    return a.new_empty((*a.shape[:2], a.shape[2] + b.shape[2]))


@concat_mla_absorb_q.samples
def _() -> Iterator[Sample]:
    for tokens in (1, 17, 0):  # decode, ragged, empty
        yield Sample(randn(tokens, 128, 512), randn(tokens, 128, 64))  # DeepSeek-V3
    yield Sample(randn(5, 3, 7), randn(5, 3, 3))  # odd

# SPDX-License-Identifier: Apache-2.0
"""Put the keys of multi-head latent attention together."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from opmux.op import op
from opmux.samples import Sample, Tolerance, randn


@op(
    mutates=("k",),
    tolerance=Tolerance((0, 0), (0, 0), (0, 0), reason="copied bit for bit"),
)
def concat_mla_k(k: Tensor, k_nope: Tensor, k_rope: Tensor) -> None:
    """In place: ``k[t, h] = concat(k_nope[t, h], k_rope[t, 0])``, the rotary part for every head.

    Copied bit for bit.

    Shapes:
        k: (T, heads, nope_dim + rope_dim), float32, bfloat16 or float16; last dimension
            contiguous; written
        k_nope: (T, heads, nope_dim), dtype of k
        k_rope: (T, 1, rope_dim), dtype of k

    Raises:
        ValueError: a shape does not fit.
        TypeError: dtypes differ.

    Source: DeepSeek-V2, arXiv:2405.04434
    """
    nope_dim = k_nope.shape[-1]
    k[..., :nope_dim].copy_(k_nope)
    k[..., nope_dim:].copy_(k_rope.expand(-1, k.shape[1], -1))


@concat_mla_k.outputs
def _(k: Tensor, k_nope: Tensor, k_rope: Tensor) -> None:
    name = "concat_mla_k"
    for label, tensor in (("k", k), ("k_nope", k_nope), ("k_rope", k_rope)):
        if tensor.dim() != 3:
            raise ValueError(
                f"{name}: {label} must have three dimensions, got {tuple(tensor.shape)}"
            )
        if tensor.dtype != k.dtype:
            raise TypeError(
                f"{name}: {label} must have the dtype of k, {k.dtype}, got {tensor.dtype}"
            )
    tokens, heads, width = k.shape
    nope, rope = k_nope.shape[2], k_rope.shape[2]
    for label, tensor, wanted in (
        ("k_nope", k_nope, (tokens, heads, nope)),
        ("k_rope", k_rope, (tokens, 1, rope)),
    ):
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{name}: {label} must have shape {wanted}, got {tuple(tensor.shape)}")
    if width != nope + rope:
        raise ValueError(
            f"{name}: last dimension of k must be {nope} + {rope}, those of k_nope and k_rope, "
            f"got {width}"
        )


@concat_mla_k.samples
def _() -> Iterator[Sample]:
    for tokens in (1, 17, 0):  # decode, ragged, empty
        yield Sample(  # DeepSeek-V3
            randn(tokens, 128, 192), randn(tokens, 128, 128), randn(tokens, 1, 64)
        )
    yield Sample(randn(5, 3, 10), randn(5, 3, 7), randn(5, 1, 3))  # odd

# SPDX-License-Identifier: Apache-2.0
"""Checks that the norms share."""

from __future__ import annotations

from torch import Tensor


def check_weight(op: str, x: Tensor, weight: Tensor) -> None:
    """Raise unless weight holds one value of x's dtype for each of the last dimension."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{op}: weight must have shape {tuple(x.shape[-1:])}, got {tuple(weight.shape)}"
        )
    if weight.dtype != x.dtype:
        raise TypeError(f"{op}: weight must have the dtype of x, {x.dtype}, got {weight.dtype}")


def check_residual(op: str, x: Tensor, residual: Tensor) -> None:
    """Raise unless residual is shaped and typed like x."""
    if residual.shape != x.shape:
        raise ValueError(
            f"{op}: residual must have the shape of x, {tuple(x.shape)}, got "
            f"{tuple(residual.shape)}"
        )
    if residual.dtype != x.dtype:
        raise TypeError(f"{op}: residual must have the dtype of x, {x.dtype}, got {residual.dtype}")

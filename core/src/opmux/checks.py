# SPDX-License-Identifier: Apache-2.0
"""Checks that definitions of several families share. Each error says op, argument, rule, value."""

from __future__ import annotations

import torch
from torch import Tensor

INDEX_DTYPES = (torch.int32, torch.int64)


def check_indices(op: str, name: str, value: Tensor, shape: tuple[int, ...] | None) -> None:
    """Raise unless value is an int32 or int64 tensor of the shape (None: of one dimension)."""
    if value.dtype not in INDEX_DTYPES:
        raise TypeError(f"{op}: {name} must be int32 or int64, got {value.dtype}")
    if shape is None and value.dim() != 1:
        raise ValueError(f"{op}: {name} must have one dimension, got {tuple(value.shape)}")
    if shape is not None and tuple(value.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(value.shape)}")


def check_range(op: str, name: str, value: Tensor, low: int | None, below: int) -> None:
    """Raise when an index is outside [low, below); only where looking costs no synchronisation.

    ``low`` None allows negative values. While compiling, and on other devices than the CPU, values
    cannot be seen: there the kernel guards itself.
    """
    if torch.compiler.is_compiling() or value.device.type != "cpu" or not value.numel():
        return
    smallest, largest = (int(v) for v in torch.aminmax(value))
    if largest >= below or (low is not None and smallest < low):
        bad = largest if largest >= below else smallest
        lowest = "" if low is None else f"at least {low} and "
        raise ValueError(f"{op}: {name} must be {lowest}below {below}, got {bad}")


def check_rows(op: str, name: str, value: Tensor) -> None:
    """Raise unless value has the two dimensions (rows, columns)."""
    if value.dim() != 2:
        raise ValueError(f"{op}: {name} must have two dimensions, got {tuple(value.shape)}")


def check_per_row(op: str, name: str, value: object, like: Tensor, dtypes: object) -> None:
    """Raise unless a per-row argument is a scalar or has one value for each row of ``like``."""
    if not isinstance(value, Tensor):
        return
    allowed = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    if value.dtype not in allowed:
        names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{op}: {name} must be {names}, got {value.dtype}")
    if tuple(value.shape) != (like.shape[0],):
        raise ValueError(
            f"{op}: {name} must have shape {(like.shape[0],)}, got {tuple(value.shape)}"
        )

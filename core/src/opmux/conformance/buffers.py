# SPDX-License-Identifier: Apache-2.0
"""Tensors inside guarded buffers: every byte that a kernel must not touch is checked after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opmux.conformance.levels import MemoryFault

GUARD = 4096  # bytes on each side: longer than any vector, and keeps the alignment of an allocation


@dataclass(frozen=True)
class Layout:
    """How tensors lie in memory. The last dimension is always contiguous.

    ``offset`` shifts the first element, ``pad`` lengthens the row stride of tensors with two
    dimensions and more, ``inner`` the stride before the last of tensors with three, and
    ``swapped`` stores their first two dimensions in the other order.
    """

    name: str
    offset: int = 0
    pad: int = 0
    inner: int = 0
    swapped: bool = False

    def __str__(self) -> str:
        """Return the name, for test ids."""
        return self.name

    def strides(self, shape: torch.Size) -> list[int]:
        """Return the strides of a tensor."""
        strides = [1] * len(shape)
        order = list(range(len(shape)))
        if self.swapped and len(shape) > 2:  # the last dimension stays
            order[:2] = [1, 0]
        step = 1
        for place, dim in reversed(list(enumerate(order))):
            strides[dim] = step
            step *= max(shape[dim], 1)
            if place == len(order) - 1 and len(order) > 2:
                step += self.inner
            if place == 1:
                step += self.pad
        return strides


DENSE = Layout("dense")
LAYOUTS = (
    DENSE,
    Layout("rows", pad=32),  # a slice of a wider buffer, rows still aligned for vectors
    Layout("misaligned", offset=1, pad=3),  # no row aligned beyond one element
    Layout("inner", inner=5),  # heads of a fused projection
    Layout("swapped", swapped=True),  # a transposed view
)


def poison(dtype: torch.dtype) -> int:
    """Return the byte that fills what nobody has written: NaN in every float type.

    Integers get a value that no result has, since -1 is one.
    """
    return 0xFF if dtype.is_floating_point else 0x5A


class Guarded:
    """A tensor in a larger buffer whose other bytes are poison."""

    def __init__(self, name: str, shape: torch.Size, dtype: torch.dtype, device: str,
                 layout: Layout) -> None:  # fmt: skip
        """Make the buffer; the view's own elements are poison too."""
        strides = layout.strides(shape)
        span = sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) + 1
        item = dtype.itemsize
        self.name = name
        self.dtype = dtype
        self.buffer = torch.full(
            (2 * GUARD + (layout.offset + max(span, 0) + layout.pad) * item,),
            poison(dtype),
            dtype=torch.uint8,
            device=device,
        )
        self._place = (list(shape), strides, GUARD // item + layout.offset)
        self.view = self._view(self.buffer)
        self._before = self.buffer

    def _view(self, buffer: Tensor) -> Tensor:
        whole = buffer[: buffer.numel() // self.dtype.itemsize * self.dtype.itemsize]
        return whole.view(self.dtype).as_strided(*self._place)

    def remember(self) -> None:
        """Take the present content as what :meth:`check` compares with."""
        self._before = self.buffer.clone()

    def check(self, written: bool) -> None:
        """Raise MemoryFault when a byte changed that may not.

        ``written`` allows the view's own elements to change.
        """
        after = self.buffer
        if after.is_meta:  # nothing is there
            return
        if written:
            after = after.clone()
            bits(self._view(after)).copy_(bits(self._view(self._before)))
        changed = (after != self._before).nonzero()
        if changed.numel():
            first = int(changed[0]) - self._place[2] * self.dtype.itemsize
            what = "outside of it" if written else "of it or around it, which is not to be written"
            raise MemoryFault(
                f"{self.name}: {changed.numel()} bytes {what} changed, the first {first} bytes "
                f"from its start (shape {self._place[0]}, strides {self._place[1]})"
            )


def bits(tensor: Tensor) -> Tensor:
    """Return the same elements as integers, so that NaN compares by its bits."""
    raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(raw[tensor.dtype.itemsize])


def guarded(name: str, value: Tensor, layout: Layout, device: str) -> Guarded:
    """Place a value in a guarded buffer."""
    made = Guarded(name, value.shape, value.dtype, device, layout)
    made.view.copy_(value)
    return made

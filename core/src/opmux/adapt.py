# SPDX-License-Identifier: Apache-2.0
"""Adapters from the calling conventions of existing kernels to that of ops.

The ``fn`` of a :class:`~opmux.Kernel` takes the op's inputs in schema order, then its outputs,
writes the outputs and returns nothing. Core makes a torch op of it: schema and fake from the
definition, checks before the call, ``out=``, ``torch.compile``. Kernels that are called in another
way are wrapped::

    fn=returning(vendor.rmsnorm)        # returns a new tensor
    fn=dlpack(vendor.rmsnorm)           # takes DLPack capsules

and kernels that take pointers and sizes are called from a function of a few lines, which
:func:`matrices` spares the strides of leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]


def returning(fn: Callable[..., Any], results: int = 1) -> Callable[..., None]:
    """Adapt a function that returns its results; they are copied into the op's outputs.

    Args:
        fn: takes the op's inputs and returns a tensor, or a tuple of ``results`` tensors.
        results: how many tensors it returns.
    """

    def kernel(*args: Any) -> None:
        found = fn(*args[:-results])
        values = found if isinstance(found, tuple) else (found,)
        if len(values) != results:
            raise RuntimeError(f"{fn!r} returned {len(values)} results instead of {results}")
        for out, value in zip(args[-results:], values, strict=True):
            if (value.shape, value.dtype) != (out.shape, out.dtype):  # copy_ would convert
                raise RuntimeError(
                    f"{fn!r} returned {value.dtype} {tuple(value.shape)} "
                    f"instead of {out.dtype} {tuple(out.shape)}"
                )
            out.copy_(value)

    return kernel


def dlpack(fn: Callable[..., Any]) -> Callable[..., None]:
    """Adapt a function that takes tensors, outputs included, as DLPack capsules.

    A capsule lends its memory for the call: a function that keeps it must take it over, as the
    DLPack protocol says.
    """

    def kernel(*args: Any) -> None:
        fn(*(to_dlpack(arg.detach()) if isinstance(arg, Tensor) else arg for arg in args))

    return kernel


def matrices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors as matrices of the same number of rows, without a copy.

    All must agree in every dimension but the last. A dense tensor, rows of a wider buffer and most
    views are one matrix; others are split along their first dimensions. Each matrix is described by
    ``data_ptr()``, ``shape`` and ``stride(0)``.
    """
    rows = math.prod(tensors[0].shape[:-1])
    try:
        whole = tuple(t.view(rows, t.shape[-1]) for t in tensors)
    except RuntimeError:  # the rows of one of them do not lie at a constant distance
        for parts in zip(*tensors, strict=True):
            yield from matrices(*parts)
    else:
        yield whole

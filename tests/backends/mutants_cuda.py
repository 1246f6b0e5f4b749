# SPDX-License-Identifier: Apache-2.0
"""Backends for ``cuda`` that are wrong in what only a GPU shows; see mutants.py."""

from __future__ import annotations

import torch
from torch import Tensor

import opmux

from .acme import silu_and_mul  # type: ignore[import-not-found]

NAME = __name__.removeprefix("opmux_")


def right_on_the_gpu(x: Tensor, out: Tensor) -> None:
    silu_and_mul(x, out)


def wrong_stream(x: Tensor, out: Tensor) -> None:
    """Launch on the default stream, whatever the current one is."""
    with torch.cuda.stream(torch.cuda.default_stream(x.device)):
        silu_and_mul(x, out)


def nobody_waits(x: Tensor, out: Tensor) -> None:
    """Write on a stream of its own that the caller's stream does not wait for."""
    side = torch.cuda.Stream(x.device)
    side.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
        silu_and_mul(x, out)


def synchronises(x: Tensor, out: Tensor) -> None:
    """Wait for the GPU inside of the call, which a capture forbids."""
    silu_and_mul(x, out)
    torch.cuda.synchronize(x.device)


def moves_the_current_device(x: Tensor, out: Tensor) -> None:
    torch.cuda.set_device(x.device)
    silu_and_mul(x, out)


@opmux.hookimpl
def opmux_backend() -> opmux.Backend:
    kernel = opmux.Kernel((torch.float32,), fn=globals()[NAME])
    return opmux.Backend(NAME, "cuda", {"silu_and_mul": kernel})

# SPDX-License-Identifier: Apache-2.0
"""Calls that an op's definition forbids: each must be refused with nothing written.

Every tensor of a sample is spoilt in every way below; the definition itself says which of the
results are mistakes (a wider mask, say, may be none), so no op lists its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from opmux.conformance.buffers import DENSE, Guarded
from opmux.conformance.calls import Prepared
from opmux.conformance.cases import Case, expected

FAR = 1 << 30  # an index outside of everything


class _Step(Guarded):
    """A tensor whose last dimension has stride 2."""

    def __init__(self, name: str, shape: torch.Size, dtype: torch.dtype, device: str) -> None:
        wide = torch.Size([*shape[:-1], shape[-1] * 2])
        super().__init__(name, wide, dtype, device, DENSE)
        self._place = (list(shape), [*DENSE.strides(wide)[:-1], 2], self._place[2])
        self.view = self._view(self.buffer)


def _reshaped(shape: Callable[[torch.Size], list[int]]) -> Callable[[Guarded, str], Guarded]:
    def spoil(good: Guarded, device: str) -> Guarded:
        new = torch.Size(shape(good.view.shape))
        made = Guarded(good.name, new, good.dtype, device, DENSE)
        # Real values, so that the shape alone is wrong: an index of poison would be refused too.
        flat = good.view.flatten()
        made.view.copy_(flat[torch.arange(new.numel(), device=device) % flat.numel()].view(new))
        return made

    return spoil


def _retyped(good: Guarded, device: str) -> Guarded:
    other = torch.float64 if good.dtype.is_floating_point else torch.float32
    made = Guarded(good.name, good.view.shape, other, device, DENSE)
    made.view.copy_(good.view)
    return made


def _stepped(good: Guarded, device: str) -> Guarded:
    made = _Step(good.name, good.view.shape, good.dtype, device)
    made.view.copy_(good.view)
    return made


def _expanded(good: Guarded, device: str) -> Guarded:
    first = _reshaped(lambda shape: [1, *shape[1:]])(good, device)
    first.view = first.view.expand(good.view.shape)
    return first


def _elsewhere(good: Guarded, device: str) -> Guarded:
    return Guarded(good.name, good.view.shape, good.dtype, "meta", DENSE)


def _far_index(value: int) -> Callable[[Guarded, str], Guarded | None]:
    def spoil(good: Guarded, device: str) -> Guarded | None:
        if good.dtype not in (torch.int32, torch.int64):
            return None
        made = Guarded(good.name, good.view.shape, good.dtype, device, DENSE)
        made.view.copy_(good.view)
        made.view.view(-1)[-1] = value
        return made

    return spoil


_SPOILERS: dict[str, Callable[[Guarded, str], Guarded | None]] = {
    "one column more": _reshaped(lambda s: [*s[:-1], s[-1] + 1]),
    "one column less": _reshaped(lambda s: [*s[:-1], s[-1] - 1]),
    "one row more": _reshaped(lambda s: [s[0] + 1, *s[1:]]),
    "one row less": _reshaped(lambda s: [s[0] - 1, *s[1:]]),
    "one dimension more": _reshaped(lambda s: [1, *s]),
    "one dimension less": _reshaped(lambda s: list(s[1:])),
    "another dtype": _retyped,
    "last dimension not contiguous": _stepped,
    "expanded": _expanded,
    "on another device": _elsewhere,
    "index too large": _far_index(FAR),
    "index negative": _far_index(-FAR),
}


def mistakes(case: Case) -> Iterator[tuple[str, Prepared, Exception]]:
    """Yield (what is wrong, call, the definition's own complaint)."""
    device = case.claim.target.device
    values, results = expected(case, "plain")
    names = [n for n, v in values.items() if isinstance(v, Tensor)] + list(case.claim.op.outs)
    for name in names:
        for what, spoil in _SPOILERS.items():
            call = Prepared(case.claim.op, values, results, device=device)
            bad = spoil(call.buffers[name], device)
            if bad is None:
                continue
            call.buffers[name] = bad
            call.values[name] = bad.view
            complaint = call.allowed()
            if complaint is not None:
                yield f"{name}: {what}", call, complaint

# SPDX-License-Identifier: Apache-2.0
"""The settings of a process that a plugin must leave alone while it is loaded."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

Snapshot = dict[str, Any]


def _flushes_denormals() -> bool:
    # A library linked with -ffast-math sets this for the thread that loads it.
    return sys.float_info.min / 2 == 0


def _deterministic() -> tuple[bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def _set_deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def _handlers() -> tuple[Any, ...]:
    return tuple(signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM))


def _set_handlers(value: tuple[Any, ...]) -> None:
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), value, strict=True):
        if handler is not None:  # one that was not installed from Python cannot be put back
            signal.signal(number, handler)


class _Seed:
    """The seed of torch's generator; two are equal whatever was drawn since."""

    def __init__(self) -> None:
        self.seed = torch.initial_seed()
        self.state = torch.random.get_rng_state()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Seed) and self.seed == other.seed

    def __hash__(self) -> int:
        return hash(self.seed)

    def __str__(self) -> str:
        return str(self.seed)


def _set_seed(value: _Seed) -> None:
    torch.random.set_rng_state(value.state)


def _set_device(value: torch.device) -> None:
    # naming the CPU would put a mode in front of every torch function
    torch.set_default_device(None if value == torch.device("cpu") else value)


class _Attributes:
    """What a module or class holds; names that are new and hide nothing are nobody's business."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.held = dict(vars(owner))

    def changed(self) -> list[str]:
        now = vars(self.owner)
        bases = getattr(self.owner, "__mro__", ())[1:]
        hidden = [n for n in now.keys() - self.held.keys() if any(n in vars(b) for b in bases)]
        return sorted([n for n, value in self.held.items() if now.get(n) is not value] + hidden)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Attributes) and not self.changed()

    def __hash__(self) -> int:
        return id(self)

    def put_back(self) -> None:
        for name in self.changed():
            if name in self.held:
                setattr(self.owner, name, self.held[name])
            else:
                delattr(self.owner, name)


def _own_kernels() -> frozenset[str]:
    """Kernels that Python put under torch's own ops; there is no way to take them back."""
    return frozenset(k for k in getattr(torch.library, "_impls", ()) if k.startswith("aten/"))


def _modules() -> tuple[Any, ...]:
    return tuple(sys.modules.get(name) for name in _MODULES)


def _set_modules(value: tuple[Any, ...]) -> None:
    sys.modules.update(zip(_MODULES, value, strict=True))


_MODULES = ("torch", "torch.nn.functional", "opmux", "opmux.kernel", "opmux.loader", "pluggy")
_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (torch.get_default_device, _set_device),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's deterministic algorithms": (_deterministic, _set_deterministic),
    "torch's float32 matmul precision": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "torch's seed": (_Seed, _set_seed),
    "functions of torch.nn.functional": (
        lambda: _Attributes(torch.nn.functional),
        _Attributes.put_back,
    ),
    "methods of torch.Tensor": (lambda: _Attributes(torch.Tensor), _Attributes.put_back),
    "kernels of torch's own ops": (_own_kernels, lambda _: None),
    "the modules torch and opmux": (_modules, _set_modules),
    "flushing of denormal numbers to zero": (_flushes_denormals, torch.set_flush_denormal),
    "the working directory": (os.getcwd, os.chdir),
    "the recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
    "the handlers of SIGINT and SIGTERM": (_handlers, _set_handlers),
}


def snapshot() -> Snapshot:
    """Return the present settings."""
    found = {}
    for name, (get, _) in _SETTINGS.items():
        try:
            found[name] = get()
        except (OSError, RuntimeError):  # the working directory was removed, say
            continue
    return found


def restore(before: Snapshot) -> list[str]:
    """Put back what differs from a snapshot and return what it was, in words."""
    changed = []
    for name, value in before.items():
        get, put = _SETTINGS[name]
        now = get()
        if value != now:  # in this order: a snapshot of attributes looks again itself
            plain = not isinstance(value, (tuple, frozenset, _Attributes))
            changed.append(f"{name} from {value} to {now}" if plain else name)
            put(value)
    return changed

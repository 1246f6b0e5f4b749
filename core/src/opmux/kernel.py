# SPDX-License-Identifier: Apache-2.0
"""What a backend hands over: frozen values that describe kernels, and reasons to refuse them."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Code(str, enum.Enum):
    """Why a kernel was refused. The values are stable: tools may match on them."""

    DENIED = "denied"
    ABSENT = "not installed"
    FAILED = "failed to load"
    CRASHED = "crashed"
    INTERFACE = "interface"
    DEVICE = "device"
    ARCH = "arch"
    RUNTIME = "runtime"
    CONFORMANCE = "conformance"
    DTYPE = "dtype"
    LAYOUT = "layout"
    PROPERTY = "property"
    PREDICATE = "shape"
    UNSUPPORTED = "on_unsupported"

    @property
    def meaning(self) -> str:
        """When the code is used, in a sentence."""
        return _MEANINGS[self]


_MEANINGS = {
    Code.DENIED: "the policy excludes the backend, or allows only others.",
    Code.ABSENT: "the policy names a backend that is not installed or has no kernel for the op.",
    Code.FAILED: "the plugin is broken or not complete here; the others stay in service.",
    Code.CRASHED: "loading the plugin in a child process ended it, hung, or changed torch's state.",
    Code.INTERFACE: "the plugin was built for another opmux, torch or interface of the op.",
    Code.DEVICE: "the tensors are on a device that the backend does not serve.",
    Code.ARCH: "the kernel is for another instruction set or generation of the device.",
    Code.RUNTIME: "a driver, a library or a feature of this host is missing or too old.",
    Code.CONFORMANCE: "the policy asks for a conformance report that the backend does not have.",
    Code.DTYPE: "the kernel does not claim the dtype of the leading tensor.",
    Code.LAYOUT: "the kernel needs dense tensors, and one is not.",
    Code.PROPERTY: "the policy requires a property that the kernel does not guarantee.",
    Code.PREDICATE: "the kernel's own predicate refuses a shape or an argument.",
    Code.UNSUPPORTED: "the kernel fits, but on_unsupported keeps it from standing in for another.",
}


@dataclass(frozen=True)
class Reason:
    """One refusal: a stable code, a sentence, and what the user can do about it."""

    code: Code
    sentence: str
    remedy: str = ""

    def __str__(self) -> str:
        """Return ``code: sentence (remedy)``."""
        remedy = f" ({self.remedy})" if self.remedy else ""
        return f"{self.code.value}: {self.sentence}{remedy}"


class Tier(enum.IntEnum):
    """How a kernel came to be; the lower wins. Closed on purpose: there are no free priorities."""

    SPECIALISED = 0  # written for exactly this hardware or shape
    TUNED = 1  # measured and tuned on this kind of hardware
    PORTABLE = 2  # right everywhere that the backend serves
    REFERENCE = 3  # the op's definition, run as it stands


class Property(str, enum.Enum):
    """What a caller may require of a kernel."""

    GRAPH_CAPTURABLE = "graph_capturable"
    DETERMINISTIC = "deterministic"
    BATCH_INVARIANT = "batch_invariant"
    COMPILE = "compile"


@dataclass(frozen=True)
class Capability:
    """What one device of this host offers to a backend, found by the backend's probe.

    ``arch`` names the instruction set or GPU generation that the kernels will use, ``facts`` are
    shown by ``opmux doctor``, and ``refused`` says why the backend cannot serve the device at all.
    """

    arch: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    refused: Reason | None = None


@dataclass(frozen=True)
class Signature:
    """The part of a call that a decision may depend on: never a value, never a token count.

    ``axes`` holds the constant axes: the last dimension of the leading tensor as ``last_dim`` and
    every integer and boolean argument under its own name.
    """

    op: str
    device: torch.device
    dtypes: tuple[tuple[str, torch.dtype], ...]
    axes: tuple[tuple[str, int], ...] = ()
    contiguous: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the leading tensor."""
        return self.dtypes[0][1]

    def axis(self, name: str) -> int:
        """Return one constant axis by name."""
        return dict(self.axes)[name]

    def __str__(self) -> str:
        """Return a short form such as ``silu_and_mul(bfloat16, last_dim=8 on cpu)``."""
        parts = [str(self.dtype).removeprefix("torch.")]
        parts += [f"{name}={value}" for name, value in self.axes]
        return f"{self.op}({', '.join(parts)} on {self.device})"


Predicate = Callable[[Signature], "str | None"]


@dataclass(frozen=True)
class Kernel:
    """One implementation of one op, and exactly what it claims to serve.

    Attributes:
        dtypes: dtypes of the op's leading tensor.
        rejects: returns a sentence for a signature that the kernel does not serve, else None.
        tier: how it came to be; see :class:`Tier`.
        archs: the values of ``Capability.arch`` that it runs on; empty means all.
        layout: ``"rows"`` needs a contiguous last dimension, ``"contiguous"`` dense tensors.
        properties: what it guarantees.
        fn: a Python callable in destination-passing form (inputs in schema order, then outputs),
            or its name as ``"module:attribute"``, imported when the backend is loaded; None when
            the backend's native library implements it. :mod:`opmux.adapt` has other conventions.
        symbol: the native symbol, when it is not the name of the op.
    """

    dtypes: tuple[torch.dtype, ...]
    rejects: Predicate | None = None
    tier: Tier = Tier.PORTABLE
    archs: tuple[str, ...] = ()
    layout: str = "rows"
    properties: frozenset[Property] = frozenset(Property)
    fn: Callable[..., None] | str | None = None
    symbol: str = ""

    def __post_init__(self) -> None:
        """Refuse a description that could never be chosen correctly."""
        if not self.dtypes or not all(isinstance(d, torch.dtype) for d in self.dtypes):
            raise TypeError(f"Kernel: dtypes must be torch dtypes, got {self.dtypes!r}")
        if self.layout not in ("rows", "contiguous"):
            raise ValueError(f"Kernel: layout must be 'rows' or 'contiguous', got {self.layout!r}")
        if not isinstance(self.tier, Tier):
            raise TypeError(f"Kernel: tier must be a Tier, got {self.tier!r}")
        for name, value in (("rejects", self.rejects), ("fn", self.fn)):
            named = name == "fn" and isinstance(value, str) and value.count(":") == 1
            if value is not None and not callable(value) and not named:
                raise TypeError(f"Kernel: {name} must be callable, got {value!r}")

    @property
    def needs_detail(self) -> bool:
        """Whether choosing it takes more than the device and the leading dtype."""
        return self.rejects is not None or self.layout != "rows"


def _any_device(device: torch.device, info: Mapping[str, Any]) -> Capability:
    return Capability()


@dataclass(frozen=True)
class Backend:
    """A named set of kernels for one device type.

    Attributes:
        name: how users name it; letters, digits and underscores.
        device: the torch device type of its tensors (``cpu``, ``cuda``, ...).
        kernels: op name -> kernel, or several kernels with different symbols.
        library: the native library that implements the kernels without ``fn``.
        extension: the CPython extension module (pybind11, nanobind) that the kernels' ``fn`` call.
            The loader imports it after the handshake, so that nothing native runs before.
        check_host: says why the library must not be loaded on this host, else None. It runs before
            the library is touched.
        probe: describes one device, given it and what the library's ``opmux_info`` said; called
            once per device, after the library is loaded.
    """

    name: str
    device: str
    kernels: Mapping[str, Kernel | tuple[Kernel, ...]] = field(default_factory=dict)
    library: Path | None = None
    extension: str = ""
    check_host: Callable[[], Reason | None] | None = None
    probe: Callable[[torch.device, Mapping[str, Any]], Capability] = _any_device

    def items(self) -> Iterable[tuple[str, Kernel]]:
        """Yield every (op name, kernel) pair."""
        for name, kernels in self.kernels.items():
            for kernel in kernels if isinstance(kernels, tuple) else (kernels,):
                yield name, kernel


def last_dim_multiple_of(n: int) -> Predicate:
    """Return a predicate that refuses a last dimension that ``n`` does not divide."""

    def rejects(signature: Signature) -> str | None:
        size = signature.axis("last_dim")
        return f"last dimension {size} is not a multiple of {n}" if size % n else None

    return rejects


class NoKernelError(RuntimeError):
    """No kernel may serve a call; the message names every candidate and its reason."""

    def __init__(self, message: str, decision: Any = None) -> None:
        """Keep the decision, so that callers can inspect the reasons."""
        super().__init__(message)
        self.decision = decision

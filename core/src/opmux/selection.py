# SPDX-License-Identifier: Apache-2.0
"""The one evaluator: gates with reasons, a lexicographic rank, one Decision.

Dispatch, ``op.explain`` and the command line all call :func:`evaluate`; nothing else chooses.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opmux import loader
from opmux.kernel import FLOATS, Code, Kernel, Property, Reason, Signature, Tier
from opmux.policy import KNOWN, Settings

if TYPE_CHECKING:
    from opmux.op import Op

REFERENCE = "reference"
_reference_kernel = Kernel(
    dtypes=FLOATS,  # not read: the reference takes what the op allows
    tier=Tier.REFERENCE,
    properties=frozenset({Property.COMPILE, Property.DETERMINISTIC}),
)


@dataclass(frozen=True)
class Candidate:
    """One kernel that was considered: where it stands, and why it was refused if it was."""

    backend: str
    dist: str = ""
    kernel: Kernel | None = None
    symbol: str = ""
    rank: tuple[Any, ...] = ()
    refused: Reason | None = None
    host_gate: bool = False  # refused for this host or process, whatever the arguments
    target: str = ""  # ``namespace.symbol`` of the torch op, or ``reference``
    call: Callable[..., Any] | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """``backend`` or ``backend/symbol``."""
        return f"{self.backend}/{self.symbol}" if self.symbol else self.backend

    def describe(self) -> str:
        """Say in words how the kernel ranks."""
        if self.refused:
            return str(self.refused)
        tier = self.kernel.tier.name.lower() if self.kernel else ""
        return f"accepted: tier {tier}"


@dataclass(frozen=True)
class Decision:
    """What a call runs, and every candidate in order with its reason."""

    op: str
    signature: Signature
    candidates: tuple[Candidate, ...]
    winner: Candidate | None
    settings: Settings
    why: str

    @property
    def call(self) -> Callable[..., Any]:
        """What runs."""
        if self.winner is None or self.winner.call is None:
            raise LookupError(f"no kernel for {self.signature}")
        return self.winner.call

    def to_dict(self) -> dict[str, Any]:
        """Return the decision as plain values for JSON."""
        return {
            "op": self.op,
            "signature": str(self.signature),
            "winner": self.winner.name if self.winner else None,
            "why": self.why,
            "settings": {
                key: {"value": getattr(self.settings, key), "origin": origin}
                for key, origin in self.settings.origins.items()
            },
            "candidates": [
                {
                    "backend": c.backend,
                    "dist": c.dist,
                    "kernel": c.name,
                    "accepted": c.refused is None,
                    "code": c.refused.code.value if c.refused else None,
                    "reason": c.describe(),
                    "remedy": c.refused.remedy if c.refused else "",
                }
                for c in self.candidates
            ],
        }

    def __str__(self) -> str:
        """Return the decision as text, one candidate a line."""
        head = f"no kernel for {self.signature}"
        if self.winner:
            head = f"{self.signature} -> {self.winner.name}: {self.why}"
        width = max((len(c.name) for c in self.candidates), default=0)
        lines = [f"  {c.name:<{width}}  {c.describe()}" for c in self.candidates]
        return "\n".join([head, *lines])


# ---- gates: each returns a Reason or None; host gates first, then those of the arguments ----

Gate = Callable[[loader.Loaded, Kernel, Signature, Settings], "Reason | None"]


def _names(dtypes: tuple[Any, ...]) -> str:
    return ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))


def _interface(b: loader.Loaded, k: Kernel, s: Signature, _: Settings) -> Reason | None:
    return b.refused.get(s.op)


def _conformance(b: loader.Loaded, k: Kernel, s: Signature, settings: Settings) -> Reason | None:
    wanted = settings.require_conformance
    if wanted is None or b.conformance.level >= wanted:
        return None
    origin = settings.origins.get("require_conformance", "the policy")
    return Reason(
        Code.CONFORMANCE,
        f"{b.conformance.sentence}; {origin} requires level {wanted}",
        f"run opmux conform {b.name} --level {wanted}, or install a version that ships its report",
    )


def _device(b: loader.Loaded, k: Kernel, s: Signature, _: Settings) -> Reason | None:
    if s.device.type == b.backend.device:
        return None
    return Reason(
        Code.DEVICE,
        f"tensor is on {s.device.type}, this backend serves {b.backend.device}",
        f"move the tensor to {b.backend.device}",
    )


def _runtime(b: loader.Loaded, k: Kernel, s: Signature, _: Settings) -> Reason | None:
    return b.capability(s.device).refused


def _arch(b: loader.Loaded, k: Kernel, s: Signature, _: Settings) -> Reason | None:
    arch = b.capability(s.device).arch
    if not k.archs or arch in k.archs:
        return None
    return Reason(Code.ARCH, f"{s.device} is {arch}, the kernel needs {' or '.join(k.archs)}")


def _dtype(b: loader.Loaded, k: Kernel, s: Signature, _: Settings) -> Reason | None:
    if s.dtype in k.dtypes:
        return None
    return Reason(
        Code.DTYPE,
        f"{_names((s.dtype,))} is not one of {_names(k.dtypes)}",
        'cast the input, or use backend "reference"',
    )


def _layout(b: loader.Loaded, k: Kernel, s: Signature, _: Settings) -> Reason | None:
    if k.layout == "rows" or s.contiguous:
        return None
    return Reason(
        Code.LAYOUT, "a tensor is not contiguous, the kernel needs dense ones", "call .contiguous()"
    )


def _missing_property(k: Kernel, settings: Settings) -> Reason | None:
    missing = [name for name in settings.require if Property(name) not in k.properties]
    if not missing:
        return None
    return Reason(
        Code.PROPERTY,
        f"the kernel is not {' and '.join(missing)}",
        f"required by {settings.origins.get('require', 'the policy')}",
    )


def _property(b: loader.Loaded, k: Kernel, s: Signature, settings: Settings) -> Reason | None:
    return _missing_property(k, settings)


def _predicate(b: loader.Loaded, k: Kernel, s: Signature, _: Settings) -> Reason | None:
    if k.rejects is None:
        return None
    try:
        sentence: object = k.rejects(s)  # a plugin's: trust no annotation
    except Exception as error:
        return Reason(Code.PREDICATE, f"its predicate raised {type(error).__name__}: {error}")
    if sentence is None or sentence == "":
        return None
    if isinstance(sentence, str):
        return Reason(Code.PREDICATE, sentence)
    return Reason(Code.PREDICATE, f"its predicate returned {sentence!r}, not a sentence or None")


HOST_GATES: tuple[Gate, ...] = (_interface, _conformance, _device, _runtime, _arch)
CALL_GATES: tuple[Gate, ...] = (_dtype, _layout, _property, _predicate)


def _order(name: str, settings: Settings) -> int | Reason:
    """Return the place of a backend in the user's order, or why it is not wanted."""
    order = settings.order
    origin = settings.origins.get("backends", "the policy")
    if name in settings.denied:
        return Reason(Code.DENIED, f"excluded by {origin}")
    for wanted in (name, "*"):
        if wanted in order:
            return order.index(wanted)
    return Reason(Code.DENIED, f"{origin} allows only {', '.join(order)}")


def _domain(kernel: Kernel) -> tuple[int, ...]:
    """How narrow the declared domain is; the narrower ranks first."""
    return (kernel.rejects is None, len(kernel.archs) or 1 << 16, len(kernel.dtypes))


def _judge(
    loaded: loader.Loaded, kernel: Kernel, signature: Signature, settings: Settings
) -> Candidate:
    place = _order(loaded.name, settings)
    symbol = kernel.symbol or signature.op
    shown = kernel.symbol if kernel.symbol != signature.op else ""
    common = {"backend": loaded.name, "dist": loaded.dist, "kernel": kernel, "symbol": shown}
    if isinstance(place, Reason):
        return Candidate(**common, refused=place, host_gate=True)  # type: ignore[arg-type]
    rank = (place, kernel.tier, _domain(kernel), loaded.dist, symbol)
    for gates in (HOST_GATES, CALL_GATES):
        for gate in gates:
            reason = gate(loaded, kernel, signature, settings)
            if reason:
                return Candidate(
                    **common,  # type: ignore[arg-type]
                    rank=rank,
                    refused=reason,
                    host_gate=gates is HOST_GATES,
                )
    return Candidate(
        **common,  # type: ignore[arg-type]
        rank=rank,
        target=f"{loaded.namespace}.{symbol}",
        call=loaded.overload(symbol),
    )


def _reference(op: Op, settings: Settings) -> Candidate:
    place = _order(REFERENCE, settings)
    if isinstance(place, Reason):
        return Candidate(REFERENCE, "opmux", _reference_kernel, refused=place, host_gate=True)
    return Candidate(
        REFERENCE,
        "opmux",
        _reference_kernel,
        rank=(place, Tier.REFERENCE),
        refused=_missing_property(_reference_kernel, settings),
        target=REFERENCE,
        call=op.reference,
    )


def _without_kernel(op: Op, registry: loader.Registry, settings: Settings) -> list[Candidate]:
    """Failed, absent and incomplete backends: never chosen, always named."""
    found = [
        Candidate(f.backend, f.dist, refused=f.reason, host_gate=True)
        for f in registry.failures
        if not f.op and f.backend not in settings.denied
    ]
    for name in settings.order:
        if name in KNOWN and name not in registry.names:
            dist = f"opmux-{name.replace('_', '-')}"
            reason = Reason(Code.ABSENT, f"{dist} is not here", f"pip install {dist}")
            found.append(Candidate(name, dist, refused=reason, host_gate=True))
    for loaded in registry.backends:
        if loaded.name in settings.order and op.name not in loaded.backend.kernels:
            reason = loaded.refused.get(op.name) or Reason(
                Code.ABSENT, f"it has no kernel for {op.name}"
            )
            found.append(Candidate(loaded.name, loaded.dist, refused=reason, host_gate=True))
    return found


def evaluate(
    op: Op,
    signature: Signature,
    effective: Callable[[str], Settings],
    registry: loader.Registry | None = None,
) -> Decision:
    """Choose the kernel for a signature; a pure function of registry, policy, host, signature.

    ``registry`` may be that of another host, from :mod:`opmux.hosts`.
    """
    settings = effective(op.name)
    registry = loader.load() if registry is None else registry
    judged = [
        _judge(loaded, kernel, signature, settings) for loaded, kernel in registry.kernels(op.name)
    ]
    judged.append(_reference(op, settings))
    ranked = sorted((c for c in judged if c.rank), key=lambda c: c.rank)
    accepted = [c for c in ranked if c.refused is None]
    preferred = next((c for c in ranked if not c.host_gate), None)
    winner = accepted[0] if accepted else None
    if preferred is not None and preferred.refused and settings.on_unsupported != "next":
        winner = None
        if settings.on_unsupported == "reference":
            winner = next((c for c in accepted if c.backend == REFERENCE), None)
    rest = [c for c in judged if not c.rank] + _without_kernel(op, registry, settings)
    candidates = tuple(_overruled(c, winner, preferred, settings) for c in ranked) + tuple(rest)
    why = _why(winner, preferred, accepted, settings)
    return Decision(op.name, signature, candidates, winner, settings, why)


def refusal(decision: Decision, op: Op, signature: Signature) -> Reason | None:
    """Return why the kernel that won a decision does not serve another signature, or None."""
    won = decision.winner
    for loaded, kernel in loader.load().kernels(op.name):
        if won and kernel is won.kernel and loaded.name == won.backend:
            return _judge(loaded, kernel, signature, decision.settings).refused
    return Reason(Code.ABSENT, "its backend was unloaded")


def _overruled(
    c: Candidate, winner: Candidate | None, preferred: Candidate | None, settings: Settings
) -> Candidate:
    """Mark a fit kernel that on_unsupported keeps from standing in for the preferred one."""
    if c.refused or c is winner or preferred is None or not preferred.refused:
        return c
    if settings.on_unsupported == "next":
        return c
    origin = settings.origins.get("on_unsupported", "the policy")
    sentence = f'{preferred.name} refused and on_unsupported is "{settings.on_unsupported}"'
    reason = Reason(Code.UNSUPPORTED, sentence, f"set by {origin}")
    return Candidate(c.backend, c.dist, c.kernel, c.symbol, c.rank, reason)


def _why(  # noqa: PLR0911 - one sentence for each way to win
    winner: Candidate | None,
    preferred: Candidate | None,
    accepted: list[Candidate],
    settings: Settings,
) -> str:
    if winner is None:
        return "no candidate was accepted"
    if preferred is not None and preferred is not winner:
        return f"{preferred.name} refused ({preferred.refused}); the next that fits"
    others = [c for c in accepted if c is not winner]
    if not others:
        return "the only one that fits"
    second = others[0]
    if winner.rank[0] != second.rank[0]:
        return f"first in the order of {settings.origins.get('backends', 'the policy')}"
    if winner.rank[1] != second.rank[1]:
        return (
            f"tier {Tier(winner.rank[1]).name.lower()} before {Tier(second.rank[1]).name.lower()}"
        )
    if winner.backend == REFERENCE:
        return "the definition itself before kernels of tier reference"
    if winner.rank[2] != second.rank[2]:
        return f"narrower declared domain than {second.name}"
    return f"tie with {second.name} broken by name ({winner.dist} before {second.dist})"


_warned: set[tuple[str, str]] = set()
_warn_lock = threading.Lock()


def warn_reference(decision: Decision) -> None:
    """Warn once per op and device type when the reference runs where an accelerator is."""
    device = decision.signature.device.type
    if decision.winner is None or decision.winner.backend != REFERENCE:
        return
    if device in ("cpu", "meta") or REFERENCE in decision.settings.order:
        return
    with _warn_lock:
        if (decision.op, device) in _warned:
            return
        _warned.add((decision.op, device))
    warnings.warn(
        f"opmux: {decision.op} runs its reference on {device}, which is slow; "
        f"install a backend for {device} or choose it with opmux.use('reference')\n{decision}",
        RuntimeWarning,
        stacklevel=4,
    )

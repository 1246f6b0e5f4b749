# SPDX-License-Identifier: Apache-2.0
"""Policy: which backends a user wants, layer by layer, each value with its origin.

Highest first: ``backend=`` at the call, ``use()``, the model scope, ``configure()``, environment,
``opmux.toml``, defaults. A backend list is both an order and a filter: ``["acme", "*"]`` prefers
acme, ``["acme"]`` allows nothing else, ``["-acme"]`` excludes it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opmux.kernel import Property

ON_UNSUPPORTED = ("next", "reference", "raise")
KNOWN = ("cpu_amx", "cuda", "musa", "rocm")
_LEVELS = ("defaults", "opmux.toml", "environment", "configure()", "model", "use()", "backend=")


@dataclass(frozen=True)
class Settings:
    """What holds for one op: every field with the origin of its value."""

    backends: tuple[str, ...] = ("*",)
    on_unsupported: str = "next"
    require: tuple[str, ...] = ()
    require_conformance: int | None = None
    origins: Mapping[str, str] = field(default_factory=dict)

    @property
    def denied(self) -> frozenset[str]:
        """Backends excluded by ``-name``."""
        return frozenset(name[1:] for name in self.backends if name.startswith("-"))

    @property
    def order(self) -> tuple[str, ...]:
        """The wanted backends in order; ``*`` stands for all others."""
        wanted = tuple(name for name in self.backends if not name.startswith("-"))
        return wanted or ("*",)


_DEFAULTS = {
    "backends": ("*",),
    "on_unsupported": "next",
    "require": (),
    "require_conformance": None,
}


@dataclass(frozen=True, eq=False)
class Layer:
    """Settings from one origin; ``ops`` overrides them for single ops."""

    level: str
    origin: str
    values: Mapping[str, Any]
    ops: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Scope:
    """The layers that ``use()`` has put in force; interned, so that a scope is a cheap key."""

    layers: tuple[Layer, ...]
    token: str  # names the scope in the guards of compiled code


class _Layers:
    """The layers that hold for the whole process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.base: tuple[Layer, ...] | None = None
        self.models: dict[str, Layer] = {}
        self.configured: Layer | None = None
        self.scopes: dict[Any, Scope] = {}
        self.tokens: dict[str, Scope] = {}
        self.cache: dict[Any, dict[str, Settings]] = {}


class _Traced(threading.local):
    """The token of this thread's scope: compiled code cannot be guarded on a ContextVar.

    Thus compiled code follows the thread's innermost ``use()``, also in asyncio tasks.
    """

    def __init__(self) -> None:
        self.token = ""


_state = _Layers()
_active: ContextVar[Scope | None] = ContextVar("opmux_scope", default=None)
scope: Callable[[], Scope | None] = _active.get
traced = _Traced()
generation = "0"  # changes with the process's policy, so that compiled code is guarded on it


def _clean(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Validate settings and bring them into one form."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if key not in _DEFAULTS:
            raise ValueError(f"{origin}: unknown setting {key!r}; known: {', '.join(_DEFAULTS)}")
        if key == "on_unsupported":
            if value not in ON_UNSUPPORTED:
                raise ValueError(
                    f"{origin}: on_unsupported must be one of {', '.join(ON_UNSUPPORTED)}, "
                    f"got {value!r}"
                )
            out[key] = value
            continue
        if key == "require_conformance":
            if isinstance(value, bool) or value not in range(9):
                raise ValueError(f"{origin}: {key} must be a level from 0 to 8, got {value!r}")
            out[key] = value
            continue
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, Sequence) or not all(isinstance(i, str) for i in items):
            raise TypeError(f"{origin}: {key} must be names, got {value!r}")
        names = tuple(i.value if isinstance(i, Property) else i.strip() for i in items)
        if key == "backends" and not all(names):
            raise ValueError(f"{origin}: backends holds an empty name: {value!r}")
        known = [p.value for p in Property]
        for name in names if key == "require" else ():
            if name not in known:
                raise ValueError(f"{origin}: require must be of {', '.join(known)}, got {name!r}")
        out[key] = names
    return out


def _layer(level: str, origin: str, values: Any) -> Layer:
    values = _mapping(values, origin, "settings")
    ops = _mapping(values.get("ops", {}), origin, "ops")
    own = {k: v for k, v in values.items() if k != "ops"}
    per_op = {
        name: _clean(_mapping(v, origin, f"ops.{name}"), f"{origin}, op {name}")
        for name, v in ops.items()
    }
    return Layer(level, origin, _clean(own, origin), per_op)


def _mapping(value: Any, origin: str, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{origin}: {key} must map names to settings, got {value!r}")
    return value


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # not TOML, or not UTF-8
        raise ValueError(f"{path}: {error}") from None
    return values


def base() -> tuple[Layer, ...]:
    """Return the layers below configure(); reads environment and opmux.toml once."""
    with _state.lock:
        if _state.base is None:
            layers = [Layer("defaults", "default", _DEFAULTS)]
            explicit = os.environ.get("OPMUX_CONFIG")
            path = Path(explicit or "opmux.toml")
            if explicit or path.is_file():
                values = _read_toml(path)
                origin = str(path.resolve())
                models = _mapping(values.pop("models", {}), origin, "models")
                layers.append(_layer("opmux.toml", origin, values))
                _state.models = {
                    name: _layer("model", f"{origin}, model {name}", v)
                    for name, v in models.items()
                }
            for variable, key in (
                ("OPMUX_BACKENDS", "backends"), ("OPMUX_ON_UNSUPPORTED", "on_unsupported"),
                ("OPMUX_REQUIRE_CONFORMANCE", "require_conformance"),
            ):  # fmt: skip
                text = os.environ.get(variable)
                if text:
                    value: Any = text.split(",") if key == "backends" else text
                    if key == "require_conformance" and text.isdigit():
                        value = int(text)
                    layers.append(_layer("environment", variable, {key: value}))
            _state.base = tuple(layers)
        return _state.base


def _intern(outer: Scope | None, key: Any, layers: Callable[[], Sequence[Layer]]) -> Scope:
    """Return the scope of an outer one with layers on top; the same key gives the same scope."""
    with _state.lock:
        found = _state.scopes.get((outer, key))
        if found is None:
            token = str(len(_state.tokens) + 1)
            found = Scope((*(outer.layers if outer else ()), *layers()), token)
            _state.scopes[outer, key] = _state.tokens[token] = found
        return found


def choice(backend: str | None, token: str | None = None) -> Scope | None:
    """Return what a call follows: the scope in force, or that of a token, and a named backend."""
    current = scope() if token is None else _state.tokens.get(token)
    if backend is None:
        return current
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a name, got {backend!r}")
    return _state.scopes.get((current, backend)) or _intern(
        current, backend, lambda: [_layer("backend=", "backend=", {"backends": [backend]})]
    )


def _layers(chosen: Scope | None) -> list[Layer]:
    layers = list(base())
    if _state.configured:
        layers.append(_state.configured)
    layers += chosen.layers if chosen else ()
    return sorted(layers, key=lambda layer: _LEVELS.index(layer.level))


def effective(chosen: Scope | str | None) -> Callable[[str], Settings]:
    """Return a function from an op's name to its settings under a scope or a named backend."""
    under = choice(chosen) if isinstance(chosen, str) else chosen

    def settings(op: str) -> Settings:
        known = _state.cache.setdefault(under, {})
        if op in known:
            return known[op]
        layers = _layers(under)
        _check_names(layers)
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for layer in layers:
            for source in (layer.values, layer.ops.get(op, {})):
                values.update(source)
                origins.update(dict.fromkeys(source, layer.origin))
        found = Settings(**values, origins=origins)
        known[op] = found
        return found

    return settings


def _check_names(layers: Sequence[Layer]) -> None:
    """Refuse names of backends and ops that nobody knows; a misspelt wish must not be ignored."""
    from opmux import loader, ops
    from opmux.dispatch import unknown
    from opmux.op import OPS

    known = {"*", "reference", *KNOWN, *loader.load().names}
    for layer in layers:
        for op in layer.ops:
            if op not in OPS and op not in ops.families():
                raise ValueError(f"{layer.origin}: {unknown('op', op, {*OPS, *ops.families()})}")
        for source in (layer.values, *layer.ops.values()):
            for name in source.get("backends", ()):
                if name.removeprefix("-") not in known:
                    text = unknown("backend", name.removeprefix("-"), known - {"*"})
                    raise ValueError(f"{layer.origin}: {text}")


def denied_at_load() -> frozenset[str]:
    """Backends that environment or opmux.toml exclude: they are not even imported."""
    values: dict[str, Any] = {}
    for layer in base():
        values.update(layer.values)
    return Settings(**values).denied


def _changed() -> None:
    """Forget every decision and cached policy."""
    global generation
    from opmux.op import OPS

    generation = str(int(generation) + 1)
    _state.cache.clear()
    for op in list(OPS.values()):
        op.table.clear()


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def configure(
    *backends: str,
    on_unsupported: str | None = None,
    require: Sequence[str] | None = None,
    require_conformance: int | None = None,
    ops: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Set the policy of the process; without arguments, remove what was configured.

    Args:
        backends: order and filter, e.g. ``"acme", "*"``.
        on_unsupported: when the preferred kernel refuses a call: ``"next"`` takes the next one,
            ``"reference"`` the reference, ``"raise"`` raises NoKernelError.
        require: properties that a kernel must have, e.g. ``["deterministic"]``.
        require_conformance: the level that a backend's conformance report must reach, 0 to 8.
        ops: settings for single ops: ``{"rmsnorm": {"backends": ["reference"]}}``.

    Raises:
        ValueError: an unknown backend, property or value.
    """
    values = _given(
        backends=backends or None, on_unsupported=on_unsupported, require=require,
        require_conformance=require_conformance, ops=ops,
    )  # fmt: skip
    layer = _layer("configure()", "configure()", values) if values else None
    _check_names([layer] if layer else [])
    with _state.lock:
        if layer and _state.configured:
            old = _state.configured
            layer = Layer(
                layer.level, layer.origin, {**old.values, **layer.values}, {**old.ops, **layer.ops}
            )
        _state.configured = layer
        _changed()


@contextlib.contextmanager
def use(
    *backends: str,
    model: str | None = None,
    on_unsupported: str | None = None,
    require: Sequence[str] | None = None,
    require_conformance: int | None = None,
    ops: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[None]:
    """Set the policy for a block, in this thread or task only; arguments as in configure().

    ``model`` puts the settings of ``[models.NAME]`` in opmux.toml in force.
    """
    values = _given(
        backends=backends or None, on_unsupported=on_unsupported, require=require,
        require_conformance=require_conformance, ops=ops,
    )  # fmt: skip
    layers = [_layer("use()", "use()", values)] if values else []
    base()
    if model is not None:
        if model not in _state.models:
            from opmux.dispatch import unknown

            raise ValueError(f"use(): {unknown('model', model, _state.models)}")
        layers.append(_state.models[model])
    _check_names(layers)
    inner = _intern(scope(), (model, repr(sorted(values.items()))), lambda: layers)
    before = _active.set(inner)
    traced.token = inner.token
    try:
        yield
    finally:
        _active.reset(before)
        outer = scope()
        traced.token = outer.token if outer else ""


def effective_config() -> dict[str, dict[str, Any]]:
    """Return every setting in force here with its value and origin.

    Single ops appear as ``ops.NAME.SETTING``.
    """
    out: dict[str, dict[str, Any]] = {}
    layers = _layers(scope())
    general = effective(scope())("")
    for key in _DEFAULTS:
        out[key] = {"value": getattr(general, key), "origin": general.origins[key]}
    for op in sorted({name for layer in layers for name in layer.ops}):
        special = effective(scope())(op)
        for key in _DEFAULTS:
            if special.origins[key] != general.origins[key] or any(
                key in layer.ops.get(op, {}) for layer in layers
            ):
                out[f"ops.{op}.{key}"] = {
                    "value": getattr(special, key),
                    "origin": special.origins[key],
                }
    return out


def reset() -> None:
    """Forget configure(), environment and opmux.toml; they are read again when needed."""
    with _state.lock:
        _state.base = None
        _state.models = {}
        _state.scopes.clear()  # they hold layers of models from the old opmux.toml
        _state.configured = None
        _changed()

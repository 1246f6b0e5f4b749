# SPDX-License-Identifier: Apache-2.0
"""Load backends so that one bad plugin never hurts the others.

Entry points of group ``opmux.backends``, sorted by (distribution, name) -> static manifest, read
without importing -> deny list -> handshake -> a child process, when the plugin is new here ->
import and hook in a transaction -> commit, or keep the failure. pluggy carries the hook; its own
entry-point loader is not used, because one broken wheel makes it raise half-way.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pluggy
import torch

from opmux import digest, hookspecs, manifest, policy
from opmux.kernel import Backend, Capability, Code, Kernel, Reason

if TYPE_CHECKING:
    from opmux.quarantine import Verdict
    from opmux.record import Record

GROUP = "opmux.backends"


@dataclass(frozen=True)
class Failure:
    """A plugin, or one op of it, that was refused: named in every later "no kernel" error."""

    backend: str
    dist: str
    reason: Reason
    op: str = ""
    detail: str = field(default="", repr=False)

    def __str__(self) -> str:
        """Return ``backend (dist): reason``."""
        op = f", op {self.op}" if self.op else ""
        return f"{self.backend} ({self.dist}{op}): {self.reason}"


@dataclass(eq=False)
class Loaded:
    """A backend in service."""

    backend: Backend
    dist: str
    version: str
    namespace: str
    info: Mapping[str, Any]
    refused: Mapping[str, Reason]
    tried: Verdict | None = None  # how it fared in a child process
    module: str = ""  # of the entry point
    _capabilities: dict[torch.device, Capability] = field(default_factory=dict)
    _overloads: dict[str, Callable[..., Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.backend.name

    @cached_property
    def conformance(self) -> Record:
        """What the backend's conformance report says; read when a policy or a person asks."""
        from opmux import record

        return record.read(self.module, self.backend)

    def capability(self, device: torch.device) -> Capability:
        """Return what the backend's probe says of a device; asked once."""
        if device not in self._capabilities:
            try:
                found = self.backend.probe(device, self.info)
                if not isinstance(found, Capability):
                    raise TypeError(f"probe returned {found!r}, not a Capability")
            except Exception as error:
                sentence = f"its probe raised {type(error).__name__}: {error}"
                found = Capability(refused=Reason(Code.RUNTIME, sentence))
            self._capabilities[device] = found
        return self._capabilities[device]

    def overload(self, symbol: str) -> Callable[..., Any]:
        """Return the torch op of a kernel."""
        if symbol not in self._overloads:
            packet = getattr(getattr(torch.ops, self.namespace), symbol)
            self._overloads[symbol] = packet.default
        return self._overloads[symbol]


@dataclass(frozen=True, eq=False)
class Registry:
    """Everything that was found, in an order that does not depend on installation."""

    backends: tuple[Loaded, ...] = ()
    failures: tuple[Failure, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """Names of all backends, loaded or not."""
        return frozenset({b.name for b in self.backends} | {f.backend for f in self.failures})

    def kernels(self, op: str) -> Iterator[tuple[Loaded, Kernel]]:
        """Yield (backend, kernel) for an op."""
        for loaded in self.backends:
            for name, kernel in loaded.backend.items():
                if name == op:
                    yield loaded, kernel


class RefusedError(Exception):
    """A plugin is not taken into service; ``reason`` says why."""

    def __init__(self, code: Code, sentence: str, remedy: str = "", detail: str = "") -> None:
        super().__init__(sentence)
        self.reason = Reason(code, sentence, remedy)
        self.detail = detail


_lock = threading.RLock()
_registry: Registry | None = None
_loading = False
# A library or schema stays in the process once registered; loading again finds it here.
_native: dict[tuple[str, str], Mapping[str, Any]] = {}
_libraries: dict[str, torch.library.Library] = {}

# A fork in the middle of loading would leave the child with half a registry and a held lock.
os.register_at_fork(
    before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
)


def discover() -> Iterator[importlib.metadata.EntryPoint | Failure]:
    """Yield the entry points of all installed plugins, and what cannot be read.

    Distribution by distribution: ``importlib.metadata.entry_points`` raises for all when the file
    of one is malformed.
    """
    for dist in importlib.metadata.distributions():
        try:
            found = tuple(dist.entry_points.select(group=GROUP))
        except Exception as error:
            name = Path(str(getattr(dist, "_path", "unknown"))).name
            sentence = f"its entry points cannot be read: {_first_line(error)}"
            yield Failure(name, name, Reason(Code.FAILED, sentence, "install it again"))
        else:
            yield from found


def load() -> Registry:
    """Load every installed backend once and return the registry; called by the first op call."""
    global _registry, _loading
    if _registry is not None:
        return _registry
    with _lock:
        if _loading:  # in this thread: the others wait for the lock
            raise RuntimeError("a plugin must not call ops or opmux.load() while it is loaded")
        if _registry is None:
            _loading = True
            try:
                _registry = _load_all(discover())
            finally:
                _loading = False
        return _registry


def failures() -> tuple[Failure, ...]:
    """Return every plugin, or op of a plugin, that was refused, with the reason."""
    return load().failures


def reset() -> None:
    """Forget the registry, so that the next call discovers plugins again. For tests and tools."""
    global _registry
    with _lock:
        _registry = None
        policy.reset()


def _dist(entry: importlib.metadata.EntryPoint) -> tuple[str, str]:
    try:
        dist = entry.dist
        found = (dist.name, dist.version) if dist is not None else ("", "")
    except Exception:  # its METADATA is missing or broken: how that shows depends on the Python
        found = ("", "")
    return found[0] or "unknown", found[1] or "0"


def _load_all(found: Iterable[importlib.metadata.EntryPoint | Failure]) -> Registry:
    from opmux import quarantine

    denied = policy.denied_at_load()
    backends: list[Loaded] = []
    entries: list[importlib.metadata.EntryPoint] = []
    failed: list[Failure] = []
    for item in found:
        failed.append(item) if isinstance(item, Failure) else entries.append(item)
    # A distribution found twice on sys.path is one plugin, not two.
    unique = {(_dist(e)[0], e.name, e.value): e for e in entries}
    wanted = [(dist, entry) for (dist, _, _), entry in sorted(unique.items())]
    tried = quarantine.try_all([e for _, e in wanted if e.name not in denied and _may_load(e)])
    for dist, entry in wanted:
        name = entry.name
        if name in denied:
            reason = Reason(Code.DENIED, "excluded by OPMUX_BACKENDS or opmux.toml, not loaded")
            failed.append(Failure(name, dist, reason))
            continue
        try:
            loaded = _load_one(entry, tried.get((name, entry.value)), backends)
        except RefusedError as refusal:
            failed.append(Failure(name, dist, refusal.reason, detail=refusal.detail))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin may raise what no one would
            reason = Reason(Code.FAILED, f"{type(error).__name__}: {_first_line(error)}")
            failed.append(Failure(name, dist, reason, detail=traceback.format_exc()))
        else:
            backends.append(loaded)
            failed += [Failure(name, dist, why, op) for op, why in loaded.refused.items()]
    return Registry(tuple(backends), tuple(failed))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _may_load(entry: importlib.metadata.EntryPoint) -> bool:
    """Whether a plugin gets past what is read without importing it; loading it says why not."""
    from opmux import __version__

    try:
        check_versions(_read_manifest(entry), __version__, torch.__version__)
    except Exception:
        return False
    return True


def _load_one(
    entry: importlib.metadata.EntryPoint, tried: Verdict | None, before: list[Loaded]
) -> Loaded:
    """Take one plugin through the handshake; raises, and leaves nothing behind, when it fails."""
    from opmux import __version__, process_state, quarantine

    static = _read_manifest(entry)
    check_versions(static, __version__, torch.__version__)
    tried = tried or quarantine.try_out(entry)
    why = tried.reason()
    if why is not None:
        raise RefusedError(why.code, why.sentence, why.remedy, tried.detail)
    if tried.outcome == "ok":
        loaded = take(entry, static, before)
    else:  # no child has seen what loading it changes
        settings = process_state.snapshot()
        try:
            loaded = take(entry, static, before)
        finally:
            changed = "; ".join(process_state.restore(settings))
        if changed:
            for name, kernel in loaded.backend.items():
                _undefine(f"{loaded.namespace}::{kernel.symbol or name}")
            why = quarantine.changes(changed)
            raise RefusedError(why.code, why.sentence, why.remedy)
    loaded.tried = tried
    return loaded


def take(
    entry: importlib.metadata.EntryPoint, static: manifest.Manifest, before: Iterable[Loaded]
) -> Loaded:
    """Import a plugin, load its library and define its ops; the part that can crash."""
    from opmux.op import all_ops

    dist, version = _dist(entry)
    backend = hook(entry)
    _check_backend(entry, static, backend)
    for other in before:
        if other.name == backend.name:
            raise RefusedError(
                Code.INTERFACE,
                f"the name {backend.name!r} is taken by {other.dist}",
                f"uninstall {dist} or {other.dist}",
            )
    core = {name: op.schema_hash for name, op in all_ops().items()}
    refused = refused_ops(static, backend, core)
    why = backend.check_host() if backend.check_host else None
    if why is not None:
        raise RefusedError(why.code, why.sentence, why.remedy)
    namespace = f"opmux_{backend.name}"
    info: Mapping[str, Any] = {}
    if backend.library is not None:
        _check_digest(static, backend.library)
        info = _register_native(backend, namespace, refused)
    if backend.extension:
        _import_extension(static, backend.extension)
    _define(backend, namespace, refused)
    return Loaded(backend, dist, version, namespace, info, refused, module=entry.module)


def hook(entry: importlib.metadata.EntryPoint) -> Backend:
    """Import a plugin and return what its hook says; loads no library and touches no device."""
    plugins = pluggy.PluginManager("opmux")
    plugins.add_hookspecs(hookspecs)
    plugins.register(entry.load(), name=entry.name)
    plugins.check_pending()  # a misspelt hook is an error, not silence
    found = plugins.hook.opmux_backend()
    if len(found) != 1 or not isinstance(found[0], Backend):
        raise RefusedError(
            Code.INTERFACE,
            f"its opmux_backend hook must return one Backend, got {found!r}",
            "implement opmux_backend with @opmux.hookimpl",
        )
    backend: Backend = found[0]
    return backend


def _read_manifest(entry: importlib.metadata.EntryPoint) -> manifest.Manifest:
    try:
        return manifest.find(entry.module)
    except manifest.ManifestError as error:
        raise RefusedError(Code.INTERFACE, str(error), error.remedy) from None


def check_versions(static: manifest.Manifest, opmux: str, torch_version: str) -> None:
    """Refuse a plugin that was not made for this core and this torch."""
    for what, have, (low, below) in (
        ("opmux", opmux, static.opmux), ("torch", torch_version, static.torch),
    ):  # fmt: skip
        version = torch.torch_version.TorchVersion(have)
        if version < low or (below and version >= below):
            wanted = f"{what} >= {low}" + (f", < {below}" if below else "")
            raise RefusedError(
                Code.INTERFACE, f"it needs {wanted}, this is {have}", f'pip install "{wanted}"'
            )


def _check_backend(
    entry: importlib.metadata.EntryPoint, static: manifest.Manifest, backend: Backend
) -> None:
    if not backend.name.isidentifier() or backend.name in ("reference", "core"):
        raise RefusedError(Code.INTERFACE, f"backend name {backend.name!r} is not allowed")
    names = (("entry point", entry.name, backend.name), ("manifest", static.backend, backend.name),
             ("manifest's device", static.device, backend.device))  # fmt: skip
    for what, said, is_ in names:
        if said != is_:
            raise RefusedError(
                Code.INTERFACE, f"the {what} says {said!r}, the backend says {is_!r}"
            )
    claimed, real = set(static.ops), set(backend.kernels)
    if claimed != real:
        differing = ", ".join(sorted(claimed ^ real))
        raise RefusedError(
            Code.INTERFACE,
            f"manifest and backend disagree about ops: {differing}",
            "build the manifest again",
        )
    symbols: set[str] = set()
    for name, kernel in backend.items():
        if not isinstance(kernel, Kernel):
            raise RefusedError(Code.INTERFACE, f"{name}: {kernel!r} is not a Kernel")
        symbol = kernel.symbol or name
        if symbol in symbols or not symbol.isidentifier():
            what = "is the symbol of two kernels" if symbol in symbols else "is no identifier"
            raise RefusedError(Code.INTERFACE, f"{name}: {symbol!r} {what}")
        symbols.add(symbol)
        if kernel.fn is None and backend.library is None:
            raise RefusedError(Code.INTERFACE, f"{name}: neither fn nor library implements it")


def refused_ops(
    static: manifest.Manifest, backend: Backend, core: Mapping[str, str]
) -> dict[str, Reason]:
    """Return the ops whose meaning differs from that of a core, which ``core`` holds as digests."""
    from opmux.dispatch import unknown

    refused = {}
    for name in backend.kernels:
        if name not in core:
            refused[name] = Reason(
                Code.INTERFACE, unknown("op", name, core), "upgrade opmux or the backend"
            )
        elif static.ops[name] != core[name]:
            refused[name] = Reason(
                Code.INTERFACE,
                f"built for interface {static.ops[name]} of {name}, this core has {core[name]}",
                "install matching versions of opmux and the backend",
            )
    return refused


def _check_digest(static: manifest.Manifest, library: Path) -> None:
    if not library.is_file():
        raise RefusedError(
            Code.FAILED, f"library {library.name} is missing", "install the wheel again"
        )
    if digest.sha256(library) != static.sha256:
        raise RefusedError(
            Code.FAILED,
            f"library {library.name} is not the one that its manifest names",
            "install the wheel again",
        )


def _import_extension(static: manifest.Manifest, module: str) -> None:
    """Import the extension module that a backend's callables use, if it is the manifest's."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise RefusedError(
            Code.FAILED,
            f"extension module {module} does not exist",
            f"install the wheel for CPython {platform.python_version()}",
        )
    _check_digest(static, Path(spec.origin))
    importlib.import_module(module)


def _register_native(
    backend: Backend, namespace: str, refused: Mapping[str, Reason]
) -> Mapping[str, Any]:
    """Load the library, compare interfaces, register its kernels; return what it says of the host.

    Nothing runs in the library before its C++ types have been compared with core's schemas.
    """
    import json

    from opmux.op import all_ops

    key = (str(backend.library), namespace)
    if key in _native:
        return _native[key]
    try:
        library = ctypes.CDLL(str(backend.library))
    except OSError as error:
        raise RefusedError(
            Code.FAILED,
            str(error),
            f"torch {torch.__version__} on {platform.machine()} cannot load it",
        ) from None
    for name in ("opmux_interface", "opmux_register", "opmux_info"):
        if not hasattr(library, name):
            raise RefusedError(Code.INTERFACE, f"library {backend.library} does not export {name}")
        getattr(library, name).restype = ctypes.c_char_p
    has = {line.split("(")[0]: line for line in library.opmux_interface().decode().split()}
    ops = all_ops()
    for op_name, kernel in backend.items():
        if kernel.fn is not None or op_name in refused:
            continue
        symbol = kernel.symbol or op_name
        wanted = ops[op_name].interface.replace(op_name, symbol, 1)
        if has.get(symbol) != wanted:
            got = has.get(symbol, "nothing")
            raise RefusedError(
                Code.INTERFACE, f"the library implements {got}, core defines {wanted}"
            )
    library.opmux_register.argtypes = [ctypes.c_char_p]
    error_text = library.opmux_register(namespace.encode())
    if error_text:
        raise RefusedError(Code.RUNTIME, error_text.decode())
    _native[key] = json.loads(library.opmux_info().decode())
    return _native[key]


def _define(backend: Backend, namespace: str, refused: Mapping[str, Reason]) -> None:
    """Define the schemas in the backend's namespace, with fakes, and bind Python callables."""
    from opmux.op import all_ops

    ops = all_ops()
    key = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta"}.get(backend.device, "PrivateUse1")
    made = []
    try:
        for op_name, kernel in backend.items():
            if op_name in refused:
                continue
            symbol = kernel.symbol or op_name
            qualified = f"{namespace}::{symbol}"
            _undefine(qualified)
            _libraries[qualified] = library = torch.library.Library(namespace, "FRAGMENT")
            made.append(qualified)
            library.define(symbol + ops[op_name].schema)
            if kernel.fn is not None:
                fn = _named(kernel.fn) if isinstance(kernel.fn, str) else kernel.fn
                library.impl(symbol, ops[op_name].checked(fn), key)
            torch.library.register_fake(qualified, _fake, lib=library)
    except BaseException:
        for qualified in made:
            _undefine(qualified)
        raise


def _named(name: str) -> Callable[..., Any]:
    """Import the callable that ``"module:attribute"`` names."""
    module, _, attribute = name.partition(":")
    fn = getattr(importlib.import_module(module), attribute)
    if not callable(fn):
        raise TypeError(f"{name} is {fn!r}, not a callable")
    return cast("Callable[..., Any]", fn)


def _undefine(qualified: str) -> None:
    library = _libraries.pop(qualified, None)
    if library is not None:
        library._destroy()


def _fake(*args: Any) -> None:
    """Native ops return nothing: their results are arguments, which the caller allocated.

    One meta tensor among real ones brings a call here too, where silence would be no result.
    """
    devices = {arg.device for arg in args if isinstance(arg, torch.Tensor)}
    if len(devices) > 1:
        raise ValueError(f"tensors must be on one device, got {', '.join(map(str, devices))}")

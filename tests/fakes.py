# SPDX-License-Identifier: Apache-2.0
"""What the registry's tests share: registries without files, isolation, counting kernels."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import opmux
from opmux import loader, policy
from opmux.kernel import Backend, Capability, Kernel
from opmux.op import Op

RAN: list[str] = []
CORE = Path(opmux.__file__).parents[1]


def isolate(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Hide installed plugins, the environment's policy and any opmux.toml."""
    for name in [name for name in os.environ if name.startswith("OPMUX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OPMUX_PROBE", "0")  # a child for each made-up plugin would take a second
    monkeypatch.chdir(folder)
    monkeypatch.setattr(loader, "discover", lambda: ())
    loader.reset()


def recorder(name: str, then: Callable[..., None] | None = None) -> Callable[..., None]:
    """Return a kernel that notes that it ran."""

    def kernel(*args: Any) -> None:
        RAN.append(name)
        if then is not None:
            then(*args)

    return kernel


def silu_and_mul(x: torch.Tensor, out: torch.Tensor) -> None:
    """A right kernel."""
    gate, up = x.float().chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def backend(
    name: str,
    kernels: Mapping[str, Kernel | tuple[Kernel, ...]] | None = None,
    device: str = "cpu",
    probe: Callable[..., Capability] | None = None,
) -> Backend:
    """Return a backend; without kernels, one with a right silu_and_mul that notes its calls."""
    if kernels is None:
        kernels = {"silu_and_mul": Kernel(opmux.FLOATS, fn=recorder(name, silu_and_mul))}
    extra = {"probe": probe} if probe else {}
    return Backend(name, device, kernels, **extra)


def serve(
    *backends: Backend,
    failures: Iterable[loader.Failure] = (),
    dists: Mapping[str, str] | None = None,
) -> tuple[loader.Loaded, ...]:
    """Put backends in service as if they had been found and loaded."""
    found = []
    for b in backends:
        namespace = f"opmux_{b.name}"
        loader._define(b, namespace, {})
        dist = (dists or {}).get(b.name, f"opmux-{b.name}")
        found.append(loader.Loaded(b, dist, "1.0", namespace, {}, {}))
    policy.reset()
    loader._registry = loader.Registry(
        tuple(sorted(found, key=lambda f: (f.dist, f.name))), tuple(failures)
    )
    RAN.clear()
    return loader._registry.backends


@contextlib.contextmanager
def on_path(*folders: Path) -> Iterator[None]:
    """Find the plugins of folders through their real entry points; forget them afterwards."""
    before = set(sys.modules)
    sys.path[:0] = [str(f) for f in folders]
    importlib.invalidate_caches()
    loader.reset()
    try:
        yield
    finally:
        del sys.path[: len(folders)]
        for name in set(sys.modules) - before:
            if name.partition(".")[0].startswith("opmux_"):
                del sys.modules[name]
        loader.reset()


def python(
    code: str, *paths: Path, env: Mapping[str, str] | None = None, timeout: float = 120
) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("OPMUX_")}
    inherited["OPMUX_PROBE"] = "0"
    inherited["PYTHONPATH"] = os.pathsep.join([*map(str, paths), str(CORE)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | dict(env or {}),
        cwd=paths[0] if paths else None,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def good(op: Op) -> dict[str, Any]:
    """Return a small right call by name, with every optional tensor given."""
    best: dict[str, Any] = {}
    least: tuple[Any, ...] = (True, True, 1 << 60)
    for sample in op.draw():
        args, kwargs = sample.make(op.dtypes[0] if op.dtypes else torch.float32)
        names = [p.name for p in op.params]
        call = {p.name: p.default for p in op.params} | dict(zip(names, args, strict=False))
        call |= kwargs
        tensors = [v for v in call.values() if isinstance(v, torch.Tensor)]
        missing = any(call[p.name] is None for p in op.params if p.is_tensor)
        # two columns must be left when a gate has halved them
        small = any(t.shape[0] < 2 or t.shape[-1] < 2 for t in tensors)
        small |= call[op.leading].shape[-1] < 4
        numel = sum(t.numel() for t in tensors)
        # a per-row tensor gives more ways to go wrong than a scalar
        numel -= (1 << 20) * any(
            p.per_row and isinstance(call[p.name], torch.Tensor) for p in op.params
        )
        if call[op.leading].numel() and (missing, small, numel) < least:
            best, least = call, (missing, small, numel)
    assert best, f"{op.name} has no sample that is not empty"
    return best

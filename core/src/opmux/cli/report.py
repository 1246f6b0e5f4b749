# SPDX-License-Identifier: Apache-2.0
"""What the commands show, as plain data."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import torch

import opmux
from opmux import hosts, loader, ops, policy, selection
from opmux.kernel import FLOATS, Code
from opmux.op import Op, all_ops, find
from opmux.samples import TensorSpec


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def matrix() -> dict[str, Any]:
    """Return op x backend -> dtypes, from what the backends claim."""
    registry = loader.load()
    rows = []
    for name, family in ops.families().items():
        served: dict[str, list[str]] = {"reference": ["all"]}
        for loaded, kernel in registry.kernels(name):
            if name not in loaded.refused:
                names = [_short(d) for d in kernel.dtypes]
                served.setdefault(loaded.name, []).extend(names)
        rows.append({"family": family, "op": name, "backends": served})
    rows.sort(key=lambda row: (row["family"], row["op"]))
    return {"backends": [*(b.name for b in registry.backends), "reference"], "ops": rows}


def markdown(data: dict[str, Any]) -> str:
    """Return the matrix as a Markdown table: ``floats`` for float32, bfloat16, float16."""
    floats = {_short(d) for d in FLOATS}
    head = ["family", "op", *data["backends"]]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in data["ops"]:
        cells = []
        for backend in data["backends"]:
            names = row["backends"].get(backend, [])
            rest = [n for n in names if n not in floats]
            cells.append(", ".join((["floats"] if floats <= set(names) else []) + rest) or "-")
        lines.append("| " + " | ".join([row["family"], f"`{row['op']}`", *cells]) + " |")
    return "\n".join(lines)


def what_if(
    name: str,
    dtype: str,
    shape: str | None,
    device: str | None,
    backend: str | None,
    scalars: Sequence[str],
    host: hosts.Host | None = None,
) -> selection.Decision:
    """Evaluate a signature given as text; what is not given comes from the op's first sample."""
    op = find(name)
    wanted = getattr(torch, dtype, None)
    if not isinstance(wanted, torch.dtype):
        raise ValueError(f"unknown dtype {dtype!r}")
    if host is not None:
        where = hosts.device(device or host.device)
    else:
        try:
            where = torch.device(device or "cpu")
        except RuntimeError as error:
            raise ValueError(f"device: {str(error).splitlines()[0]}") from None
    signature = signature_of(op, wanted, where, shape, scalars)
    effective = policy.effective(backend or policy.scope())
    registry = hosts.registry(host) if host is not None else None
    return selection.evaluate(op, signature, effective, registry)


def signature_of(
    op: Op,
    wanted: torch.dtype,
    where: Any,
    shape: str | None = None,
    scalars: Sequence[str] = (),
) -> opmux.Signature:
    """Return a signature of an op; what is not given comes from its first sample."""
    values = _sample_values(op)
    dtypes = tuple(
        (t, wanted if t == op.leading else spec.dtype or wanted)
        for t in op.tensors
        if isinstance(spec := values.get(t), TensorSpec)
    )
    axes = {a: int(values[a]) for a in op.scalars}
    axes["last_dim"] = _last_dim(shape) if shape else values[op.leading].shape[-1]
    for item in scalars:
        key, _, text = item.partition("=")
        if key not in op.scalars:
            raise ValueError(f"{op.name} has no integer argument {key!r}")
        try:
            axes[key] = int(text)
        except ValueError:
            raise ValueError(f"{op.name}: {key} must be an integer, got {text!r}") from None
    return opmux.Signature(op.name, where, dtypes, tuple((a, axes[a]) for a in op.axes))


def elsewhere(plugins: Sequence[tuple[opmux.Backend, str, str]]) -> list[dict[str, Any]]:
    """Return what every op would run on every host of this package, for the default policy."""
    settings = policy.Settings()
    rows = []
    for name, op in all_ops().items():
        row: dict[str, Any] = {"op": name, "hosts": {}}
        for host in map(hosts.load, hosts.names()):
            registry = hosts.registry(host, plugins)
            where = hosts.device(host.device)
            winners: dict[str, list[str]] = {}
            for dtype in op.dtypes or FLOATS:
                signature = signature_of(op, dtype, where)
                found = selection.evaluate(op, signature, lambda _: settings, registry)
                winner = found.winner.name if found.winner else "no kernel"
                winners.setdefault(winner, []).append(_short(dtype))
            row["hosts"][host.name] = winners
        rows.append(row)
    return rows


def _sample_values(op: Op) -> dict[str, Any]:
    sample = op.draw()[0]
    defaults = {p.name: p.default for p in op.params}
    given = dict(zip((p.name for p in op.params), sample.args, strict=False))
    return {**defaults, **given, **sample.kwargs}


def _last_dim(shape: str) -> int:
    sizes = shape.split("x")
    if not all(s.isdigit() for s in sizes):
        raise ValueError(f"shape must look like 4096x28672, got {shape!r}")
    return int(sizes[-1])


def doctor() -> dict[str, Any]:
    """Return host, backends with what their probes found, failures and the policy."""
    registry = loader.load()
    backends = []
    for loaded in registry.backends:
        found = loaded.capability(torch.device(loaded.backend.device))
        facts = {"arch": found.arch, **dict(found.facts)}
        if found.refused:
            facts["refused"] = str(found.refused)
        facts["conformance"] = loaded.conformance.sentence
        facts["first load"] = loaded.tried.describe() if loaded.tried is not None else ""
        backends.append(
            {
                "name": loaded.name,
                "dist": loaded.dist,
                "version": loaded.version,
                "device": loaded.backend.device,
                "ops": len(loaded.backend.kernels) - len(loaded.refused),
                "facts": facts,
            }
        )
    failures = [
        {
            "backend": f.backend,
            "dist": f.dist,
            "op": f.op,
            "code": f.reason.code.value,
            "reason": f.reason.sentence,
            "remedy": f.reason.remedy,
        }
        for f in registry.failures
        if f.reason.code is not Code.ABSENT
    ]
    host = {
        "opmux": opmux.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.version.cuda or torch.version.hip or "this torch is built for the CPU",
    }
    return {
        "host": host,
        "backends": backends,
        "failures": failures,
        "policy": opmux.effective_config(),
    }

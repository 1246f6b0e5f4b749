# SPDX-License-Identifier: Apache-2.0
"""The report of a run: what passed per op and dtype, on which host, with which library."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import opmux
from opmux import loader

FORMAT = 1


class Recorder:
    """Collects outcomes while pytest runs and writes them at the end."""

    def __init__(self, path: Path, backend: str) -> None:
        """Start with nothing."""
        self.path = path
        self.backend = backend
        self.ops: dict[str, dict[str, Counter[str]]] = {}
        self.general: Counter[str] = Counter()
        self.failures: list[dict[str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test once: at its call, or where it ended before."""
        if report.when != "call" and report.passed:
            return
        facts = {str(key): str(value) for key, value in report.user_properties}
        op = facts.get("opmux_op")
        counts = self.general
        if op is not None:
            by_dtype = self.ops.setdefault(op, {})
            counts = by_dtype.setdefault(facts["opmux_dtype"], Counter())
        counts[report.outcome] += 1
        if report.failed:
            text = getattr(getattr(report.longrepr, "reprcrash", None), "message", "")
            # the node id would depend on where pytest was started
            test = f"{Path(report.location[0]).name}::{report.location[2]}"
            self.failures.append({"test": test, "message": text or str(report.longrepr)})

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Write the report."""
        passed = not self.failures and int(exitstatus) == 0
        text = json.dumps({**self.result(), "passed": passed}, indent=2)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(text + "\n", encoding="utf-8")

    def result(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {
            "format": FORMAT,
            "backend": self.backend,
            **_backend(self.backend),
            "versions": {
                "opmux": opmux.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "host": f"{platform.system()} {platform.machine()}",
            "general": dict(self.general),
            "ops": {
                op: {dtype: dict(counts) for dtype, counts in sorted(by_dtype.items())}
                for op, by_dtype in sorted(self.ops.items())
            },
            "failures": self.failures,
        }


def _backend(name: str) -> dict[str, Any]:
    """Return what is known of a backend that is in service."""
    loaded = next((b for b in loader.load().backends if b.name == name), None)
    if loaded is None:
        why = [str(f) for f in loader.failures() if f.backend == name]
        return {"load_failures": why} if why else {}
    capability = loaded.capability(torch.device(loaded.backend.device))
    library = loaded.backend.library
    digest = hashlib.sha256(library.read_bytes()).hexdigest() if library is not None else ""
    return {
        "dist": loaded.dist,
        "version": loaded.version,
        "device": {
            "type": loaded.backend.device,
            "arch": capability.arch,
            "facts": dict(capability.facts),
            "info": dict(loaded.info),
        },
        "library": {"file": library.name, "sha256": digest} if library is not None else None,
    }

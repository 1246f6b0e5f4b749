# SPDX-License-Identifier: Apache-2.0
"""The report of a run: what passed per level, op and dtype, on which host, with which library."""

from __future__ import annotations

import json
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import opmux
from opmux import digest, loader
from opmux.conformance.levels import LEVELS

FORMAT = 2
LEFT_OUT = pytest.StashKey[bool]()  # on tests that the kit itself leaves out


class Recorder:
    """Collects outcomes while pytest runs, writes them at the end and sums them up by level."""

    def __init__(self, config: pytest.Config, backend: str) -> None:
        """Start with nothing."""
        self.path: Path | None = config.getoption("--opmux-report")
        last = config.getoption("--opmux-level")
        self.last = len(LEVELS) - 1 if last is None else int(last)
        self.whole = not config.getoption("--opmux-op")
        self.backend = backend
        self.levels: list[Counter[str]] = [Counter() for _ in LEVELS]
        self.ops: dict[str, dict[str, Counter[str]]] = {}
        self.general: Counter[str] = Counter()
        self.failures: list[dict[str, Any]] = []
        self.passed = False

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        """Note that not everything was run: by ``-k`` and the like, not by the kit itself."""
        if any(not item.stash.get(LEFT_OUT, False) for item in items):
            self.whole = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test once: at its call, or where it ended before."""
        if report.when != "call" and report.passed:
            return
        facts = {str(key): str(value) for key, value in report.user_properties}
        if "opmux_level" not in facts:
            return
        level = int(facts["opmux_level"])
        op = facts.get("opmux_op")
        counts = self.general
        if op is not None:
            by_dtype = self.ops.setdefault(str(op), {})
            counts = by_dtype.setdefault(str(facts["opmux_dtype"]), Counter())
        for counter in (counts, self.levels[level]):
            counter[report.outcome] += 1
        if report.failed:
            text = getattr(getattr(report.longrepr, "reprcrash", None), "message", "")
            # the node id would depend on where pytest was started
            test = f"{Path(report.location[0]).name}::{report.location[2]}"
            message = text or str(report.longrepr)
            self.failures.append({"level": level, "test": test, "message": message})

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write the report."""
        self.passed = not self.failures and int(exitstatus) == 0
        if session.shouldstop or session.shouldfail:
            self.whole = False
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.result(), indent=2)
            self.path.write_text(text + "\n", encoding="utf-8")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Show a line for each level."""
        result = self.result()
        terminalreporter.section(f"conformance of {self.backend}")
        for level, row in result["levels"].items():
            counts = ", ".join(f"{row[k]} {k}" for k in ("passed", "failed", "skipped") if row[k])
            text = f"level {level}  {row['verdict']:<15} {row['name']}"
            terminalreporter.write_line(f"{text} ({counts})" if counts else text)
        reached = result["level"]
        text = "no level" if reached is None else f"level {reached}"
        part = "" if self.whole else ", of the tests that were run"
        terminalreporter.write_line(f"reached: {text}{part}")

    def verdict(self, level: int) -> str:
        """Return how a level ended."""
        counts = self.levels[level]
        if level > self.last:
            return "not run"
        if counts["failed"]:
            return "failed"
        if counts["passed"]:
            return "passed"
        return "skipped" if counts["skipped"] else "nothing to test"

    @property
    def reached(self) -> int | None:
        """The highest level that passed with all below it."""
        found = None
        for level in range(len(LEVELS)):
            verdict = self.verdict(level)
            if verdict not in ("passed", "nothing to test"):
                break
            found = level if verdict == "passed" else found
        return found

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
            "passed": self.passed,
            "level": self.reached,
            "complete": self.whole,
            "levels": {
                str(level): {
                    "name": name,
                    "verdict": self.verdict(level),
                    **{k: self.levels[level][k] for k in ("passed", "failed", "skipped")},
                }
                for level, name in enumerate(LEVELS)
            },
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
    backend = loaded.backend
    known: dict[str, Any] = {"type": backend.device}
    try:
        capability = loaded.capability(torch.device(backend.device))
        known |= {"arch": capability.arch, "facts": dict(capability.facts)}
    except RuntimeError:  # torch does not know the device
        pass
    library = backend.library
    return {
        "dist": loaded.dist,
        "version": loaded.version,
        "package": digest.package(loaded.module),
        "device": {**known, "info": dict(loaded.info)},
        "library": {"file": library.name, "sha256": digest.sha256(library)} if library else None,
    }

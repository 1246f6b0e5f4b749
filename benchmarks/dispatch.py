# SPDX-License-Identifier: Apache-2.0
"""What opmux adds: a call over the chosen torch op, bind(), and the import of core."""

from __future__ import annotations

import statistics
import subprocess
import sys

import torch
from rich.console import Console
from rich.table import Table

import opmux
from common import interleaved, record

_IMPORT = """
import time, torch
start = time.perf_counter()
import opmux
print(time.perf_counter() - start)
assert not [m for m in sys.modules if m.startswith("opmux_")], "a backend was imported"
"""


def import_seconds(runs: int = 7) -> float:
    """Return the median seconds that ``import opmux`` adds to ``import torch``."""
    command = [sys.executable, "-c", "import sys" + _IMPORT]
    taken = []
    for _ in range(runs):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        taken.append(float(done.stdout))
    return statistics.median(taken)


def main() -> None:
    """Measure, print and record."""
    torch.set_num_threads(1)
    x, out = torch.randn(1, 16), torch.empty(1, 8)
    decision = opmux.silu_and_mul.explain(x, out)
    direct = decision.call
    bound = opmux.silu_and_mul.bind(x, out)
    with torch.no_grad():
        seconds = interleaved(
            {
                "torch op, called directly": lambda: direct(x, out),
                "opmux.silu_and_mul(x, out=out)": lambda: opmux.silu_and_mul(x, out=out),
                "opmux.silu_and_mul.bind(x, out)": lambda: bound(x, out),
            },
            rounds=41,
            at_least=0.02,
        )
    base = seconds["torch op, called directly"]
    table = Table("call", "ns", "over the torch op, ns", "bar, ns", title=str(decision.signature))
    bars = {"opmux.silu_and_mul(x, out=out)": 500, "opmux.silu_and_mul.bind(x, out)": 100}
    figures = []
    for name, value in seconds.items():
        added = (value - base) * 1e9
        figures.append(
            {"call": name, "ns": value * 1e9, "added_ns": added, "bar_ns": bars.get(name)}
        )
        table.add_row(name, f"{value * 1e9:.0f}", f"{added:.0f}", str(bars.get(name, "")))
    added = import_seconds() * 1e9
    figures.append({"call": "import opmux", "ns": added, "added_ns": added, "bar_ns": 20e6})
    table.add_row("import opmux after import torch", f"{added:.0f}", f"{added:.0f}", "20000000")
    Console().print(table)
    print(f"recorded in {record('dispatch', figures).name}; kernel {decision.winner}")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Show registers and spills of every CUDA kernel from the log of a build.

Build with ``CMAKE_ARGS=-DOPMUX_CUDA_RESOURCES=ON``, then ``python tools/gpu_resources.py
build/setup.log``: a line for each op and arch, one for each kernel that spills. Fails above LIMIT.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

LIMIT = 64  # bytes of spill stores: a few registers outside of loops are no loss


class Usage(NamedTuple):
    """What ptxas says of one kernel."""

    arch: str
    kernel: str
    registers: int
    spilled: int  # bytes


def usages(log: str) -> dict[str, list[Usage]]:
    """Return what the log says of each source, the last time that it was compiled."""
    found: dict[str, list[Usage]] = {}
    source = arch = kernel = ""
    spilled = 0
    for line in log.splitlines():
        if match := re.search(r"\] nvcc (\S+)", line):
            source = match[1]  # ninja prints a command's output after its name
            found[source] = []
        elif match := re.search(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", line):
            kernel, arch = match.groups()
        elif match := re.search(r"(\d+) bytes spill stores", line):
            spilled = int(match[1])
        elif kernel and (match := re.search(r"Used (\d+) registers", line)):
            found[source].append(Usage(arch, kernel, int(match[1]), spilled))
            kernel = ""
    return found


def main() -> None:
    """Print the tables."""
    found = usages(Path(sys.argv[1]).read_text(encoding="utf-8", errors="replace"))
    kernels = [usage for source in found.values() for usage in source]
    if not kernels:
        sys.exit("the log has no output of ptxas -v: build with -DOPMUX_CUDA_RESOURCES=ON")
    for source, used in sorted(found.items()):
        for arch in sorted({u.arch for u in used}):
            some = [u for u in used if u.arch == arch]
            low, high = min(u.registers for u in some), max(u.registers for u in some)
            spilling = sum(u.spilled > 0 for u in some)
            print(f"{source:<52} sm_{arch:<5}{len(some):4} kernels, {low:3} to {high:3} registers"
                  + (f", {spilling} spill" if spilling else ""))  # fmt: skip
    for usage in sorted(kernels, key=lambda u: -u.spilled):
        if usage.spilled:
            print(f"spills {usage.spilled} bytes: sm_{usage.arch} {usage.kernel}")
    worst = max(u.spilled for u in kernels)
    print(f"{len(kernels)} kernels, at most {worst} bytes spilled")
    sys.exit(1 if worst > LIMIT else 0)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Write the table of torch's C symbols: which release of torch exported each one first.

Read from the very libraries of the torches in build/abi, which ``make abi-matrix`` installs.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from abi_matrix import CELLS
from opmux.abi import elf

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "core/src/opmux/abi/torch_symbols.json"
LIBRARIES = {"libtorch_cpu.so": "cpu", "libtorch_cuda.so": "cuda", "libtorch_python.so": "python"}
# The C shim. Other C names in these libraries belong to what torch links in.
SHIM = re.compile(r"(aoti|torch)_[a-z0-9_]+")


def exports(torch: str, python: str) -> dict[str, set[str]]:
    """Return the shim's symbols of one torch by library."""
    home = ROOT / f"build/abi/torch-{torch}-py{python}"
    (folder,) = home.glob("lib/python*/site-packages/torch/lib")
    return {
        short: {s for s in elf.read(folder / name).defined if SHIM.fullmatch(s)}
        for name, short in LIBRARIES.items()
        if (folder / name).exists()
    }


def main() -> None:
    """Read every torch, oldest first, and write what each one added."""
    since: dict[str, dict[str, list[str]]] = {}
    known: set[str] = set()
    last: dict[str, set[str]] = {}
    for torch, python in sorted(CELLS):
        found = exports(torch, python)
        for library, names in found.items():
            gone = last.get(library, set()) - names
            if gone:
                sys.exit(f"torch {torch} has lost {', '.join(sorted(gone))}")
        last |= found
        added = {library: sorted(names - known) for library, names in found.items()}
        since[".".join(torch.split(".")[:2])] = {k: v for k, v in added.items() if v}
        known |= set().union(*found.values())
    TABLE.write_text(json.dumps(since, indent=1) + "\n", encoding="utf-8")
    print(f"{len(known)} symbols of {len(CELLS)} torches in {TABLE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The ops, one definition file each: ``ops/<family>/<op>.py`` defines ``<op>``, nothing else.

Files are found by name, so adding an op touches no list.
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opmux.op import Op


@cache
def families() -> dict[str, str]:
    """Return op name -> family, from the file names, importing nothing."""
    here = Path(__file__).parent
    files = sorted(p for p in here.glob("*/*.py") if not p.stem.startswith("_"))
    return {path.stem: path.parent.name for path in files}


def get(name: str) -> Op:
    """Import one definition and return its op."""
    module = importlib.import_module(f"opmux.ops.{families()[name]}.{name}")
    op: Op = getattr(module, name)
    return op


def load_all() -> dict[str, Op]:
    """Import every definition; return op name -> op."""
    return {name: get(name) for name in families()}

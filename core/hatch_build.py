# SPDX-License-Identifier: Apache-2.0
"""Ships the headers and CMake functions for backends in C++: docs/adr/0008."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PARTS = (
    "cmake",
    "include",
    "gpu/vendors/torch_cuda.h",
    "gpu/vendors/torch_guard.h",
)


class NativeFiles(BuildHookInterface[Any]):
    """Adds ``native/`` to the sdist and ``opmux/native/`` to the wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Take the files from the sdist, or from the checkout that this is."""
        if version == "editable":  # opmux.manifest finds them in the checkout
            return
        root = Path(self.root)
        packed = root / "native"
        source = packed if packed.is_dir() else root.parent / "backends" / "common"
        target = "native" if self.target_name == "sdist" else "opmux/native"
        for part in PARTS:
            build_data["force_include"][str(source / part)] = f"{target}/{part}"

# SPDX-License-Identifier: Apache-2.0
"""Other libraries, loaded out of their published wheels: which of them, and why not.

sglang-kernel 0.4.6 and 0.4.2 register the same namespace, so each world is a process of its own,
with opmux measured in it too; a ratio is always taken within one process.

The folder (or archive) of the peers, all out of published wheels, is laid out so:

    vllm/_C_stable_libtorch.abi3.so, vllm/_moe_C_stable_libtorch.abi3.so
    sglang-0.4.6/sgl_kernel/*.py and sm90/common_ops.abi3.so, sglang-0.4.2/ alike
    flashinfer/flashinfer, flashinfer/tvm_ffi; what its JIT would build, as data/aot/NAME/NAME.so
    liger/liger_kernel

Device code of other architectures may be zeroed in the libraries, which then compress well.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

# label of a case's peer -> name of the library, by world
WORLDS: dict[str, dict[str, str]] = {
    "vllm": {"vllm": "vllm", "sglang": "sglang 0.4.6", "torch": "torch", "liger": "liger"},
    # sglang's wrappers hand over to FlashInfer where they find it: they are imported before it.
    "flashinfer": {"sglang": "sglang 0.4.2", "flashinfer": "flashinfer"},
    "compile": {"compile": "torch.compile"},
}
VERSIONS = {
    "vllm": "0.25.1", "sglang 0.4.6": "0.4.6", "sglang 0.4.2": "0.4.2", "flashinfer": "0.6.13",
    "liger": "0.8.5", "torch": torch.__version__, "torch.compile": torch.__version__,
}  # fmt: skip
INCUMBENT = ("sglang 0.4.6", "sglang 0.4.2")


def _vllm(root: Path) -> None:
    for name in ("_C_stable_libtorch", "_moe_C_stable_libtorch"):
        torch.ops.load_library(str(root / "vllm" / f"{name}.abi3.so"))


def _sglang(root: Path) -> None:
    """Load the ops, and make the wrappers importable without the package's __init__."""
    folder = root / "sgl_kernel"
    torch.ops.load_library(str(folder / "sm90" / "common_ops.abi3.so"))
    package = ModuleType("sgl_kernel")
    package.__path__ = [str(folder)]
    sys.modules["sgl_kernel"] = package
    for name in ("elementwise", "sampling", "moe", "gemm", "attention", "grammar"):
        importlib.import_module(f"sgl_kernel.{name}")


def _flashinfer(root: Path) -> None:
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    os.environ.setdefault("FLASHINFER_DISABLE_VERSION_CHECK", "1")
    os.environ.setdefault("FLASHINFER_WORKSPACE_BASE", tempfile.mkdtemp(prefix="flashinfer-"))
    sys.path.append(str(root / "flashinfer"))
    importlib.import_module("flashinfer")


def _liger(root: Path) -> None:
    sys.path.append(str(root / "liger"))
    importlib.import_module("liger_kernel.ops.rms_norm")


def load(world: str, root: Path | None) -> tuple[dict[str, str], dict[str, str]]:
    """Load a world's libraries; return its peers by label, and why others are not there."""
    loaded, missing = {}, {}
    for label, library in WORLDS[world].items():
        try:
            if library not in ("torch", "torch.compile"):
                if root is None:
                    raise FileNotFoundError("no --peers-dir was given")
                if label == "sglang":
                    _sglang(root / library.replace(" ", "-"))
                else:
                    {"vllm": _vllm, "flashinfer": _flashinfer, "liger": _liger}[label](root)
            loaded[label] = library
        except Exception as error:
            missing[library] = f"{type(error).__name__}: {error}".splitlines()[0]
    return loaded, missing


def sgl(module: str) -> Any:
    """Return a module of the published wrappers of sglang-kernel."""
    return importlib.import_module(f"sgl_kernel.{module}")


def fi(module: str) -> Any:
    """Return a module of FlashInfer."""
    return importlib.import_module(f"flashinfer.{module}")


def liger(module: str) -> Any:
    """Return a module of liger-kernel's ops."""
    return importlib.import_module(f"liger_kernel.ops.{module}")


def registered(world: str) -> Iterable[str]:
    """Yield the schemas that the loaded libraries registered."""
    spaces = {"vllm": ("_C::", "_moe_C::", "_C_cache_ops::", "sgl_kernel::")}
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith(spaces.get(world, ("sgl_kernel::",))):
            yield str(schema)


_compiled: dict[Any, Any] = {}


def compiled(function: Any) -> Any:
    """Return the function under torch.compile, for static shapes."""
    if function not in _compiled:
        _compiled[function] = torch.compile(function, dynamic=False)
    return _compiled[function]


def forget_compiled() -> None:
    """Start anew, so that no case meets the limit of recompilations."""
    _compiled.clear()
    torch.compiler.reset()

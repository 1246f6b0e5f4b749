# SPDX-License-Identifier: Apache-2.0
"""What a host must have: a CUDA build of torch, a driver, a GPU that the kernels are built for."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from opmux import Capability, Code, Reason


def _toolkit() -> str:
    """Return the CUDA version that the library was built with."""
    text = Path(__file__).with_name("build.json").read_text(encoding="utf-8")
    return str(json.loads(text)["toolkit"])


def _driver_version() -> int | None:
    """Return the CUDA version that the driver supports, such as 13000; None without a driver.

    Initialises nothing: a process that has initialised CUDA cannot use it in a forked child.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0


def check_host() -> Reason | None:
    """Say why this host cannot load the library."""
    if torch.version.hip:
        return Reason(
            Code.RUNTIME,
            f"this torch is a ROCm build ({torch.version.hip}), the kernels are for CUDA",
            "use the backend rocm, or install a CUDA build of torch",
        )
    if not torch.version.cuda:
        return Reason(
            Code.RUNTIME,
            f"torch {torch.__version__} was built without CUDA",
            "install a CUDA build of torch",
        )
    major = _toolkit().split(".")[0]
    if torch.version.cuda.split(".")[0] != major:
        return Reason(
            Code.RUNTIME,
            f"this torch is built for CUDA {torch.version.cuda}, the kernels for CUDA {major}",
            f"install a torch for CUDA {major}, or an opmux-cuda built with the toolkit of torch",
        )
    driver = _driver_version()
    if driver is None:
        return Reason(
            Code.RUNTIME,
            "no NVIDIA driver is installed: libcuda.so.1 was not found",
            "install the driver; in a container, start it with access to the GPU",
        )
    if driver < int(major) * 1000:
        return Reason(
            Code.RUNTIME,
            f"the driver supports CUDA {driver // 1000}.{driver % 1000 // 10}, the kernels need "
            f"{major}.0",
            "install a newer driver",
        )
    return None


def runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether code for an arch, such as ``80``, ``90a`` or ``120-virtual``, runs on a GPU.

    Machine code runs within its major version from its minor version on, with suffix ``a`` on
    exactly its own; PTX is compiled for everything later.
    """
    digits = arch.removesuffix("-virtual").rstrip("af")
    built = (int(digits[:-1]), int(digits[-1]))
    specific = arch.removesuffix("-virtual")[len(digits) :]
    if specific == "a":
        return built == (major, minor)
    if arch.endswith("-virtual") and not specific:
        return built <= (major, minor)
    return built[0] == major and built[1] <= minor


def probe(device: torch.device, info: Mapping[str, Any]) -> Capability:
    """Report the GPU's generation; refuse one that the kernels were not built for."""
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    archs = str(info["archs"]).split(";")
    facts = (("gpu", name), ("built for", ", ".join(archs)), ("toolkit", str(info["toolkit"])))
    arch = f"sm{major}{minor}"
    if any(runs_on(built, major, minor) for built in archs):
        return Capability(arch=arch, facts=facts)
    sentence = (
        f"{name} has compute capability {major}.{minor}, the kernels were built for "
        f"{', '.join(archs)}"
    )
    remedy = f"build opmux-cuda with OPMUX_CUDA_ARCHS={major}{minor}"
    if (major, minor) < (8, 0):
        remedy = "GPUs before compute capability 8.0 are not supported"
    return Capability(arch=arch, facts=facts, refused=Reason(Code.ARCH, sentence, remedy))

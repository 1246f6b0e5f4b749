# SPDX-License-Identifier: Apache-2.0
"""What a host must have: a CUDA build of torch, a driver, a GPU that the kernels are built for."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from opmux import Capability, Code, Reason

OLDEST = (8, 0)  # compute capability


def _toolkit() -> str:
    """Return the CUDA version that the library was built with."""
    text = Path(__file__).with_name("build.json").read_text(encoding="utf-8")
    return str(json.loads(text)["toolkit"])


def _driver_version() -> int | Reason:
    """Return the CUDA version that the driver supports, such as 13000, or what is wrong with it.

    Initialises nothing: a process that has initialised CUDA cannot use it in a forked child.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Reason(
            Code.RUNTIME,
            "no NVIDIA driver is installed: libcuda.so.1 was not found",
            "install the driver; in a container, start it with access to the GPU",
        )
    version = ctypes.c_int(0)
    error = driver.cuDriverGetVersion(ctypes.byref(version))
    if error or not version.value:  # as the toolkit's stub library answers
        return Reason(
            Code.RUNTIME,
            f"libcuda.so.1 is not a working driver: cuDriverGetVersion gave error {error}",
            "install the driver, and keep the toolkit's stubs out of LD_LIBRARY_PATH",
        )
    return version.value


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


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
    if isinstance(driver, Reason):
        return driver
    # 12.4: what unpacks device code that was compressed for size
    needed = max(int(major) * 1000, 12040)
    if driver < needed:
        return Reason(
            Code.RUNTIME,
            f"the driver supports CUDA {_dotted(driver)}, the kernels need {_dotted(needed)}",
            f"install a driver for CUDA {_dotted(needed)} or later",
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


def _refusal(name: str, major: int, minor: int, archs: list[str]) -> Reason | None:
    """Say why a GPU cannot run the kernels."""
    serving = [built for built in archs if runs_on(built, major, minor)]
    if any(not built.endswith("-virtual") for built in serving):
        return None
    if serving:  # the driver compiles the PTX, if it is not older than what wrote it
        driver, toolkit = _driver_version(), _toolkit()
        high, low = toolkit.split(".")
        if isinstance(driver, Reason) or driver >= int(high) * 1000 + int(low) * 10:
            return None
        return Reason(
            Code.RUNTIME,
            f"{name} needs the PTX of CUDA {toolkit} compiled, the driver supports CUDA "
            f"{_dotted(driver)}",
            f"install a driver for CUDA {toolkit} or later, or build opmux-cuda with "
            f"OPMUX_CUDA_ARCHS={major}{minor}",
        )
    remedy = f"build opmux-cuda with OPMUX_CUDA_ARCHS={major}{minor}"
    if (major, minor) < OLDEST:
        remedy = "GPUs before compute capability 8.0 are not supported: use the reference"
    return Reason(
        Code.ARCH,
        f"{name} has compute capability {major}.{minor}, the kernels were built for "
        f"{', '.join(archs)}",
        remedy,
    )


def probe(device: torch.device, info: Mapping[str, Any]) -> Capability:
    """Report a GPU's generation; refuse one that the kernels were not built for.

    Each GPU of a host is asked for itself. Without an index the current one answers, and the facts
    name the others.
    """
    archs = str(info["archs"]).split(",")
    try:
        count = torch.cuda.device_count()
        if not count:
            return Capability(refused=_no_gpu())
        gpus = range(count) if device.index is None else (device.index,)
        found = {i: (torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i))
                 for i in gpus}  # fmt: skip
        here = torch.cuda.current_device() if device.index is None else device.index
    except (RuntimeError, AssertionError) as error:
        return Capability(refused=_not_usable(error))
    name, (major, minor) = found.pop(here)
    facts = [("gpu", name), ("built for", ", ".join(archs)), ("toolkit", str(info["toolkit"]))]
    for index, (other, capability) in found.items():
        verdict = "not served" if _refusal(other, *capability, archs) else "served"
        facts.append((f"cuda:{index}", f"{other}, sm{capability[0]}{capability[1]}, {verdict}"))
    return Capability(f"sm{major}{minor}", tuple(facts), _refusal(name, major, minor, archs))


def _no_gpu() -> Reason:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        sentence, remedy = "the driver reports no GPU", "check nvidia-smi"
    else:
        sentence = f"no GPU is visible: CUDA_VISIBLE_DEVICES is {visible!r}"
        remedy = "unset it, or name a GPU"
    return Reason(Code.RUNTIME, sentence, remedy)


def _not_usable(error: BaseException) -> Reason:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    remedy = "check nvidia-smi, and that torch.ones(1, device='cuda') works"
    if "fork" in str(error):
        remedy = "start worker processes with the method spawn, or fork before CUDA is used"
    return Reason(Code.RUNTIME, f"CUDA cannot be used: {first}", remedy)

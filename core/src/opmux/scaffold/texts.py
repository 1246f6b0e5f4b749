# SPDX-License-Identifier: Apache-2.0
"""What stands in the templates for ``@NAME@`` and the like, by device and binding."""

from __future__ import annotations

from opmux import manifest

# What users of a PrivateUse1 device see until its torch extension renames it.
_DEVICES = {"privateuse1": "privateuseone"}
_KEYS = {"cpu": "CPU", "cuda": "CUDA", "privateuse1": "PrivateUse1"}
_MEMORY = """
// It runs on memory that the host can read and write. A device with memory of its own replaces the
// loop by a launch on torch's current stream."""
_FILES = {
    "python": ["`src/{package}/calls.py` | the kernels, in PyTorch"],
    "triton": ["`src/{package}/calls.py` | the kernels, in Triton, and their launches"],
    "pybind11": [
        "`csrc/` | the kernels on pointers, and their pybind11 module",
        "`src/{package}/calls.py` | from the arguments of an op to pointers and sizes",
        "`CMakeLists.txt` | the build; the manifest is written by opmux",
    ],
    "stable-abi": [
        "`csrc/` | the kernels, over the LibTorch stable ABI: one library for every torch >= 2.10",
        "`CMakeLists.txt` | the build, with the functions and headers that opmux ships",
    ],
}
_ADD = {
    "python": "A function in `calls.py`, a line in `kernels.py`, then\n"
    "`python -m opmux.manifest --package src/{package}`, which writes the manifest again.\n",
    "pybind11": "A function in `csrc/` and in its module, one in `calls.py`, a line in "
    "`kernels.py`.\nThe build writes the manifest.\n",
    "stable-abi": "A file in `csrc/` with `OPMUX_OP(name, function)` at its end and a line in "
    "`kernels.py`.\nThe build writes the manifest.\n",
}
_ADD["triton"] = _ADD["python"]
_ALL = """\
The kernel serves CPU tensors, so everything above runs on any machine, the numbers of every claimed
dtype included."""
_PLAIN = """\
On a machine without such a device: the build, import, manifest, gates and refusals, and, as the
kernel {why}, its numbers on CPU tensors (`tests/test_numerics.py`).
**Nothing has run on a device of this kind** before you run the kit there; without the device, the
kit skips what needs it, and says so."""
_LIBRARY = """\
On a machine without such a device: the build{compiler}, import, manifest, gates, refusals,
and that the library loads and implements the op's interface. **The kernel itself has not run**:
that needs the device; without it, the kit skips what needs it, and says so."""


def runs_on_cpu_tensors(device: str, binding: str) -> bool:
    """Whether the project tests its kernel on CPU tensors, without the kit."""
    if device == "cpu" or binding == "stable-abi":
        return False
    return not (device == "cuda" and binding == "pybind11")


def _ran(device: str, binding: str) -> str:
    if device == "cpu":
        return _ALL
    if runs_on_cpu_tensors(device, binding):
        why = {
            "python": "is plain PyTorch",
            "triton": "runs in Triton's interpreter where Triton is installed",
            "pybind11": "takes plain pointers",
        }[binding]
        return _PLAIN.format(why=why)
    return _LIBRARY.format(compiler=" by nvcc" if device == "cuda" else "")


def _native(name: str, package: str, binding: str) -> str:
    if binding == "stable-abi":
        return f'\n        library=Path(__file__).with_name("_opmux_{name}.so"),'
    if binding == "pybind11":
        return f'\n        extension="{package}._native",'
    return ""


def values(name: str, device: str, binding: str) -> dict[str, str]:
    """Return placeholder -> text."""
    package = f"opmux_{name}"
    (low, below), (torch_low, _) = manifest.OPMUX, manifest.TORCH
    needs = [f"opmux>={low},<{below}", f"torch>={torch_low}"]
    build = ["scikit-build-core>=1.0", *(["pybind11>=3"] if binding == "pybind11" else [])]
    triton = binding == "triton"
    interpreted = (
        "\n# In the interpreter: set before Triton is imported.\n"
        'os.environ.setdefault("TRITON_INTERPRET", "1")\n'
        "pytestmark = pytest.mark.skipif(\n"
        '    importlib.util.find_spec("triton") is None, reason="Triton is not installed"\n)\n'
    )
    files = ["`src/{package}/kernels.py` | which ops, for which dtypes, shapes and layouts"]
    return {
        "NAME": name,
        "PACKAGE": package,
        "DIST": package.replace("_", "-"),
        "KIND": device,
        "DEVICE": _DEVICES.get(device, device),
        "BINDING": binding,
        "KEY": _KEYS[device],
        "FN": "" if binding == "stable-abi" else f', fn="{package}.calls:silu_and_mul"',
        "NATIVE": _native(name, package, binding),
        "PATH_IMPORT": "from pathlib import Path\n\n" if binding == "stable-abi" else "",
        "DEPENDENCIES": ", ".join(f'"{n}"' for n in [*needs, *(["triton>=3"] if triton else [])]),
        "REQUIRES": ", ".join(f'"{n}"' for n in [*build, *needs]),
        "PY_API": 'wheel.py-api = "py3" # no CPython API inside: one wheel for every version\n'
        if binding == "stable-abi"
        else "",
        "MEMORY": _MEMORY if device == "privateuse1" else "",
        "IMPORTS": "import importlib.util\nimport os\n" if triton else "",
        # clang-format joins what fits one line
        "BREAK": "\n  " if device == "privateuse1" else " ",
        "END": "\n}" if device == "privateuse1" else " }",
        "SKIP": interpreted if triton else "",
        "FILES": "\n".join(f"| {f} |" for f in [*files, *_FILES[binding]]).format(package=package),
        "ADD": _ADD[binding].format(package=package),
        "RAN": _ran(device, binding),
    }

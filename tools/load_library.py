# SPDX-License-Identifier: Apache-2.0
"""Check the library of an installed backend beside the installed torch; needs no device.

``python tools/load_library.py cuda`` loads it, compares what its C++ types say with core's schemas,
registers its kernels, and asks torch for each of them. That no host gate stands in the way is not
asked: the last line says what this host lacks to run them.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import sys

import torch

from opmux import Backend, manifest
from opmux.op import find

KEYS = {"cpu": "CPU", "cuda": "CUDA", "musa": "PrivateUse1"}


def check(backend: Backend, static: manifest.Manifest) -> list[str]:
    """Return the names of the ops that the library registered."""
    assert backend.library is not None
    digest = hashlib.sha256(backend.library.read_bytes()).hexdigest()
    assert digest == static.sha256, "the library is not the one that its manifest names"
    assert set(static.ops) == set(backend.kernels), "manifest and kernels.py disagree about ops"
    library = ctypes.CDLL(str(backend.library))
    for name in ("opmux_interface", "opmux_register", "opmux_info"):
        getattr(library, name).restype = ctypes.c_char_p
    has = {line.split("(")[0]: line for line in library.opmux_interface().decode().split()}
    native = {k.symbol or op: find(op) for op, k in backend.items() if k.fn is None}
    namespace = f"opmux_check_{backend.name}"
    definitions = torch.library.Library(namespace, "DEF")
    for symbol, op in native.items():
        wanted = op.interface.replace(op.name, symbol, 1)
        assert has.get(symbol) == wanted, f"library: {has.get(symbol)}, core: {wanted}"
        assert static.ops[op.name] == op.schema_hash, f"{op.name}: built for another interface"
        definitions.define(symbol + op.schema)
    assert set(has) == set(native), f"nobody claims {sorted(set(has) - set(native))}"
    error = library.opmux_register(namespace.encode())
    assert error is None, error
    for symbol in native:
        name, key = f"{namespace}::{symbol}", KEYS[backend.device]
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), f"{name} has no {key}"
    json.loads(library.opmux_info().decode())
    return sorted(native)


def main() -> None:
    """Check one backend and print what was found."""
    name = sys.argv[1]
    package = importlib.import_module(f"opmux_{name}")
    backend: Backend = package.opmux_backend()
    done = check(backend, manifest.find(f"opmux_{name}"))
    print(f"{len(done)} kernels loaded, agreed and registered on torch {torch.__version__}")
    refused = backend.check_host() if backend.check_host else None
    print(f"this host: {refused or 'can run them'}")


if __name__ == "__main__":
    main()

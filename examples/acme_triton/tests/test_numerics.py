# SPDX-License-Identifier: Apache-2.0
"""The kernels against the definitions in Triton's interpreter, on CPU tensors: no GPU is needed.

On a GPU, the conformance kit tests them: pytest --pyargs opmux.conformance --opmux-backend
acme_triton.
"""

from __future__ import annotations

import importlib
import importlib.util
import os

import pytest
import torch

import opmux
from opmux.conformance.cases import arguments
from opmux_acme_triton.kernels import KERNELS

# Set before Triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_it_matches_the_definition(name: str) -> None:
    op, kernel = opmux.op.find(name), KERNELS[name]
    module, _, attribute = str(kernel.fn).partition(":")
    fn = getattr(importlib.import_module(module), attribute)
    for dtype in kernel.dtypes:
        for sample in op.draw():
            values = arguments(op, sample, dtype).values()
            wanted = op(*values, backend="reference")
            out = torch.full_like(wanted, float("nan"))
            fn(*values, out)
            op.tolerance.check(f"{name} {sample}", out, wanted)

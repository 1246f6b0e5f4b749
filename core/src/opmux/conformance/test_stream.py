# SPDX-License-Identifier: Apache-2.0
"""What only accelerators have: streams, and graphs that capture launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opmux.conformance import calls
from opmux.conformance.cases import Case, expected
from opmux.conformance.test_numerics import serve
from opmux.kernel import Property


def on_gpu(case: Case) -> None:
    """Skip elsewhere than on a device that torch drives through torch.cuda (ROCm is one too)."""
    device = case.claim.target.device
    if device != "cuda":
        pytest.skip(f"device {device} has neither streams nor graphs here")


def test_runs_on_the_current_stream(op_case: Case) -> None:
    """A launch waits for what its stream does before it, and for nothing else."""
    on_gpu(op_case)
    serve(op_case)
    call = calls.prepare(op_case)
    run = calls.runner(op_case.claim, call)
    late = calls.prepare(op_case)
    inputs = [n for n in call.buffers if n not in op_case.claim.op.outs]
    for name in inputs:
        call.buffers[name].buffer.zero_()
    cuda: Any = torch.cuda
    side = cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        cuda._sleep(20_000_000)  # some milliseconds: a launch elsewhere would read zeros
        for name in inputs:
            call.buffers[name].buffer.copy_(late.buffers[name].buffer, non_blocking=True)
        run(*call.args, *call.outs)
    side.synchronize()
    calls.compare(op_case.claim.op, call.results(), expected(op_case, "plain")[1])


def test_a_graph_captures_it(one_case: Case) -> None:
    """Captured once, replayed on new values: no synchronisation, no allocation outside the pool."""
    on_gpu(one_case)
    serve(one_case)
    if Property.GRAPH_CAPTURABLE not in one_case.claim.kernel.properties:
        pytest.skip("the kernel does not claim to be capturable")
    call, fresh = calls.prepare(one_case), calls.prepare(one_case)
    run = calls.runner(one_case.claim, call)
    cuda: Any = torch.cuda
    side = cuda.Stream()
    with torch.cuda.stream(side):
        run(*call.args, *call.outs)  # first calls may load modules, which capture forbids
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(*call.args, *call.outs)
    for name, buffer in call.buffers.items():
        buffer.buffer.copy_(fresh.buffers[name].buffer)
    call.remember()
    graph.replay()
    torch.cuda.synchronize()
    call.check_guards()
    calls.compare(one_case.claim.op, call.results(), expected(one_case, "plain")[1])

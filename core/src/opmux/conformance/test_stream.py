# SPDX-License-Identifier: Apache-2.0
"""What only accelerators have: streams, graphs that capture launches, several devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opmux.conformance import calls
from opmux.conformance.cases import Case, expected
from opmux.conformance.test_numerics import serve

pytestmark = pytest.mark.opmux_level(5)


@pytest.mark.opmux_needs("streams")
def test_runs_on_the_current_stream(op_case: Case) -> None:
    """A launch waits for what its stream does before it, and for nothing else."""
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


@pytest.mark.opmux_needs("streams", "graph_capturable")
def test_a_graph_captures_it(one_case: Case) -> None:
    """Captured once, replayed on new values: no synchronisation, no allocation outside the pool."""
    serve(one_case)
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


@pytest.mark.opmux_needs("two devices")
def test_runs_on_the_device_of_its_tensors(op_case: Case) -> None:
    """Also when another device is the current one, which stays so."""
    serve(op_case)
    values, results = expected(op_case, "plain")
    call = calls.Prepared(op_case.claim.op, values, results, device="cuda:1")
    with torch.cuda.device(0):
        calls.run_claimed(op_case.claim, call)
        assert torch.cuda.current_device() == 0, "the kernel changed the current device"
        torch.cuda.synchronize(1)
    call.check_guards()
    calls.compare(op_case.claim.op, call.results(), results)

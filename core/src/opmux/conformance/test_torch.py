# SPDX-License-Identifier: Apache-2.0
"""Kernels as torch ops: the schema tells the truth, and compiled code holds the kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from opmux.conformance import calls
from opmux.conformance.cases import Case
from opmux.conformance.test_numerics import serve

pytestmark = [
    pytest.mark.opmux_level(6),
    # torch's own, while it traces
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
TOKENS = (1, 2, 3)  # times the sample's, all traced as more than one
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.opmux_needs("a backend")
def test_schema_and_fake_hold(op_case: Case) -> None:
    """torch.library.opcheck: what the schema says is written is written, and nothing else."""
    serve(op_case)
    loaded = op_case.claim.target.loaded
    if loaded is None:
        pytest.skip("the reference is no torch op")
    overload: Any = loaded.overload(op_case.claim.symbol)
    call = calls.prepare(_without_fp8(op_case))
    for out in call.outs:
        out.zero_()  # the poison is NaN, which never equals itself
    torch.library.opcheck(overload, tuple(call.native()), test_utils=CHECKS)
    _fake_keeps_shapes(overload, call)


@pytest.mark.opmux_needs("compile")
def test_compiles_without_recompiling(op_case: Case) -> None:
    """Three token counts, one graph break nowhere: a static graph, then a dynamic one."""
    serve(op_case)
    graphs: list[torch.fx.GraphModule] = []
    compiled = torch.compile(_public(op_case), fullgraph=True, backend=_recorder(graphs))
    for times in TOKENS:
        call = calls.grown(op_case, times)
        wanted = calls.grown(op_case, times)
        calls.runner(op_case.claim, wanted)(*wanted.args, *wanted.outs)
        results = compiled(*call.args)
        call.check_guards()
        got = {**call.results(), **dict(zip(op_case.claim.op.outs, results, strict=True))}
        calls.compare(op_case.claim.op, got, wanted.results())  # bits are another level's
    assert len(graphs) <= 2, f"{len(graphs)} graphs for {len(TOKENS)} token counts"
    for graph in graphs:
        _holds(op_case, graph)


@pytest.mark.opmux_needs("compile")
def test_exports(op_case: Case) -> None:
    """torch.export takes the kernel along."""
    serve(op_case)
    public = _public(op_case)

    class Module(torch.nn.Module):
        def forward(self, *args: Any) -> Any:
            return public(*args)

    call = calls.prepare(op_case)
    program = torch.export.export(Module(), tuple(call.args))
    _holds(op_case, program.graph_module)


def _fake_keeps_shapes(overload: Callable[..., Any], call: calls.Prepared) -> None:
    """Raise where the fake leaves a tensor in another shape than the kernel does.

    opcheck compares what an op returns; these return nothing, their results are arguments.
    """
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in call.native()]
        overload(*fakes)
    names = [name for name, _, _ in call.op.native]
    for name, real, fake in zip(names, call.native(), fakes, strict=True):
        if isinstance(real, Tensor):
            there, here = (tuple(fake.shape), fake.stride()), (tuple(real.shape), real.stride())
            assert there == here, f"{name}: the fake makes it {there}, the kernel {here}"


def _without_fp8(case: Case) -> Case:
    """Return the op's served case without fp8 tensors that is nearest in size, if it has one.

    opcheck compares tensors by allclose, whose product torch lacks for fp8 on CUDA. A schema holds
    for every dtype, and test_numerics guards what an op must not write for the fp8 samples too.
    """

    def fits(other: Case) -> bool:
        tensors = [v for v in calls.prepare(other).values.values() if isinstance(v, Tensor)]
        return calls.served(other) and all(t.dtype not in FP8 for t in tensors)

    if fits(case):
        return case
    others = [other for other in case.claim.cases() if not other.empty and fits(other)]
    return min(others, key=lambda other: abs(other.size - case.size), default=case)


def _public(case: Case) -> Callable[..., tuple[Tensor, ...]]:
    op, name = case.claim.op, case.claim.target.name

    def call(*args: Any) -> tuple[Tensor, ...]:
        result = op(*args, backend=name)
        return result if isinstance(result, tuple) else (result,) if op.outs else ()

    return call


def _recorder(graphs: list[torch.fx.GraphModule]) -> Callable[..., Any]:
    from torch._dynamo import lookup_backend

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    return backend


def _holds(case: Case, graph: torch.fx.GraphModule) -> None:
    """Raise unless a traced graph calls the backend's torch op."""
    loaded = case.claim.target.loaded
    if loaded is None:
        return
    wanted = f"{loaded.namespace}.{case.claim.symbol}"
    # functionalised graphs hold the op as an argument of auto_functionalized
    named = [str(node.target) for node in graph.graph.nodes]
    named += [str(arg) for node in graph.graph.nodes for arg in node.args]
    assert any(wanted in text for text in named), f"{wanted} is not in the graph:\n{graph.graph}"

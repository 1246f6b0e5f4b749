# SPDX-License-Identifier: Apache-2.0
"""Kernels as torch ops: the schema tells the truth, and compiled code holds the kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from opmux.conformance import calls
from opmux.conformance.buffers import bits
from opmux.conformance.cases import Case
from opmux.conformance.test_numerics import serve
from opmux.kernel import Property

pytestmark = [
    # torch's own, while it traces
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
TOKENS = (1, 2, 3)  # times the sample's, all traced as more than one


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_schema_and_fake_hold(op_case: Case) -> None:
    """torch.library.opcheck: what the schema says is written is written, and nothing else."""
    serve(op_case)
    loaded = op_case.claim.target.loaded
    if loaded is None:
        pytest.skip("the reference is no torch op")
    overload: Any = loaded.overload(op_case.claim.symbol)
    call = calls.prepare(op_case)
    for out in call.outs:
        out.zero_()  # the poison is NaN, which never equals itself
    torch.library.opcheck(overload, tuple(call.native()), test_utils=CHECKS)


def test_compiles_without_recompiling(op_case: Case) -> None:
    """Three token counts, one graph break nowhere: a static graph, then a dynamic one."""
    serve(op_case)
    if Property.COMPILE not in op_case.claim.kernel.properties:
        pytest.skip("the kernel does not claim to compile")
    graphs: list[torch.fx.GraphModule] = []
    compiled = torch.compile(_public(op_case), fullgraph=True, backend=_recorder(graphs))
    for times in TOKENS:
        call = calls.grown(op_case, times)
        wanted = calls.grown(op_case, times)
        calls.runner(op_case.claim, wanted)(*wanted.args, *wanted.outs)
        results = compiled(*call.args)
        call.check_guards()
        got = {**call.results(), **dict(zip(op_case.claim.op.outs, results, strict=True))}
        for name, value in wanted.results().items():
            assert torch.equal(bits(got[name]), bits(value)), f"{times} times, {name}"
    assert len(graphs) <= 2, f"{len(graphs)} graphs for {len(TOKENS)} token counts"
    for graph in graphs:
        _holds(op_case, graph)


def test_exports(op_case: Case) -> None:
    """torch.export takes the kernel along."""
    serve(op_case)
    if Property.COMPILE not in op_case.claim.kernel.properties:
        pytest.skip("the kernel does not claim to compile")
    public = _public(op_case)

    class Module(torch.nn.Module):
        def forward(self, *args: Any) -> Any:
            return public(*args)

    call = calls.prepare(op_case)
    program = torch.export.export(Module(), tuple(call.args))
    _holds(op_case, program.graph_module)


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

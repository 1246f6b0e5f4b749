# SPDX-License-Identifier: Apache-2.0
"""torch.compile and torch.export trace through the dispatch to the chosen kernel."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fakes
import opmux
from opmux import loader
from opmux.kernel import Backend, Kernel
from opmux.op import all_ops

OPS = sorted(all_ops())
Graphs = list[torch.fx.GraphModule]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    fakes.isolate(monkeypatch, tmp_path)
    torch._dynamo.reset()
    yield
    loader.reset()
    torch._dynamo.reset()


def compiled(function: Callable[..., Any]) -> tuple[Callable[..., Any], Graphs]:
    """Return the function compiled without graph breaks, and its graphs as they come."""
    graphs: Graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    return torch.compile(function, backend=backend, fullgraph=True), graphs


def gate(x: Tensor) -> Tensor:
    return opmux.silu_and_mul(x)


def targets(graph: torch.fx.GraphModule) -> set[str]:
    return {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}


def fresh(call: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in call.items()}


def tensors(*values: Any) -> list[Tensor]:
    flat = [v for x in values for v in (x if isinstance(x, tuple) else (x,))]
    return [v for v in flat if isinstance(v, Tensor)]


def copies(name: str) -> Callable[..., None]:
    """Return a kernel of a third party for an op: its definition, as a Python callable."""
    op = all_ops()[name]

    def kernel(*args: Any) -> None:
        fakes.RAN.append(name)
        op.reference(*args)

    return kernel


@pytest.mark.parametrize("who", ["reference", "acme"])
@pytest.mark.parametrize("name", OPS)
def test_every_op(name: str, who: str) -> None:
    """One graph without a break; results and updates in place are those of the eager call."""
    op = all_ops()[name]
    if who == "acme":
        kernel = Kernel(op.dtypes or (torch.float32,), fn=copies(name))
        fakes.serve(Backend("acme", "cpu", {name: kernel}))
    function = getattr(opmux, name)
    call = fakes.good(op)
    eager, traced = fresh(call), fresh(call)
    expected = function(**eager)
    fast, graphs = compiled(lambda kwargs: function(**kwargs))
    fakes.RAN.clear()
    actual = fast(traced)
    assert len(graphs) == 1
    assert (f"opmux_acme.{name}.default" in targets(graphs[0])) == (who == "acme")
    assert fakes.RAN == ([name] if who == "acme" else [])
    for a, b in zip(
        tensors(actual, *traced.values()), tensors(expected, *eager.values()), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def _dynamic() -> dict[str, tuple[Callable[..., Any], Callable[[int], tuple[Any, ...]]]]:
    weight = torch.ones(64)
    cache, store = torch.randn(16, 8), torch.zeros(32, 2, 8)

    def heads(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 2, 8), torch.randn(n, 2, 8)

    return {
        "silu_and_mul": (gate, lambda n: (torch.randn(n, 64),)),
        "rmsnorm": (lambda x: opmux.rmsnorm(x, weight), lambda n: (torch.randn(n, 64),)),
        "fused_add_rmsnorm": (
            lambda x, r: (opmux.fused_add_rmsnorm(x, r, weight), x, r)[1:],
            lambda n: (torch.randn(n, 64), torch.randn(n, 64)),
        ),
        "rotary_embedding": (
            lambda p, q, k: (opmux.rotary_embedding(p, q, k, 8, cache), q, k)[1:],
            lambda n: (torch.arange(n) % 16, *heads(n)),
        ),
        "store_kv_cache": (
            lambda s, k, v: (opmux.store_kv_cache(store, store.clone(), s, k, v), k)[1:],
            lambda n: (torch.arange(n), *heads(n)),
        ),
        "min_p_sample": (
            lambda p, u: opmux.min_p_sample(p, 0.1, u),
            lambda n: (torch.rand(n, 50), torch.rand(n)),
        ),
    }


@pytest.mark.parametrize("who", ["reference", "acme"])
@pytest.mark.parametrize("name", sorted(_dynamic()))
def test_token_counts(name: str, who: str) -> None:
    """Any number of tokens is served by two graphs at most, one static and one dynamic."""
    if who == "acme":
        fakes.serve(Backend("acme", "cpu", {name: Kernel(opmux.FLOATS, fn=copies(name))}))
    function, make = _dynamic()[name]
    fast, graphs = compiled(function)
    for tokens in (3, 5, 8, 13, 21):
        args = make(tokens)
        again = tuple(a.clone() for a in args)
        for a, b in zip(tensors(fast(*args)), tensors(function(*again)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert len(graphs) <= 2


def test_inductor() -> None:
    """The compiler that users have by default; an op in the middle of other work."""
    fakes.serve(fakes.backend("acme"))

    def layer(x: Tensor) -> Tensor:
        return opmux.silu_and_mul(x * 2) + 1

    x = torch.randn(4, 64)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))
    assert "acme" in fakes.RAN


def test_first_call_of_the_process_inside_compile(tmp_path: Path) -> None:
    """Loading plugins, real ones, happens while tracing."""
    import plugins
    from test_loader import plugin

    code = plugin("name='acme'")
    plugins.make_plugin(tmp_path, code=code, manifest=plugins.manifest_for("acme"))
    said = fakes.python(
        "import torch, opmux\n"
        "f = torch.compile(lambda x: opmux.silu_and_mul(x, backend='acme'), "
        "backend='aot_eager', fullgraph=True)\n"
        "x = torch.randn(3, 8)\n"
        "print(torch.equal(f(x), opmux.silu_and_mul(x, backend='acme')))\n"
        "print([b.name for b in opmux.load().backends if b.name == 'acme'])\n",
        tmp_path,
    )
    assert said.splitlines() == ["True", "['acme']"]


def test_a_changed_policy_recompiles() -> None:
    """configure() and use() reach compiled code, and a scope that was seen costs no new graph."""
    fakes.serve(fakes.backend("acme"), fakes.backend("beta"))
    fast, graphs = compiled(gate)
    x = torch.randn(3, 8)

    def ran() -> list[str]:
        fakes.RAN.clear()
        fast(x)
        return list(fakes.RAN)

    assert ran() == ["acme"]
    with opmux.use("beta"):
        assert ran() == ["beta"]
        with opmux.use("reference"):
            assert ran() == []
        assert ran() == ["beta"]
    assert ran() == ["acme"]
    with opmux.use("beta"):
        assert ran() == ["beta"]
    assert len(graphs) == 3
    opmux.configure("beta", "*")
    assert ran() == ["beta"]
    with opmux.use(on_unsupported="raise"):
        opmux.configure("acme", "*")
    assert ran() == ["acme"]  # what was configured inside the block holds behind it
    opmux.configure()


def test_named_backend_in_compiled_code() -> None:
    fakes.serve(fakes.backend("acme"), fakes.backend("beta"))
    fast, graphs = compiled(lambda x: opmux.silu_and_mul(x, backend="beta"))
    fast(torch.randn(3, 8))
    assert fakes.RAN == ["beta"]
    assert "opmux_beta.silu_and_mul.default" in targets(graphs[0])


def test_a_scope_in_another_thread_leaves_compiled_code_alone() -> None:
    """What one thread compiles inside use() must not answer for another thread."""
    fakes.serve(fakes.backend("acme"), fakes.backend("beta"))
    fast, _ = compiled(gate)
    x = torch.randn(3, 8)
    seen: dict[str, list[str]] = {}
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with opmux.use("beta"):
            inside.set()
            done.wait(60)
            fakes.RAN.clear()
            fast(x)
            seen["other"] = list(fakes.RAN)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(20)
    fast(x)
    assert fakes.RAN == ["acme"]
    done.set()
    thread.join(120)
    assert seen == {"other": ["beta"]}
    fakes.RAN.clear()
    fast(x)
    assert fakes.RAN == ["acme"]


def test_layout_and_shape_are_seen_while_tracing() -> None:
    """Kernels that look at shapes or layouts are chosen in the graph as in eager mode."""
    fn = fakes.recorder("acme", fakes.silu_and_mul)
    dense = Kernel(opmux.FLOATS, opmux.last_dim_multiple_of(8), layout="contiguous", fn=fn)
    fakes.serve(fakes.backend("acme", {"silu_and_mul": dense}), fakes.backend("beta"))
    for x in (torch.randn(3, 8), torch.randn(3, 6), torch.randn(3, 16)[:, :8]):
        winner = opmux.silu_and_mul.explain(x).winner.name
        fast, _ = compiled(gate)
        fakes.RAN.clear()
        fast(x)
        assert fakes.RAN == [winner]
        torch._dynamo.reset()


@pytest.mark.parametrize("who", ["reference", "acme"])
def test_wrong_calls_name_the_op_while_tracing(who: str) -> None:
    """torch wraps the error; its text is ours."""
    fakes.serve(fakes.backend("acme"))
    fast, _ = compiled(lambda x, b: opmux.silu_and_mul(x, backend=b))
    with pytest.raises(Exception, match=r"dtype of x must be one of .*got int32"):
        fast(torch.ones(2, 8, dtype=torch.int32), who)
    with pytest.raises(Exception, match="last dimension of x must be even"):
        fast(torch.ones(2, 7), who)
    with pytest.raises(Exception, match="unknown backend 'acm'; did you mean acme"):
        fast(torch.ones(2, 8), "acm")


class Layer(torch.nn.Module):
    """Out of place and in place in one."""

    def forward(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Norm, then gate."""
        x, residual = x.clone(), residual.clone()
        opmux.fused_add_rmsnorm(x, residual, weight)
        return opmux.silu_and_mul(x), residual


@pytest.mark.parametrize("who", ["reference", "acme"])
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool, who: str) -> None:
    """Both kinds of torch.export, with a dynamic number of tokens."""
    if who == "acme":
        kernels = {
            name: Kernel(opmux.FLOATS, fn=copies(name))
            for name in ("silu_and_mul", "fused_add_rmsnorm")
        }
        fakes.serve(Backend("acme", "cpu", kernels))
    tokens = torch.export.Dim("tokens", min=2, max=512)
    args = (torch.randn(4, 8), torch.randn(4, 8), torch.ones(8))
    shapes = ({0: tokens}, {0: tokens}, None)
    program = torch.export.export(Layer(), args, dynamic_shapes=shapes, strict=strict)
    if who == "acme":
        assert "opmux_acme.silu_and_mul" in str(program.graph)
        assert "opmux_acme.fused_add_rmsnorm" in str(program.graph)
    for n in (4, 9):
        args = (torch.randn(n, 8), torch.randn(n, 8), torch.ones(8))
        for a, b in zip(program.module()(*args), Layer()(*args), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_functionalised_updates_reach_the_caller() -> None:
    """Views of one buffer, updated in place inside the graph: the buffer must hold it."""
    name = "fused_add_rmsnorm"
    fakes.serve(Backend("acme", "cpu", {name: Kernel(opmux.FLOATS, fn=copies(name))}))

    def step(buffer: Tensor, weight: Tensor) -> Tensor:
        opmux.fused_add_rmsnorm(buffer[0], buffer[1], weight)
        opmux.fused_add_rmsnorm(buffer[1], buffer[2], weight)
        return buffer.sum()

    buffer = torch.randn(3, 4, 8)
    expected = buffer.clone()
    total = step(expected, torch.ones(8))
    fast, graphs = compiled(step)
    torch.testing.assert_close(fast(buffer, torch.ones(8)), total, rtol=0, atol=0)
    torch.testing.assert_close(buffer, expected, rtol=0, atol=0)
    assert len(graphs) == 1


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("who", ["reference", "acme"])
def test_modes_without_gradients(mode: Any, who: str) -> None:
    fakes.serve(fakes.backend("acme"))
    with mode():
        x = torch.randn(3, 8)
        fast, _ = compiled(lambda x: opmux.silu_and_mul(x, backend=who))
        assert torch.equal(fast(x), opmux.silu_and_mul(x, backend=who))
        opmux.fused_add_rmsnorm(x, x.clone(), torch.ones(8))
    assert fakes.RAN == ([] if who == "reference" else ["acme", "acme"])


def test_first_use_in_a_thread() -> None:
    """An op that a thread is the first to call, eager and compiled."""
    results: list[Tensor] = []

    def work() -> None:
        fast, _ = compiled(lambda x: opmux.gelu_quick(x) + 0)
        results.extend([fast(torch.ones(2, 4)), opmux.gelu_quick(torch.ones(2, 4))])

    loader.reset()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(120)
    assert len(results) == 2
    assert torch.equal(*results)

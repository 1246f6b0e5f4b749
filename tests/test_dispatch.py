# SPDX-License-Identifier: Apache-2.0
"""bind(), explain(), the warning about a slow reference, and errors from inside kernels."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fakes
import opmux
from opmux import loader, selection
from opmux.kernel import Backend, Kernel

X = torch.randn(3, 8)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    fakes.isolate(monkeypatch, tmp_path)
    monkeypatch.setattr(selection, "_warned", set())
    yield
    loader.reset()


def serve(name: str = "acme", **kernel: Any) -> None:
    fn = fakes.recorder(name, kernel.pop("then", fakes.silu_and_mul))
    fields = {"dtypes": opmux.FLOATS, "fn": fn} | kernel
    fakes.serve(fakes.backend(name, {"silu_and_mul": Kernel(**fields)}), fakes.backend("zeta"))


# ---- bind ----


def test_bind_runs_what_was_chosen() -> None:
    serve()
    call = opmux.silu_and_mul.bind(X)
    fakes.RAN.clear()
    out = torch.empty(3, 4)
    assert torch.equal(call(X), opmux.silu_and_mul(X, backend="reference"))
    assert call(X, out) is out
    assert call(torch.randn(7, 8)).shape == (7, 4)  # another number of tokens
    assert call.__name__ == "silu_and_mul"
    assert fakes.RAN == ["acme"] * 3


def test_bind_keeps_its_choice() -> None:
    """Later policies do not reach it, and its own policy does not outlive its choice."""
    serve()
    with opmux.use("zeta"):
        call = opmux.silu_and_mul.bind(X)
    named = opmux.silu_and_mul.bind(X, backend="reference")
    opmux.configure("acme")
    fakes.RAN.clear()
    call(X)
    named(X)
    assert fakes.RAN == ["zeta"]


@pytest.mark.parametrize(
    ("kernel", "other", "sentence"),
    [
        ({"dtypes": (torch.float32,)}, X.half(), "dtype: float16 is not one of float32"),
        ({"rejects": opmux.last_dim_multiple_of(8)}, X[:, :6], "shape: last dimension 6 is not"),
        ({"layout": "contiguous"}, torch.randn(3, 16)[:, :8], "layout: a tensor is not contig"),
        ({}, X.to("meta"), "device: tensor is on meta, this backend serves cpu"),
    ],
)
def test_bind_refuses_what_the_kernel_cannot_run(
    kernel: dict[str, Any], other: Tensor, sentence: str
) -> None:
    """Another dtype, shape, layout or device: a sentence, nothing runs, nothing is written."""
    serve(**kernel)
    call = opmux.silu_and_mul.bind(X)
    out = other.new_full((3, other.shape[-1] // 2), 7)
    fakes.RAN.clear()
    for _ in range(2):
        message = rf"no kernel for silu_and_mul.*bound to acme: {sentence}"
        with pytest.raises(opmux.NoKernelError, match=message):
            call(other, out)
    assert fakes.RAN == []
    assert other.is_meta or bool((out == 7).all())
    call(X)
    assert fakes.RAN == ["acme"]


def test_bind_refuses_wrong_calls() -> None:
    serve()
    call = opmux.silu_and_mul.bind(X)
    with pytest.raises(ValueError, match="silu_and_mul: out must have shape"):
        call(X, torch.empty(3, 5))
    with pytest.raises(TypeError, match="silu_and_mul: x must be a Tensor, got None"):
        call(None)
    with pytest.raises(ValueError, match="last dimension of x must be even"):
        opmux.silu_and_mul.bind(torch.randn(3, 7))
    with opmux.use("acme"), pytest.raises(opmux.NoKernelError):
        opmux.rmsnorm.bind(X, torch.ones(8))


def test_bind_in_place() -> None:
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.ones(8)
    expected = [x.clone(), residual.clone()]
    opmux.fused_add_rmsnorm(*expected, weight)
    call = opmux.fused_add_rmsnorm.bind(x, residual, weight)
    assert call(x, residual, weight) is None
    assert torch.equal(x, expected[0])
    assert torch.equal(residual, expected[1])


# ---- explain ----


def test_explain_is_text_and_json() -> None:
    """The same facts in both; JSON holds plain values only."""
    serve(dtypes=(torch.float16,))
    with opmux.use("acme", "*"):
        decision = opmux.silu_and_mul.explain(X)
    data = json.loads(json.dumps(decision.to_dict()))
    assert data["op"] == "silu_and_mul"
    assert data["winner"] == "zeta"
    assert data["signature"] == "silu_and_mul(float32, last_dim=8 on cpu)"
    assert data["settings"]["backends"] == {"value": ["acme", "*"], "origin": "use()"}
    assert data["settings"]["on_unsupported"]["origin"] == "default"
    rows = {c["backend"]: c for c in data["candidates"]}
    assert rows["acme"]["accepted"] is False
    assert rows["acme"]["code"] == "dtype"
    assert rows["acme"]["remedy"]
    assert rows["zeta"] == {
        "backend": "zeta",
        "dist": "opmux-zeta",
        "kernel": "zeta",
        "accepted": True,
        "code": None,
        "reason": "accepted: tier portable",
        "remedy": "",
    }
    text = str(decision)
    assert text.startswith("silu_and_mul(float32, last_dim=8 on cpu) -> zeta: acme refused (dtype")
    assert all(c["reason"] in text for c in data["candidates"])
    assert fakes.RAN == []


def test_explain_without_a_winner_does_not_raise() -> None:
    serve(dtypes=(torch.float16,))
    decision = opmux.silu_and_mul.explain(X, backend="acme")
    assert decision.winner is None
    assert str(decision).startswith("no kernel for silu_and_mul(float32, last_dim=8 on cpu)")
    assert decision.to_dict()["winner"] is None
    with pytest.raises(LookupError):
        _ = decision.call
    with pytest.raises(opmux.NoKernelError) as caught:
        opmux.silu_and_mul(X, backend="acme")
    assert caught.value.decision.winner is None


def test_a_decision_is_a_function_of_the_signature() -> None:
    """Values and token counts change nothing; the op's constants are part of it."""
    serve()
    seen = {str(opmux.silu_and_mul.explain(torch.randn(n, 8))) for n in (1, 2, 500)}
    assert len(seen) == 1
    query, table = torch.randn(2, 16), torch.randn(4, 8)
    text = str(opmux.rotary_embedding.explain(torch.arange(2), query, None, 8, table).signature)
    assert text == "rotary_embedding(float32, last_dim=16, head_dim=8, is_neox=True on cpu)"


# ---- the reference ----


def test_no_wheel_runs_the_reference_silently() -> None:
    """On the CPU and on meta; nothing is installed, so there is nothing to warn about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert opmux.load().backends == ()
        assert opmux.silu_and_mul(X).shape == (3, 4)
        made = opmux.silu_and_mul(X.to("meta"))
    assert (made.device.type, tuple(made.shape)) == ("meta", (3, 4))


def _decided_on(device: str, *order: str) -> selection.Decision:
    """Return the decision of a call, as if its tensors were on an accelerator."""
    with opmux.use(*order or ("*",)):
        decision = opmux.silu_and_mul.explain(X, backend=None if order else "reference")
    signature = replace(decision.signature, device=torch.device(device))
    settings = replace(decision.settings, backends=order or ("*",))
    return replace(decision, signature=signature, settings=settings)


def test_the_reference_on_an_accelerator_warns_once() -> None:
    """Once for each op and device type, with the reasons of the others."""
    decision = _decided_on("cuda")
    with pytest.warns(RuntimeWarning, match="silu_and_mul runs its reference on cuda, which is sl"):
        selection.warn_reference(decision)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selection.warn_reference(decision)
        selection.warn_reference(_decided_on("cpu"))
        selection.warn_reference(_decided_on("xpu", "reference"))  # as the user wished
    with pytest.warns(RuntimeWarning, match="on xpu"):
        selection.warn_reference(_decided_on("xpu"))


# ---- errors from inside a kernel ----


def _raising(error: BaseException) -> Callable[..., None]:
    def kernel(*_: Any) -> None:
        raise error

    return kernel


@pytest.mark.parametrize("bound", [False, True])
def test_a_failing_kernel_is_named(bound: bool) -> None:
    """The error says op, backend and signature, and keeps its cause; no other kernel is tried."""
    serve(then=_raising(RuntimeError("launch failed")))
    call = opmux.silu_and_mul.bind(X) if bound else opmux.silu_and_mul
    opmux.configure("acme", "*")
    if bound:
        opmux.configure("reference")
    message = r"silu_and_mul: backend acme failed on silu_and_mul\(float32.*launch failed"
    with pytest.raises(RuntimeError, match=message) as caught:
        call(X)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert not isinstance(caught.value, opmux.NoKernelError)
    assert fakes.RAN == ["acme"]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("out of memory"), MemoryError("none left"), KeyboardInterrupt(),
     OSError("gone"), ZeroDivisionError("division")],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_other_errors_keep_their_type(error: BaseException) -> None:
    """Callers catch out-of-memory errors by their type."""
    serve(then=_raising(error))
    with pytest.raises(type(error)) as caught:
        opmux.silu_and_mul(X)
    assert type(caught.value) is type(error)
    assert str(error) in str(caught.value)


def test_a_failing_reference_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = torch.ones(2, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="fused_add_rmsnorm: backend reference failed on"):
        opmux.fused_add_rmsnorm(frozen, torch.ones(2, 8), torch.ones(8))


def test_the_users_mistake_comes_before_the_kernels_complaint() -> None:
    """A kernel's own short check is replaced by the sentence that the definition makes."""

    def strict(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        raise RuntimeError("rmsnorm: tensors must have one dtype")

    fakes.serve(Backend("acme", "cpu", {"rmsnorm": Kernel(opmux.FLOATS, fn=strict)}))
    with pytest.raises(TypeError, match="rmsnorm: weight must have the dtype of x"):
        opmux.rmsnorm(X, torch.ones(8).half(), backend="acme")
    # a wrong call is at fault, whatever kernels there are
    with pytest.raises(TypeError, match="rmsnorm: weight must have the dtype of x"):
        opmux.rmsnorm(X, torch.ones(8).half(), backend="cpu_amx")


def test_gradients_flow_through_the_reference() -> None:
    """Without a wheel, a model still trains."""
    x = torch.randn(3, 8, requires_grad=True)
    opmux.silu_and_mul(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.abs().sum() > 0)

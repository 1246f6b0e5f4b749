# SPDX-License-Identifier: Apache-2.0
"""One evaluator: what explain() says is what runs, whatever is installed, asked and configured."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fakes
import opmux
import plugins
from opmux import loader, policy, selection
from opmux.kernel import Backend, Capability, Code, Kernel, Property, Reason, Tier

NAMES = ("acme", "beta", "core2", "zeta")
ASKED = (*NAMES, "reference", "cpu_amx")
STABLE = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    fakes.isolate(monkeypatch, tmp_path)
    yield
    loader.reset()


# ---- what is drawn ----


def _raises(_: object) -> str:
    raise KeyError("axis")


PREDICATES: dict[str, Any] = {
    "none": None,
    "by 4": opmux.last_dim_multiple_of(4),
    "never": lambda _: "never",
    "raises": _raises,
    "bool": lambda _: True,
    "empty": lambda _: "",
}


def _raising_probe(*_: object) -> Capability:
    raise OSError("no such device")


PROBES: dict[str, Any] = {
    "v1": lambda *_: Capability("v1"),
    "v2": lambda *_: Capability("v2"),
    "refuses": lambda *_: Capability(refused=Reason(Code.RUNTIME, "driver too old")),
    "raises": _raising_probe,
    "wrong": lambda *_: "v1",
}

# Every gate passes more often than not: a kernel has many, and both sides of each matter.
kernels = st.builds(
    dict,
    dtypes=st.sampled_from([opmux.FLOATS, opmux.FLOATS, opmux.FLOATS[:2], opmux.FLOATS[1:]]),
    rejects=st.sampled_from(["none"] * 6 + sorted(PREDICATES)),
    tier=st.sampled_from(Tier),
    archs=st.sampled_from([(), (), ("v1",), ("v2", "v1")]),
    layout=st.sampled_from(["rows", "rows", "contiguous"]),
    properties=st.just(frozenset(Property)) | st.frozensets(st.sampled_from(Property), min_size=2),
)
backends = st.builds(
    dict,
    device=st.sampled_from(["cpu"] * 4 + ["cuda"]),
    probe=st.sampled_from(["v1"] * 8 + sorted(PROBES)),
    kernels=st.lists(kernels, min_size=1, max_size=2),
    dist=st.sampled_from(["opmux-a", "opmux-b"]),
)
names = st.lists(
    st.sampled_from([*ASKED, *(f"-{n}" for n in ASKED)]), min_size=1, max_size=2, unique=True
).flatmap(lambda some: st.sampled_from([[*some, "*"], [*some, "*"], ["*"], some]))
values = st.fixed_dictionaries(
    {},
    optional={
        "backends": names,
        "on_unsupported": st.sampled_from(policy.ON_UNSUPPORTED),
        "require": st.lists(st.sampled_from([p.value for p in Property]), max_size=2),
    },
)
layer = st.tuples(values | st.just({}), st.just({}) | values).map(
    lambda pair: pair[0] | ({"ops": {"silu_and_mul": pair[1]}} if pair[1] else {})
)
calls = st.builds(
    dict,
    dtype=st.sampled_from(opmux.FLOATS),
    half=st.sampled_from([0, 1, 2, 6, 8]),
    strided=st.booleans(),
    backend=st.none() | st.none() | st.sampled_from(ASKED),
    out=st.booleans(),
)
steps = st.lists(
    st.tuples(st.sampled_from(["keep", "clear", "set"]), layer, st.lists(layer, max_size=2), calls),
    min_size=1,
    max_size=4,
)


def _backend(name: str, drawn: dict[str, Any]) -> Backend:
    made = []
    for i, k in enumerate(drawn["kernels"]):
        symbol = f"silu_and_mul_{i}" if i else ""
        shown = f"{name}/{symbol}" if symbol else name
        fields = k | {"rejects": PREDICATES[k["rejects"]], "symbol": symbol}
        made.append(Kernel(**fields, fn=fakes.recorder(shown, fakes.silu_and_mul)))
    return fakes.backend(
        name, {"silu_and_mul": tuple(made)}, drawn["device"], PROBES[drawn["probe"]]
    )


def _toml(value: dict[str, Any]) -> str:
    ops = "".join(f"[ops.{n}]\n{_toml(v)}" for n, v in value.get("ops", {}).items())
    return "".join(f"{k} = {v!r}\n" for k, v in value.items() if k != "ops") + ops


@contextlib.contextmanager
def _process(environment: dict[str, Any], toml: dict[str, Any]) -> Iterator[None]:
    """Put a policy into environment and opmux.toml."""
    variables = {}
    if environment.get("backends"):
        variables["OPMUX_BACKENDS"] = ",".join(environment["backends"])
    if environment.get("on_unsupported"):
        variables["OPMUX_ON_UNSUPPORTED"] = environment["on_unsupported"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "opmux.toml")
        path.write_text(_toml(toml))
        os.environ |= variables | {"OPMUX_CONFIG": str(path)}
        try:
            yield
        finally:
            for name in [*variables, "OPMUX_CONFIG"]:
                del os.environ[name]


def _tensor(call: dict[str, Any]) -> torch.Tensor:
    width = 2 * call["half"]
    wide = torch.randn(3, width + 8 * call["strided"], dtype=call["dtype"])
    return wide[:, :width]


def _holds(decision: selection.Decision, x: torch.Tensor) -> None:
    """What no winner may break, said without the evaluator's own code."""
    winner = decision.winner
    if winner is None:
        return
    asked = decision.settings.backends
    assert f"-{winner.backend}" not in asked
    wanted = [name for name in asked if not name.startswith("-")]
    assert not wanted or winner.backend in wanted or "*" in wanted
    assert winner.kernel is not None
    assert set(decision.settings.require) <= {p.value for p in winner.kernel.properties}
    if winner.backend != "reference":
        assert x.dtype in winner.kernel.dtypes
        assert winner.kernel.layout == "rows" or x.is_contiguous()


@given(
    st.dictionaries(st.sampled_from(NAMES), backends, min_size=1, max_size=4), values, layer, steps
)
@settings(STABLE, max_examples=250)
def test_explain_is_what_runs(
    installed: dict[str, Any], environment: dict[str, Any], toml: dict[str, Any], todo: list[Any]
) -> None:
    """Random backends, policies of all layers and inputs; caches are kept from step to step."""
    made = [_backend(name, drawn) for name, drawn in sorted(installed.items())]
    dists = {name: drawn["dist"] for name, drawn in installed.items()}
    with _process(environment, toml):
        fakes.serve(*made, failures=_failed(installed), dists=dists)
        for configured, process, scopes, call in todo:
            if configured != "keep":
                opmux.configure()
            if configured == "set":
                _set(opmux.configure, process)
            _agree(call)
            with contextlib.ExitStack() as stack:
                for scope in scopes:
                    stack.enter_context(_set(opmux.use, scope))
                    _agree(call)
                    _agree(call)  # now from the caches
            _agree(call)
    policy.reset()


def _failed(installed: dict[str, Any]) -> list[loader.Failure]:
    """The other names are those of plugins that failed, so that policies may name them."""
    reason = Reason(Code.FAILED, "ImportError: gone")
    return [loader.Failure(n, "opmux-failed", reason) for n in NAMES if n not in installed]


def _set(function: Any, values: dict[str, Any]) -> Any:
    values = dict(values)
    return function(*values.pop("backends", ()), **values)


def _agree(call: dict[str, Any]) -> None:
    x = _tensor(call)
    out = x.new_full((3, call["half"]), -7) if call["out"] else None
    decision = opmux.silu_and_mul.explain(x, out, backend=call["backend"])
    _holds(decision, x)
    fakes.RAN.clear()
    if decision.winner is None:
        with pytest.raises(opmux.NoKernelError) as caught:
            opmux.silu_and_mul(x, out, backend=call["backend"])
        assert fakes.RAN == []
        assert out is None or bool((out == -7).all())
        # the same candidates with the same reasons, in the same order
        assert str(caught.value).splitlines()[1:] == str(decision).splitlines()[1:]
        return
    result = opmux.silu_and_mul(x, out, backend=call["backend"])
    assert fakes.RAN == ([] if decision.winner.name == "reference" else [decision.winner.name])
    expected = opmux.silu_and_mul.op.body(x)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@given(st.dictionaries(st.sampled_from(NAMES), backends, min_size=2, max_size=4), layer, calls)
@settings(STABLE, max_examples=15)
def test_order_of_registration_changes_nothing(
    installed: dict[str, Any], configured: dict[str, Any], call: dict[str, Any]
) -> None:
    """A shuffled registry gives the same text."""
    x = _tensor(call)
    texts = set()
    for order in itertools.permutations(sorted(installed)):
        made = [_backend(name, installed[name]) for name in order]
        found = fakes.serve(*made, failures=_failed(installed))
        assert [f.name for f in found] == sorted(installed)
        _set(opmux.configure, configured)
        texts.add(str(opmux.silu_and_mul.explain(x, backend=call["backend"])))
    assert len(texts) == 1


# ---- through real entry points ----

GOOD = """
import opmux, torch
from opmux.kernel import Backend, Kernel
RAN = []
def fn(x, out):
    RAN.append(1)
    gate, up = x.float().chunk(2, -1)
    out.copy_(torch.nn.functional.silu(gate) * up)
@opmux.hookimpl
def opmux_backend():
    return Backend({name!r}, "cpu", {{"silu_and_mul": Kernel(opmux.FLOATS, fn=fn{extra})}})
"""


@pytest.fixture
def four(tmp_path: Path) -> Iterator[list[importlib.metadata.EntryPoint]]:
    """Four plugins on disk: acme twice under two distributions, beta, and a broken one."""
    for dist, name, entry, code in (
        ("opmux-a1", "acme", "opmux_acme_one", GOOD.format(name="acme", extra="")),
        ("opmux-a2", "acme", "opmux_acme_two", GOOD.format(name="acme", extra="")),
        ("opmux-b", "beta", "opmux_beta", GOOD.format(name="beta", extra="")),
        ("opmux-c", "broken", "opmux_broken", "raise ImportError('libbroken.so.2: not found')"),
    ):
        plugins.make_plugin(tmp_path, dist, name, code, plugins.manifest_for(name), entry=entry)
    with fakes.on_path(tmp_path):
        found = importlib.metadata.entry_points(group=loader.GROUP)
        ours = ("opmux-a1", "opmux-a2", "opmux-b", "opmux-c")
        yield [e for e in found if e.dist is not None and e.dist.name in ours]


def test_shuffled_entry_points_change_nothing(
    four: list[importlib.metadata.EntryPoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All orders of four plugins give one registry, one list of failures and one text."""
    assert len(four) == 4
    x = torch.randn(2, 8)
    seen = set()
    for order in itertools.permutations(four):
        monkeypatch.setattr(loader, "discover", lambda order=order: order)
        loader.reset()
        texts = [str(opmux.silu_and_mul.explain(x))]
        for name in ("acme", "beta", "broken"):
            texts.append(str(opmux.silu_and_mul.explain(x, backend=name)))
        texts += [str(f) for f in opmux.failures()]
        texts += [f"{b.name} {b.dist}" for b in opmux.load().backends]
        seen.add("\n".join(texts))
    assert len(seen) == 1, seen
    text = seen.pop()
    assert "acme opmux-a1" in text
    assert "'acme' is taken by opmux-a1" in text
    assert "libbroken.so.2" in text


def test_what_real_plugins_run(
    four: list[importlib.metadata.EntryPoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """explain() names the plugin whose function runs, for every order and named backend."""
    monkeypatch.setattr(loader, "discover", lambda: four)
    loader.reset()
    import opmux_acme_one
    import opmux_beta

    x = torch.randn(2, 8)
    ran = {"acme": opmux_acme_one.RAN, "beta": opmux_beta.RAN}
    for asked in (("beta", "*"), ("acme", "*"), ("-acme",), ("*",), ("reference",)):
        for module in ran.values():
            module.clear()
        with opmux.use(*asked):
            winner = opmux.silu_and_mul.explain(x).winner.name
            opmux.silu_and_mul(x)
        assert [name for name, calls in ran.items() if calls] == [winner] * (winner in ran)
    assert winner == "reference"


# ---- single rules ----


def _one(**kernel: Any) -> Kernel:
    return Kernel(**({"dtypes": opmux.FLOATS, "fn": fakes.silu_and_mul} | kernel))


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        ({"tier": Tier.TUNED}, {}, "tier tuned before portable"),
        ({"dtypes": (torch.float32,)}, {}, "narrower declared domain than"),
        ({"rejects": opmux.last_dim_multiple_of(2)}, {}, "narrower declared domain than"),
        ({"archs": ("",)}, {}, "narrower declared domain than"),
        ({}, {}, "tie with zeta broken by name (opmux-acme before opmux-zeta)"),
    ],
)
def test_rank(first: dict[str, Any], second: dict[str, Any], why: str) -> None:
    """Tier, then the narrower domain, then the name; the decision says which."""
    fakes.serve(
        fakes.backend("acme", {"silu_and_mul": _one(**first)}),
        fakes.backend("zeta", {"silu_and_mul": _one(**second)}),
    )
    decision = opmux.silu_and_mul.explain(torch.randn(2, 8))
    assert decision.winner.name == "acme"
    assert why in decision.why


def test_rank_survives_names() -> None:
    """The better tier wins over the earlier name."""
    fakes.serve(
        fakes.backend("acme", {"silu_and_mul": _one()}),
        fakes.backend("zeta", {"silu_and_mul": _one(tier=Tier.SPECIALISED)}),
    )
    assert opmux.silu_and_mul.explain(torch.randn(2, 8)).winner.name == "zeta"


def test_a_kernel_of_tier_reference_does_not_replace_the_reference() -> None:
    """The definition itself ranks first in its tier; comparing the two must not fail."""
    fakes.serve(fakes.backend("acme", {"silu_and_mul": _one(tier=Tier.REFERENCE)}))
    decision = opmux.silu_and_mul.explain(torch.randn(2, 8))
    assert decision.winner.name == "reference"
    assert "tier reference" in decision.why


def test_a_named_backend_obeys_the_scope_it_is_called_in() -> None:
    """A decision for ``backend=`` taken in one scope must not answer in another."""
    plain = _one(properties=frozenset({Property.COMPILE}))
    fakes.serve(fakes.backend("acme", {"silu_and_mul": plain}))
    x = torch.randn(2, 8)
    opmux.silu_and_mul(x, backend="acme")
    with opmux.use(require=["deterministic"]):
        assert opmux.silu_and_mul.explain(x, backend="acme").winner is None
        with pytest.raises(opmux.NoKernelError, match="the kernel is not deterministic"):
            opmux.silu_and_mul(x, backend="acme")
    opmux.silu_and_mul(x, backend="acme")


def test_every_gate_has_its_code() -> None:
    """Each kind of refusal carries its own stable code."""
    cases = {
        Code.DEVICE: fakes.backend("b_device", {"silu_and_mul": _one()}, "cuda"),
        Code.RUNTIME: fakes.backend("b_runtime", {"silu_and_mul": _one()}, probe=PROBES["refuses"]),
        Code.ARCH: fakes.backend("b_arch", {"silu_and_mul": _one(archs=("v9",))}),
        Code.DTYPE: fakes.backend("b_dtype", {"silu_and_mul": _one(dtypes=(torch.float16,))}),
        Code.LAYOUT: fakes.backend("b_layout", {"silu_and_mul": _one(layout="contiguous")}),
        Code.PROPERTY: fakes.backend("b_prop", {"silu_and_mul": _one(properties=frozenset())}),
        Code.PREDICATE: fakes.backend("b_shape", {"silu_and_mul": _one(rejects=lambda _: "no")}),
        Code.DENIED: fakes.backend("b_denied", {"silu_and_mul": _one()}),
    }
    fakes.serve(*cases.values())
    x = torch.randn(4, 16)[:, :8]
    with opmux.use("-b_denied", require=["deterministic"]):
        decision = opmux.silu_and_mul.explain(x)
    found = {c.backend: c.refused.code for c in decision.candidates if c.refused}
    assert found == {b.name: code for code, b in cases.items()}
    assert decision.winner.name == "reference"

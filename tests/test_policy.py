# SPDX-License-Identifier: Apache-2.0
"""Whose wish counts: layers, origins, scopes, and what misspelt wishes say."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fakes
import opmux
from opmux import loader, policy
from opmux.kernel import Kernel, Property

NAMES = ("b_call", "b_conf", "b_env", "b_model", "b_toml", "b_use", "b_zero")
X = torch.randn(2, 8)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    fakes.isolate(monkeypatch, tmp_path)
    fakes.serve(*(fakes.backend(name) for name in NAMES))
    yield
    loader.reset()


def ran(**call: Any) -> str:
    fakes.RAN.clear()
    opmux.silu_and_mul(X, **call)
    winner = opmux.silu_and_mul.explain(X, **call).winner.name
    assert fakes.RAN == ([] if winner == "reference" else [winner])
    return winner


def chosen() -> str:
    """Return what would run, for threads that must not share the log."""
    return str(opmux.silu_and_mul.explain(X).winner.name)


def toml(text: str) -> None:
    Path("opmux.toml").write_text(text)
    policy.reset()


# ---- precedence ----


def test_every_layer_beats_the_ones_below(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the defaults up; each layer in turn decides, and is named as the origin."""

    def now() -> tuple[str, str]:
        return ran(), opmux.effective_config()["backends"]["origin"]

    assert now() == ("b_call", "default")
    toml('backends = ["b_toml", "*"]\n[models.llama]\nbackends = ["b_model", "*"]')
    assert now() == ("b_toml", str(Path("opmux.toml").resolve()))
    monkeypatch.setenv("OPMUX_BACKENDS", "b_env,*")
    policy.reset()
    assert now() == ("b_env", "OPMUX_BACKENDS")
    opmux.configure("b_conf", "*")
    assert now() == ("b_conf", "configure()")
    with opmux.use(model="llama"):
        assert now() == ("b_model", f"{Path('opmux.toml').resolve()}, model llama")
        with opmux.use("b_use", "*"):
            assert now() == ("b_use", "use()")
            assert ran(backend="b_zero") == "b_zero"
            # the model scope stays below use(), in whatever order they are entered
            with opmux.use(model="llama"):
                assert now()[0] == "b_use"
    assert now()[0] == "b_conf"
    opmux.configure()
    assert now()[0] == "b_env"


def test_layers_join_key_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer replaces what it sets and leaves the rest."""
    toml('require = ["deterministic"]\non_unsupported = "raise"\nbackends = "b_toml"')
    monkeypatch.setenv("OPMUX_ON_UNSUPPORTED", "reference")
    opmux.configure("b_conf")
    assert opmux.effective_config() == {
        "backends": {"value": ("b_conf",), "origin": "configure()"},
        "on_unsupported": {"value": "reference", "origin": "OPMUX_ON_UNSUPPORTED"},
        "require": {"value": ("deterministic",), "origin": str(Path("opmux.toml").resolve())},
        "require_conformance": {"value": None, "origin": "default"},
    }


def test_settings_for_one_op() -> None:
    """In a layer, the op's settings beat the general ones; a higher layer beats both."""
    toml('backends = ["b_toml", "*"]\n[ops.silu_and_mul]\nbackends = ["b_env", "*"]')
    assert ran() == "b_env"
    config = opmux.effective_config()
    assert config["backends"]["value"] == ("b_toml", "*")
    assert config["ops.silu_and_mul.backends"]["value"] == ("b_env", "*")
    opmux.configure("b_conf", "*")
    assert ran() == "b_conf"
    opmux.configure(ops={"silu_and_mul": {"backends": ["reference"]}})
    assert ran() == "reference"
    assert opmux.effective_config()["ops.silu_and_mul.backends"]["origin"] == "configure()"
    with opmux.use("b_use", ops={"rmsnorm": {"backends": ["reference"]}}):
        assert ran() == "b_use"
        assert ran(backend="b_zero") == "b_zero"


def test_a_list_is_an_order_and_a_filter() -> None:
    """["a", "*"] prefers, ["a"] allows nothing else, ["-a"] excludes."""
    with opmux.use("b_use", "*"):
        assert ran() == "b_use"
    with opmux.use("-b_call"):
        assert ran() == "b_conf"
        with pytest.raises(opmux.NoKernelError, match="x"), opmux.use("cpu_amx"):
            opmux.silu_and_mul(X)
    with opmux.use("b_env"):
        text = str(opmux.silu_and_mul.explain(X))
        assert "denied: use() allows only b_env" in text
        assert ran() == "b_env"
    with opmux.use("*", "-b_call", "-reference"):
        text = str(opmux.silu_and_mul.explain(X))
        assert "b_call     denied: excluded by use()" in text
        assert "reference  denied: excluded by use()" in text


def test_reference_can_be_preferred() -> None:
    with opmux.use("reference", "*"):
        assert ran() == "reference"


def test_model_scope_from_another_file_after_reset() -> None:
    """A scope must not outlive the file that it came from."""
    toml('[models.llama]\nbackends = ["b_model"]')
    with opmux.use(model="llama"):
        assert ran() == "b_model"
    toml('[models.llama]\nbackends = ["b_toml"]')
    with opmux.use(model="llama"):
        assert ran() == "b_toml"


# ---- strictness ----


def _only(name: str, **kernel: Any) -> None:
    """Serve one kernel, named so, that may refuse, and one that always fits."""
    fn = fakes.recorder(name, fakes.silu_and_mul)
    strict = Kernel(**({"dtypes": opmux.FLOATS, "fn": fn} | kernel))
    fakes.serve(fakes.backend(name, {"silu_and_mul": strict}), fakes.backend("b_zero"))


def test_a_named_backend_never_falls_back() -> None:
    """Neither by name at the call nor by a list without "*"; the error names the reason."""
    _only("b_call", dtypes=(torch.float16,))
    message = r"(?s)no kernel for silu_and_mul.*b_call +dtype: float32 is not one of float16"
    with pytest.raises(opmux.NoKernelError, match=message):
        opmux.silu_and_mul(X, backend="b_call")
    with pytest.raises(opmux.NoKernelError, match=message), opmux.use("b_call"):
        opmux.silu_and_mul(X)
    assert fakes.RAN == []


@pytest.mark.parametrize("known", sorted(policy.KNOWN))
def test_a_known_backend_that_is_not_installed(known: str) -> None:
    """The error says what to install."""
    with pytest.raises(opmux.NoKernelError, match=f"not installed.*pip install opmux-{known[:3]}"):
        opmux.silu_and_mul(X, backend=known)


@pytest.mark.parametrize(
    ("value", "winner"), [("next", "b_zero"), ("reference", "reference"), ("raise", None)]
)
def test_on_unsupported(value: str, winner: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a refusal of this call counts; what the others could do is shown."""
    _only("b_call", dtypes=(torch.float16,), tier=opmux.Tier.TUNED)
    monkeypatch.setenv("OPMUX_ON_UNSUPPORTED", value)
    policy.reset()
    decision = opmux.silu_and_mul.explain(X)
    assert (decision.winner and decision.winner.name) == winner
    text = str(decision)
    if value != "next":
        assert f'on_unsupported: b_call refused and on_unsupported is "{value}"' in text
        assert "set by OPMUX_ON_UNSUPPORTED" in text
    if winner is None:
        with pytest.raises(opmux.NoKernelError, match="on_unsupported"):
            opmux.silu_and_mul(X)
    else:
        assert ran() == winner
        assert "b_call refused" in decision.why


def test_on_unsupported_ignores_what_the_host_lacks() -> None:
    """A kernel for another device is no preferred kernel that refused."""
    fakes.serve(fakes.backend("b_call", device="cuda"), fakes.backend("b_zero"))
    with opmux.use(on_unsupported="raise"):
        assert ran() == "b_zero"


def test_require() -> None:
    _only("b_call", properties=frozenset({Property.COMPILE}), tier=opmux.Tier.TUNED)
    assert ran() == "b_call"
    for wish in (["deterministic"], [Property.DETERMINISTIC], "deterministic"):
        with opmux.use(require=wish):
            assert ran() == "b_zero"
    with opmux.use("b_call", require=["deterministic", "batch_invariant"]):
        text = str(opmux.silu_and_mul.explain(X))
        assert "property: the kernel is not deterministic and batch_invariant" in text
        assert "required by use()" in text


# ---- wrong wishes ----


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"backends": ["b_cal"]}, "unknown backend 'b_cal'; did you mean b_call"),
        ({"backends": ["-b_cal"]}, "unknown backend 'b_cal'"),
        ({"backends": ["qqq"]}, "unknown backend 'qqq'; known: "),
        ({"backends": [""]}, "backends holds an empty name"),
        ({"backends": [3]}, "backends must be names, got"),
        ({"on_unsupported": "never"}, "on_unsupported must be one of next, reference, raise"),
        ({"on_unsupported": 3}, "on_unsupported must be one of"),
        ({"require": ["fast"]}, "require must be of graph_capturable, .* got 'fast'"),
        ({"require": 3}, "require must be names, got 3"),
        ({"ops": 3}, "ops must map names to settings, got 3"),
        ({"ops": {"silu_and_mul": "b_call"}}, "ops.silu_and_mul must map names to settings"),
        ({"ops": {"silu_and_mul": {"backend": ["b_call"]}}}, "unknown setting 'backend'; known"),
        ({"ops": {"silu_and_mul": {"backends": ["b_cal"]}}}, "did you mean b_call"),
        ({"ops": {"silu_and_mull": {}}}, "unknown op 'silu_and_mull'; did you mean silu_and_mul"),
    ],
)
@pytest.mark.parametrize("where", ["configure", "use", "toml"])
def test_wrong_wishes_are_refused(where: str, wish: dict[str, Any], message: str) -> None:
    """Each message says where the value came from; nothing of it comes into force."""
    origin = {"configure": r"configure\(\)", "use": r"use\(\)", "toml": r"opmux\.toml"}[where]
    with pytest.raises((ValueError, TypeError), match=f"{origin}.*{message}"):
        if where == "toml":
            _write_toml(wish)
            opmux.silu_and_mul(X)
        elif where == "use":
            with opmux.use(*wish.get("backends", ()), **_rest(wish)):
                pytest.fail("came into force")
        else:
            opmux.configure(*wish.get("backends", ()), **_rest(wish))
    Path("opmux.toml").unlink(missing_ok=True)
    policy.reset()
    assert opmux.effective_config()["backends"]["origin"] == "default"


def _rest(wish: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in wish.items() if k != "backends"}


def _write_toml(wish: dict[str, Any]) -> None:
    def inline(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k} = {inline(v)}" for k, v in value.items()) + "}"
        return repr(value)

    toml("\n".join(f"{k} = {inline(v)}" for k, v in wish.items()))


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("OPMUX_BACKENDS", "b_cal,*", "OPMUX_BACKENDS: unknown backend 'b_cal'"),
        ("OPMUX_BACKENDS", "b_call,,*", "OPMUX_BACKENDS: backends holds an empty name"),
        ("OPMUX_ON_UNSUPPORTED", "never", "OPMUX_ON_UNSUPPORTED: on_unsupported must be one of"),
        ("OPMUX_CONFIG", "none.toml", "none.toml: .*No such file"),
    ],
)
def test_wrong_environment(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    policy.reset()
    with pytest.raises(ValueError, match=message):
        opmux.silu_and_mul(X)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"backends = [", r"opmux\.toml: "),
        (b"# \xff", r"opmux\.toml: 'utf-8' codec"),
        (b'backend = "b_call"', r"opmux\.toml: unknown setting 'backend'"),
        (b"models = 3", r"opmux\.toml: models must map names to settings, got 3"),
        (b"[models]\nllama = 3", r"opmux\.toml, model llama: settings must map"),
        (b'[models.llama]\nbackends = ["b_cal"]', r"opmux\.toml, model llama: unknown backend"),
    ],
)
def test_wrong_toml(content: bytes, message: str) -> None:
    """The file and the key are named."""
    Path("opmux.toml").write_bytes(content)
    policy.reset()
    with pytest.raises((ValueError, TypeError), match=message), opmux.use(model="llama"):
        opmux.silu_and_mul(X)


def test_unknown_names_at_the_call() -> None:
    with pytest.raises(ValueError, match="unknown backend 'b_cal'; did you mean b_call"):
        opmux.silu_and_mul(X, backend="b_cal")
    for wrong in (3, ["b_call"], b"b_call"):
        with pytest.raises(TypeError, match="backend must be a name, got"):
            opmux.silu_and_mul(X, backend=wrong)
    toml("[models.llama]\n")
    with (
        pytest.raises(ValueError, match=r"use\(\): unknown model 'lama'; did you mean llama"),
        opmux.use(model="lama"),
    ):
        pass


def test_opmux_config_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read instead of ./opmux.toml."""
    toml('backends = ["b_toml"]')
    other = tmp_path / "other.toml"
    other.write_text('backends = ["b_env"]')
    monkeypatch.setenv("OPMUX_CONFIG", str(other))
    policy.reset()
    assert ran() == "b_env"
    assert opmux.effective_config()["backends"]["origin"] == str(other)


# ---- configure() and use() ----


def test_configure_adds_and_resets() -> None:
    opmux.configure("b_conf")
    opmux.configure(on_unsupported="raise")
    config = opmux.effective_config()
    assert (config["backends"]["value"], config["on_unsupported"]["value"]) == (
        ("b_conf",),
        "raise",
    )
    opmux.configure()
    assert opmux.effective_config()["backends"]["origin"] == "default"
    assert opmux.effective_config()["on_unsupported"]["value"] == "next"


def test_a_refused_configure_changes_nothing() -> None:
    opmux.configure("b_conf")
    with pytest.raises(ValueError, match="unknown backend"):
        opmux.configure("nope")
    assert ran() == "b_conf"


def test_use_nests_and_ends_with_errors() -> None:
    with opmux.use("b_use", "*"):
        with pytest.raises(KeyError), opmux.use("b_env"):
            assert ran() == "b_env"
            raise KeyError
        assert ran() == "b_use"
        with opmux.use(on_unsupported="raise"):
            assert ran() == "b_use"
    assert ran() == "b_call"
    assert policy.scope() is None
    assert policy.traced.token == ""


def test_use_holds_in_its_thread_only() -> None:
    """Neither the scope nor what compiled code is guarded on leaks into another thread."""
    inside, outside = threading.Event(), threading.Event()
    seen: dict[str, Any] = {}

    def other() -> None:
        seen["before"] = (chosen(), policy.traced.token)
        with opmux.use("b_env"):
            inside.set()
            outside.wait(20)
            seen["in"] = chosen()
        seen["after"] = (chosen(), policy.traced.token)

    with opmux.use("b_use"):
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait(20)
        assert ran() == "b_use"
        token = policy.traced.token
        opmux.use("b_zero")  # a scope that is not entered changes nothing
        assert policy.traced.token == token
    outside.set()
    thread.join(20)
    assert seen == {"before": ("b_call", ""), "in": "b_env", "after": ("b_call", "")}
    assert (ran(), policy.traced.token) == ("b_call", "")


def test_use_holds_in_its_task_only() -> None:
    """Two asyncio tasks in turn, each in its own scope; children inherit."""

    async def task(name: str, log: list[str]) -> None:
        with opmux.use(name):
            for _ in range(3):
                await asyncio.sleep(0)
                log.append(chosen())
            log.append(await asyncio.create_task(child()))
            log.append(await asyncio.to_thread(chosen))
        log.append(chosen())

    async def child() -> str:
        return chosen()

    async def both() -> tuple[list[str], list[str]]:
        first: list[str] = []
        second: list[str] = []
        await asyncio.gather(task("b_use", first), task("b_env", second))
        return first, second

    first, second = asyncio.run(both())
    assert first == ["b_use"] * 5 + ["b_call"]
    assert second == ["b_env"] * 5 + ["b_call"]
    assert policy.traced.token == ""


def test_configure_reaches_all_threads_and_caches() -> None:
    """A change while other threads call must never leave an old decision behind."""
    stop = threading.Event()

    def calls() -> None:
        while not stop.is_set():
            opmux.silu_and_mul(X)

    threads = [threading.Thread(target=calls) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for i in range(60):
            name = NAMES[i % len(NAMES)]
            opmux.configure(name)
            assert ran_here(name)
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)


def ran_here(name: str) -> bool:
    fakes.RAN.clear()
    opmux.silu_and_mul(X)
    return fakes.RAN.count(name) >= 1

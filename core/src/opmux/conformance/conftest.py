# SPDX-License-Identifier: Apache-2.0
"""Fixtures and parameters of the kit; seen by its own tests only."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch

from opmux import loader, manifest
from opmux.conformance import calls, cases
from opmux.conformance.buffers import LAYOUTS
from opmux.conformance.cases import Case, Claim, Target
from opmux.conformance.report import LEFT_OUT
from opmux.kernel import Property
from opmux.selection import REFERENCE

NO_BACKEND = "no backend to test: run with --opmux-backend NAME"
FIRST_WITH_DATA = 3  # levels below it need no device


@cache
def _target(name: str, ops: tuple[str, ...]) -> Target:
    return cases.target(name, ops)


@cache
def _cases(target: Target) -> tuple[Case, ...]:
    return tuple(case for claim in _sound(target) for case in claim.cases())


@cache
def _sound(target: Target) -> tuple[Claim, ...]:
    """Return the claims of dtypes that the op has; test_claims refuses the others."""
    return tuple(c for c in _claims(target) if c.op.dtypes is None or c.dtype in c.op.dtypes)


@cache
def _claims(target: Target) -> tuple[Claim, ...]:
    return tuple(cases.claims(target))


def _tested(config: pytest.Config) -> Target | None:
    name = config.getoption("--opmux-backend")
    if not name:
        return None
    try:
        return _target(name, tuple(config.getoption("--opmux-op") or ()))
    except ValueError as error:
        raise pytest.UsageError(f"opmux: {error}") from None


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest) -> Target:
    """Return the backend under test."""
    found = _tested(request.config)
    if found is None:
        pytest.skip(NO_BACKEND)
    return found


@pytest.fixture
def backend(target: Target) -> str:
    """Return the backend's name; the reference is never loaded."""
    if target.name == REFERENCE:
        pytest.skip("the reference is no plugin")
    return target.name


@pytest.fixture
def entry(backend: str) -> importlib.metadata.EntryPoint:
    """Return the backend's entry point, which must be one."""
    found = [e for e in loader.discover() if not isinstance(e, loader.Failure)]
    entries = [e for e in found if e.name == backend]
    assert len({e.value for e in entries}) == 1, f"entry points of {backend}: {entries}"
    return entries[0]


@pytest.fixture
def static(entry: importlib.metadata.EntryPoint) -> manifest.Manifest:
    """Return the backend's manifest, read without importing anything."""
    return manifest.find(entry.module)


def _ragged(claim: Claim) -> list[Case]:
    """Return the cases of several tokens that the kernel serves, smallest first."""
    full = sorted((case for case in claim.cases() if not case.empty), key=lambda case: case.size)
    ragged = [case for case in full if all(len(s) < 2 or s[0] > 1 for s in case.shapes)]
    return [case for case in ragged if calls.served(case)] or ragged or full


def _middle(cases: list[Case]) -> Case:
    return cases[len(cases) // 2]


def _poor(case: Case) -> tuple[int, bool, int]:
    """Rank cases for tests of arguments: all optional tensors, no row of one, then small."""
    return -len(case.shapes), any(shape[-1] == 1 for shape in case.shapes), case.size


@cache
def _laid_out(target: Target) -> tuple[tuple[Case, Any], ...]:
    return tuple(
        (case, layout)
        for case in _cases(target)
        for layout in LAYOUTS
        if case.differs(layout) and case.allows(layout)
    )


@cache
def _parameters(name: str, target: Target) -> Sequence[Any]:
    several: dict[str, Callable[[], Sequence[Any]]] = {
        "claim": lambda: _claims(target),
        "case": lambda: _cases(target),
        "layout_case": lambda: _laid_out(target),
        "planted_case": lambda: [
            (c, kind) for c in _cases(target) if not c.empty for kind in cases.PLANTS[1:]
        ],
    }
    if name in several:
        return several[name]()
    if name == "op_case":
        first = {claim.op.name + claim.kernel.symbol: claim for claim in reversed(_sound(target))}
        return [min(_ragged(claim), key=_poor) for claim in reversed(first.values())]
    if name == "large_case":
        return [max(_ragged(claim), key=lambda case: case.size) for claim in _sound(target)]
    return [_middle(_ragged(claim)) for claim in _sound(target)]


FIXTURES = (
    "claim", "case", "layout_case", "planted_case", "one_case", "op_case", "large_case",
)  # fmt: skip


# ---- what a test needs of its parameter; without it the test is not made ----


def _refuses_something(case: Any) -> bool:
    """Whether a kernel's predicate or layout refuses a call that its op allows."""
    claim: Claim = case
    return any(
        case.allows(layout) and calls.refusal(claim, calls.prepare(case, layout)) is not None
        for case in claim.cases()
        for layout in LAYOUTS
        if case.differs(layout)
    )


def _claim(value: Any) -> Claim:
    value = value[0] if isinstance(value, tuple) else value
    return value.claim if isinstance(value, Case) else value


def _property(wanted: Property) -> Callable[[Any], bool]:
    return lambda value: wanted in _claim(value).kernel.properties


NEEDS: dict[str, Callable[[Any], bool]] = {
    "outs": lambda value: bool(_claim(value).op.outs),
    "a backend": lambda value: _claim(value).target.loaded is not None,
    "twins": lambda case: bool(calls.twins(case)),
    "refusals": _refuses_something,
    "a predicate": lambda value: _claim(value).kernel.rejects is not None,
    # torch drives ROCm through torch.cuda, too
    "streams": lambda value: _claim(value).target.device == "cuda",
    "two devices": lambda value: (
        _claim(value).target.device == "cuda" and torch.cuda.device_count() > 1
    ),
    **{p.value: _property(p) for p in Property},
}


def _name(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _skip(why: str) -> list[Any]:
    return [pytest.param(None, id="none", marks=pytest.mark.skip(reason=why))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test for each kernel, dtype, sample and layout that the test's arguments name."""
    name = next((name for name in FIXTURES if name in metafunc.fixturenames), None)
    if name is None:
        return
    target = _tested(metafunc.config)
    why = ""
    if target is None:
        why = NO_BACKEND
    elif not any(True for _ in target.kernels()):
        why = f"backend {target.name} brings no kernel"
    elif _level(metafunc.definition) >= FIRST_WITH_DATA and not target.present:
        why = f"this machine has no {target.device} device"
    if target is None or why:
        metafunc.parametrize(name, _skip(why))
        return
    if _level(metafunc.definition) > _through(metafunc.config):
        metafunc.parametrize(name, [pytest.param(None, id="none", marks=pytest.mark.opmux_nothing)])
        return
    values = _parameters(name, target)
    for marker in metafunc.definition.iter_markers("opmux_needs"):
        values = [v for v in values if all(NEEDS[need](v) for need in marker.args)]
    none = [pytest.param(None, id="none", marks=pytest.mark.opmux_nothing)]
    metafunc.parametrize(name, values or none, ids=_name if values else None)


# ---- levels ----


def _level(node: pytest.Item | Any) -> int:
    marker = node.get_closest_marker("opmux_level")
    return int(marker.args[0]) if marker is not None else 0


def _through(config: pytest.Config) -> int:
    level = config.getoption("--opmux-level")
    return int(level) if level is not None else 99


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out levels that are not wanted and tests without a case; run the others by level."""
    ours = [i for i in items if i.get_closest_marker("opmux_level") is not None]
    out = [i for i in ours if _level(i) > _through(config) or i.get_closest_marker("opmux_nothing")]
    for item in out:
        item.stash[LEFT_OUT] = True
    if out:
        config.hook.pytest_deselected(items=out)
    kept = sorted((i for i in ours if i not in set(out)), key=_level)
    others = [i for i in items if i not in set(ours)]
    items[:] = [*others, *kept]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Note level, op and dtype for the report."""
    item.user_properties.append(("opmux_level", _level(item)))
    spec = getattr(item, "callspec", None)
    params = spec.params if spec is not None else {}
    for name in FIXTURES:
        value = params.get(name)
        value = value[0] if isinstance(value, tuple) else value
        claim = value.claim if isinstance(value, Case) else value
        if isinstance(claim, Claim):
            item.user_properties.append(("opmux_op", claim.op.name))
            item.user_properties.append(("opmux_dtype", str(claim.dtype).removeprefix("torch.")))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    """Count a failure at the level that it belongs to."""
    level = getattr(call.excinfo.value if call.excinfo else None, "opmux_level", None)
    if level is not None:
        item.user_properties.append(("opmux_level", level))
    return (yield)

# SPDX-License-Identifier: Apache-2.0
"""Fixtures and parameters of the kit; seen by its own tests only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest

from opmux.conformance import calls, cases
from opmux.conformance.buffers import LAYOUTS
from opmux.conformance.cases import Case, Claim, Target

NO_BACKEND = "no backend to test: run with --opmux-backend NAME"


@cache
def _target(name: str, ops: tuple[str, ...]) -> Target:
    return cases.target(name, ops)


@cache
def _cases(target: Target) -> tuple[Case, ...]:
    return tuple(case for claim in _claims(target) for case in claim.cases())


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


def _parameters(name: str, target: Target) -> Sequence[Any]:
    if name == "claim":
        return _claims(target)
    if name == "case":
        return _cases(target)
    if name == "layout_case":
        return [(c, layout) for c in _cases(target) for layout in LAYOUTS if c.differs(layout)]
    if name == "planted_case":
        return [(c, kind) for c in _cases(target) if not c.empty for kind in cases.PLANTS[1:]]
    first = {claim.op.name + claim.kernel.symbol: claim for claim in reversed(_claims(target))}
    if name == "op_case":
        return [min(_ragged(claim), key=_poor) for claim in reversed(first.values())]
    return [_middle(_ragged(claim)) for claim in _claims(target)]


FIXTURES = ("claim", "case", "layout_case", "planted_case", "one_case", "op_case")


def _name(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test for each kernel, dtype, sample and layout that the test's arguments name."""
    for name in FIXTURES:
        if name in metafunc.fixturenames:
            target = _tested(metafunc.config)
            values = _parameters(name, target) if target else []
            why = NO_BACKEND if target is None else f"backend {target.name} brings no kernel"
            none = [pytest.param(None, id="none", marks=pytest.mark.skip(reason=why))]
            metafunc.parametrize(name, values or none, ids=_name if values else None)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Note op and dtype for the report."""
    spec = getattr(item, "callspec", None)
    params = spec.params if spec is not None else {}
    for name in FIXTURES:
        value = params.get(name)
        value = value[0] if isinstance(value, tuple) else value
        claim = value.claim if isinstance(value, Case) else value
        if isinstance(claim, Claim):
            item.user_properties.append(("opmux_op", claim.op.name))
            item.user_properties.append(("opmux_dtype", str(claim.dtype).removeprefix("torch.")))

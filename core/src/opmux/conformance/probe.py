# SPDX-License-Identifier: Apache-2.0
"""Ways to load a backend, each run in a fresh process: ``python -m opmux.conformance.probe``."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from opmux import loader
from opmux.conformance import calls, cases
from opmux.conformance.cases import Case


def serve(name: str) -> None:
    """Call one kernel of the backend and compare it with the reference."""
    tested = cases.target(name)
    failures = [str(f) for f in loader.failures() if f.backend == name]
    if failures:
        raise AssertionError("\n".join(failures))
    case = _first_served(cases.claims(tested))
    if case is not None:
        calls.check(case)


def _first_served(claims: list[cases.Claim]) -> Case | None:
    for claim in claims:
        for case in claim.cases():
            if not case.empty and calls.refusal(claim, calls.prepare(case)) is None:
                return case
    return None


def _ops_of(name: str) -> list[str]:
    prefix = f"opmux_{name}::"
    return [n for n in torch._C._dispatch_get_all_op_names() if n.startswith(prefix)]


def again(name: str) -> None:
    """Load, forget, load: the library and the schemas are in the process already."""
    serve(name)
    loader.reset()
    serve(name)


def fork(name: str) -> None:
    """Load and call in a forked child; then in the parent, and in a child after that.

    A device that the parent has used cannot be used in a forked child, so there the children only
    load.
    """
    for turn in range(2):
        child = os.fork()
        if not child:
            code = 1
            try:
                tested = cases.target(name)
                if turn == 0 or tested.device == "cpu":
                    serve(name)
                code = 0
            finally:
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            raise AssertionError(f"child {turn + 1} ended with {status}")
        serve(name)


def threads(name: str) -> None:
    """Let threads race for the first call."""
    start = threading.Barrier(8)
    registries: list[loader.Registry] = []
    errors: list[BaseException] = []

    def first_call() -> None:
        try:
            start.wait()
            registries.append(loader.load())
            serve(name)
        except BaseException as error:
            errors.append(error)

    racing = [threading.Thread(target=first_call) for _ in range(8)]
    for thread in racing:
        thread.start()
    for thread in racing:
        thread.join()
    if errors:
        raise errors[0]
    if len({id(registry) for registry in registries}) != 1:
        raise AssertionError("the backend was loaded more than once")


def rollback(name: str) -> None:
    """Let the last step of loading fail: nothing of the backend stays, and it loads afterwards."""
    before = sorted(_ops_of(name))
    hook: Any = torch.library
    real = hook.register_fake
    done: list[str] = []

    def failing(op_name: str, *args: Any, **kwargs: Any) -> Any:
        if op_name.startswith(f"opmux_{name}::"):
            done.append(op_name)
            raise RuntimeError("planted")
        return real(op_name, *args, **kwargs)

    hook.register_fake = failing
    try:
        failures = [f for f in loader.failures() if f.backend == name]
    finally:
        hook.register_fake = real
    if not done or not failures:
        raise AssertionError(f"the planted failure was not reported: {failures}")
    if name in {b.name for b in loader.load().backends}:
        raise AssertionError("a backend that failed to load is in service")
    left = [n for n in _ops_of(name) if n not in before]
    if any(_has_schema(n) for n in left):
        raise AssertionError(f"these ops stayed behind: {', '.join(left)}")
    loader.reset()
    serve(name)


def _has_schema(op_name: str) -> bool:
    """Whether an op can be called; implementations without a schema cannot."""
    return bool(torch._C._dispatch_has_kernel(op_name)) and "schema: (none)" not in str(
        torch._C._dispatch_dump(op_name)
    )


WAYS: dict[str, Callable[[str], None]] = {
    "again": again, "fork": fork, "rollback": rollback, "threads": threads,
}  # fmt: skip

if __name__ == "__main__":
    WAYS[sys.argv[1]](sys.argv[2])

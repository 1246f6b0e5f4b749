# SPDX-License-Identifier: Apache-2.0
"""Ways to load a backend, each run in a fresh process: ``python -m opmux.conformance.probe``."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from opmux import loader, manifest, process_state
from opmux.conformance import calls, cases
from opmux.conformance.cases import Case
from opmux.op import all_ops


def serve(name: str) -> None:
    """Call one kernel of the backend and compare it with the reference."""
    tested = cases.target(name)
    failures = [str(f) for f in loader.failures() if f.backend == name]
    if failures:
        raise AssertionError("\n".join(failures))
    case = _first_served(cases.claims(tested)) if tested.present else None
    if case is not None:
        calls.check(case)


def _first_served(claims: list[cases.Claim]) -> Case | None:
    for claim in claims:
        for case in claim.cases():
            if not case.empty and calls.refusal(claim, calls.prepare(case)) is None:
                return case
    return None


def _served(claims: list[cases.Claim]) -> list[Case]:
    """Return small cases that are served, of the first claim that has some."""
    for claim in claims:
        full = sorted((c for c in claim.cases() if not c.empty), key=lambda case: case.size)
        found = [case for case in full[:8] if calls.served(case)]
        if found:
            return found
    return []


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

    def first_call(number: int) -> None:
        try:
            start.wait()
            registries.append(loader.load())
            tested = cases.target(name)
            served = _served(cases.claims(tested)) if tested.present else []
            for _ in range(3 if served else 0):  # each thread with values of its own
                calls.check(served[number % len(served)])
        except BaseException as error:
            errors.append(error)

    racing = [threading.Thread(target=first_call, args=(number,)) for number in range(8)]
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


def clean(name: str) -> None:
    """Import the plugin and ask its hook: no library, no device, no setting of the process."""
    (entry,) = {
        e for e in loader.discover() if not isinstance(e, loader.Failure) and e.name == name
    }
    before, ops = process_state.snapshot(), len(_ops_of(name))
    maps = Path("/proc/self/maps")
    libraries = _loaded(maps)
    backend = entry.load().opmux_backend()
    changed = process_state.restore(before)
    if changed:
        raise AssertionError(f"importing it changed {'; '.join(changed)}")
    if len(_ops_of(name)) != ops:
        raise AssertionError("importing it registered torch ops")
    if torch.cuda.is_initialized():
        raise AssertionError("importing it initialised the device")
    own = Path(entry.load().__file__ or "").parent
    found = [p for p in _loaded(maps) - libraries if Path(p).is_relative_to(own)]
    if found:
        raise AssertionError(f"importing it loaded {', '.join(found)}, before the handshake")
    if backend.name != name:
        raise AssertionError(f"its hook names {backend.name}")


def _loaded(maps: Path) -> set[str]:
    """Return the files that are mapped into this process, where the system tells."""
    lines = maps.read_text().splitlines() if maps.exists() else []
    return {line.split(maxsplit=5)[5] for line in lines if line.count(" ") > 4 and ".so" in line}


def newer(name: str) -> None:
    """Load into a core with another interface of one op: that is refused, the rest serves."""
    (entry,) = {
        e for e in loader.discover() if not isinstance(e, loader.Failure) and e.name == name
    }
    ops = sorted(op for op in manifest.find(entry.module).ops if op in all_ops())
    vars(all_ops()[ops[0]])["schema_hash"] = "0" * 12
    failures = [f for f in loader.failures() if f.backend == name]
    if ops[0] not in [f.op for f in failures] or any(not f.op for f in failures):
        found = "\n".join(map(str, failures)) or "nothing was refused"
        raise AssertionError(f"this core has another interface of {ops[0]}\n{found}")
    tested = cases.target(name)
    case = _first_served(cases.claims(tested)) if tested.present else None
    if case is not None:
        calls.check(case)


def _has_schema(op_name: str) -> bool:
    """Whether an op can be called; implementations without a schema cannot."""
    return bool(torch._C._dispatch_has_kernel(op_name)) and "schema: (none)" not in str(
        torch._C._dispatch_dump(op_name)
    )


WAYS: dict[str, Callable[[str], None]] = {
    "again": again, "clean": clean, "fork": fork, "rollback": rollback, "threads": threads,
}  # fmt: skip
NEGOTIATIONS: dict[str, Callable[[str], None]] = {"newer": newer}

if __name__ == "__main__":
    (WAYS | NEGOTIATIONS)[sys.argv[1]](sys.argv[2])

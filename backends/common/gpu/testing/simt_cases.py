# SPDX-License-Identifier: Apache-2.0
"""Runs the conformance cases of a SIMT module; a child process of ``test_gpu_sources.py``.

``python simt_cases.py BACKEND LAYOUTS LIMIT [OP ...]``: layouts are ``all`` or names joined by
commas; samples with more elements than the limit are left out.
"""

from __future__ import annotations

import sys

import torch

from opmux.conformance import calls, cases
from opmux.conformance.buffers import DENSE, LAYOUTS, Layout
from opmux.conformance.cases import Case

torch.set_num_threads(1)  # the children share the machine


def kinds(case: Case, names: str) -> list[tuple[Layout, str]]:
    if names == "all":
        planted = [(DENSE, kind) for kind in cases.PLANTS[1:] if not case.empty]
        return [*((layout, "plain") for layout in LAYOUTS if case.differs(layout)), *planted]
    chosen = [layout for layout in LAYOUTS if layout.name in names.split(",")]
    return [(layout, "plain") for layout in chosen if case.differs(layout)]


def run(case: Case, layout: Layout, kind: str) -> bool:
    call = calls.prepare(case, layout)
    if call.allowed() is not None or calls.refusal(case.claim, call) is not None:
        return False
    calls.check(case, layout, kind)
    return True


def main() -> None:
    backend, names, limit, *ops = sys.argv[1:]
    done = 0
    wrong: list[str] = []
    for claim in cases.claims(cases.target(backend, ops)):
        for case in claim.cases():
            if case.size > int(limit):
                continue
            for layout, kind in kinds(case, names):
                try:
                    done += run(case, layout, kind)
                except (AssertionError, RuntimeError) as error:
                    wrong.append(f"{case} {layout} {kind}: {str(error).strip()[:400]}")
    print("\n".join(wrong[:20]))
    print(f"{done} cases, {len(wrong)} wrong")
    sys.exit(1 if wrong or not done else 0)


if __name__ == "__main__":
    main()

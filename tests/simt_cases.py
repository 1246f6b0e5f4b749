# SPDX-License-Identifier: Apache-2.0
"""Runs the conformance cases of one SIMT module and prints a line for each op; see ``simt.py``.

``python simt_cases.py BACKEND LAYOUTS [OP ...]``: layouts are ``all`` or names joined by commas.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from opmux.conformance import calls, cases
from opmux.conformance.buffers import DENSE, LAYOUTS, Layout
from opmux.conformance.cases import Case

# Elements of a sample. The sources run a thousand times slower than on a GPU: one token of the
# largest models, some of the others.
SMALL = 150_000
LOGITS = 300_000  # two rows of a large vocabulary: other paths than a small one, in one layout
MANY = 20  # wrong cases of an op after which the others say nothing new


def kinds(case: Case, names: str) -> list[tuple[Layout, str]]:
    if case.size > SMALL:
        sampling = case.claim.op.__module__.startswith("opmux.ops.sampling.")
        wide = sampling and names == "all" and case.size <= LOGITS
        chosen = [layout for layout in LAYOUTS if wide and layout.name == "rows"]
    elif names == "all":
        chosen = list(LAYOUTS)
    else:
        chosen = [layout for layout in LAYOUTS if layout.name in names.split(",")]
    found = [(layout, "plain") for layout in chosen if case.differs(layout)]
    if names == "all" and case.size <= SMALL and not case.empty:
        found += [(DENSE, kind) for kind in cases.PLANTS[1:]]
    return found


def run(case: Case, layout: Layout, kind: str) -> bool:
    call = calls.prepare(case, layout)
    if call.allowed() is not None or calls.refusal(case.claim, call) is not None:
        return False
    calls.check(case, layout, kind)
    return True


def main() -> None:
    torch.set_num_threads(1)  # the children share the machine
    backend, names, *ops = sys.argv[1:]
    target = cases.target(backend, ops)
    if target.loaded is None:
        sys.exit("\n".join(map(str, cases.loader.failures())))
    claims = cases.claims(target)
    for op in ops or dict.fromkeys(claim.op.name for claim in claims):
        began = time.monotonic()
        done = 0
        wrong: list[str] = []
        mine = [case for claim in claims if claim.op.name == op for case in claim.cases()]
        for case, layout, kind in ((c, *chosen) for c in mine for chosen in kinds(c, names)):
            try:
                done += run(case, layout, kind)
            except (AssertionError, RuntimeError) as error:
                wrong.append(f"{case} {layout} {kind}: {str(error).strip()[:400]}")
                if len(wrong) == MANY:
                    break
        seconds = round(time.monotonic() - began, 1)
        print(json.dumps({"op": op, "cases": done, "wrong": wrong, "seconds": seconds}),
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

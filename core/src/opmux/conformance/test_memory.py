# SPDX-License-Identifier: Apache-2.0
"""What a kernel touches: its results and nothing else, now and later.

Every call of the kit lies between guard zones, and what is found there counts here; these tests are
about what one call alone does not show.
"""

from __future__ import annotations

import pytest
from torch import Tensor

from opmux.conformance import calls
from opmux.conformance.buffers import LAYOUTS
from opmux.conformance.cases import Case, expected
from opmux.conformance.levels import MemoryFault
from opmux.conformance.test_numerics import serve
from opmux.selection import REFERENCE

pytestmark = pytest.mark.opmux_level(5)


def test_stays_inside_its_tensors(one_case: Case) -> None:
    """Rows with gaps, starts that are not aligned: what lies between and around stays."""
    serve(one_case)
    for layout in LAYOUTS:
        if not one_case.differs(layout) or not one_case.allows(layout):
            continue
        if calls.refusal(one_case.claim, calls.prepare(one_case, layout)) is None:
            calls.check(one_case, layout)


def test_keeps_no_hold_on_earlier_calls(one_case: Case) -> None:
    """Later calls, with other values too, leave the tensors of an earlier one alone."""
    serve(one_case)
    first = calls.check(one_case)
    first.remember()
    for kind in ("plain", "tiny", "plain"):
        later = calls.check(one_case, kind=kind)
        try:
            first.check_untouched()
        except MemoryFault as fault:
            raise MemoryFault(f"a later call changed an earlier one's tensors: {fault}") from None
        del later  # its memory may be given to the next call


@pytest.mark.opmux_needs("twins")
def test_reads_one_tensor_as_two_arguments(op_case: Case) -> None:
    """Two arguments that are only read may be the same tensor."""
    serve(op_case)
    op = op_case.claim.op
    values, _ = expected(op_case, "plain")
    for one, other in calls.twins(op_case):
        same = {**values, other: values[one]}
        copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in same.items()}
        result = op(**copies, backend=REFERENCE)
        results = result if isinstance(result, tuple) else (result,)
        wanted = {p.name: copies[p.name] for p in op.params if p.mutated}
        wanted |= dict(zip(op.outs, results, strict=False))
        wanted = {name: value for name, value in wanted.items() if value is not None}
        call = calls.Prepared(op, same, wanted, device=op_case.claim.target.device)
        call.buffers.pop(other)
        call.values[other] = call.values[one]
        calls.run_claimed(op_case.claim, call)
        call.check_guards()
        calls.compare(op, call.results(), wanted)

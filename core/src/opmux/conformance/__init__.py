# SPDX-License-Identifier: Apache-2.0
"""The conformance kit: what every backend must pass, run against one that is installed.

    pytest --pyargs opmux.conformance --opmux-backend NAME [--opmux-level N] [--opmux-op OP]
           [--opmux-report FILE]

Levels rest on each other, ``levels`` names them; ``--opmux-level N`` runs 0 to N, and the report
says which was reached. Cases come from the ops' samples, so a backend adds no test of its own: what
its kernels claim is tested, what they do not claim must be refused, and what an op does not allow
is not tried. The parts: ``cases`` (what is tested), ``buffers`` (guard zones and layouts),
``calls`` (one call, checked), ``misuse`` (calls that must be refused), ``probe`` (loading in fresh
processes), ``report`` (the JSON), ``plugin`` (the options). ``hosts/`` are other cores and torches.
"""

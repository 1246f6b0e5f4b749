# SPDX-License-Identifier: Apache-2.0
"""Mutants that only a GPU shows: streams, graphs, several devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from test_mutants import Mutant, check, run

if not torch.cuda.is_available():
    pytest.skip("this machine has no CUDA device", allow_module_level=True)

RIGHT = {"right_on_the_gpu": Mutant(5, "", "", device="cuda")}
MUTANTS = {
    "nobody_waits": Mutant(3, "test_matches_the_reference[", "tolerance", device="cuda"),
    "wrong_stream": Mutant(5, "test_runs_on_the_current_stream", "tolerance", device="cuda"),
    "synchronises": Mutant(5, "test_a_graph_captures_it", "", device="cuda"),
}
if torch.cuda.device_count() > 1:
    words = "changed the current device"
    MUTANTS["moves_the_current_device"] = Mutant(5, "device_of_its", words, device="cuda")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the kit on every mutant."""
    return run(tmp_path_factory.mktemp("site"), RIGHT | MUTANTS)


@pytest.mark.parametrize("name", MUTANTS)
def test_it_is_caught_at_its_level(reports: dict[str, Any], name: str) -> None:
    check(MUTANTS[name], reports[name])


def test_the_right_one_passes(reports: dict[str, Any]) -> None:
    """The same kernel without the mistake: nothing of the above is the kit's own doing."""
    report = reports["right_on_the_gpu"]
    assert report["passed"], report["failures"]
    assert report["level"] == 5

# SPDX-License-Identifier: Apache-2.0
"""What the set-up builds: unasked only what runs here, as wheels what compiles, else by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "setup.py"


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("opmux_tools_setup", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("have", "asked", "wheels_only", "reason"),
    [
        ((), (), False, "nvcc and nvidia-smi not found"),
        (("nvcc",), (), False, "nvidia-smi not found"),
        (("nvcc", "nvidia-smi"), (), False, ""),
        ((), (), True, "nvcc not found"),
        (("nvcc",), (), True, ""),
        ((), ("cuda",), False, ""),  # the compiler comes from the index
        ((), ("cuda",), True, ""),
    ],
)
def test_when_cuda_is_built(
    setup: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    have: tuple[str, ...],
    asked: tuple[str, ...],
    wheels_only: bool,
    reason: str,
) -> None:
    monkeypatch.setattr(setup.shutil, "which", lambda tool: tool if tool in have else None)
    found = dict(setup.backends(frozenset(asked), wheels_only))
    assert found["cuda"].startswith(reason) and bool(found["cuda"]) == bool(reason)
    assert not reason or "BACKENDS=cuda" in found["cuda"]


def test_a_backend_that_nobody_knows_is_an_error(setup: ModuleType) -> None:
    with pytest.raises(setup.StepError, match=r"no backend is called cdua: .*cuda"):
        list(setup.backends(frozenset({"cdua"}), wheels_only=True))


def test_a_build_for_other_archs_is_another_build(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = setup.ROOT / "Makefile"
    monkeypatch.delenv("OPMUX_CUDA_ARCHS", raising=False)
    every = setup.digest(file)
    monkeypatch.setenv("OPMUX_CUDA_ARCHS", "90a")
    assert setup.digest(file) != every

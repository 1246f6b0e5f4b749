# SPDX-License-Identifier: Apache-2.0
"""The shared GPU kernels, executed on the CPU at warp 32, 64 and 128, and what that would find."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import simt
from opmux.op import all_ops, find
from simt import GPU, MUTANTS, OPS, WARPS, Run

LAYOUTS = {32: "all", 64: "dense,misaligned", 128: "dense,misaligned"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """Build the modules, which takes minutes the first time, and offer each as a backend."""
    pytest.importorskip("pybind11", reason="the SIMT modules are pybind11 extensions")
    if not shutil.which("ninja", path=simt.PATH):
        pytest.skip("ninja is not installed")
    capture = pytestconfig.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled():
        try:
            simt.build()
        except RuntimeError as error:
            print(error)
            pytest.fail("the GPU sources do not compile, see above", pytrace=False)
    folder = tmp_path_factory.mktemp("site")
    simt.offer(folder)
    return folder


@pytest.fixture(scope="module")
def runs(site: Path) -> Iterator[dict[int, Run]]:
    """The cases of every width, which run beside each other while the tests wait for them."""
    started = {warp: Run(site, str(warp), LAYOUTS[warp], sorted(OPS)) for warp in WARPS}
    yield started
    for run in started.values():
        run.stop()


@pytest.mark.parametrize("op", sorted(OPS))
@pytest.mark.parametrize("warp", WARPS)
def test_every_shared_op_matches_the_reference(runs: dict[int, Run], warp: int, op: str) -> None:
    """At warp 32 in every layout and with special values, else dense and misaligned."""
    found = runs[warp].result(op)
    assert not found["wrong"], "\n".join(found["wrong"])
    assert found["cases"] > 0, f"no sample of {op} is small enough to run here"


def test_every_shared_op_is_defined_and_claimed() -> None:
    assert sorted(set(OPS) - set(all_ops())) == [], "without a definition in core"
    assert sorted(set(OPS) - set(simt.claims())) == [], "without a line in opmux_cuda/kernels.py"
    families = {name: path.parent.name for name, path in OPS.items()}
    assert families == {name: find(name).__module__.split(".")[-2] for name in OPS}


@pytest.fixture(scope="module")
def mutants(site: Path) -> Iterator[dict[str, Run]]:
    started = {name: Run(site, name, "all", [MUTANTS[name].op]) for name in MUTANTS}
    yield started
    for run in started.values():
        run.stop()


@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_mutants_are_found(mutants: dict[str, Run], name: str) -> None:
    """Each by the error that says what is wrong, not by chance."""
    wrong = mutants[name].result(MUTANTS[name].op)["wrong"]
    assert wrong, f"{name} passed"
    assert MUTANTS[name].error in "\n".join(wrong)


NATIVE = ("top_k_top_p_sample", "top_p_renorm_prob", "top_k_renorm_prob", "store_kv_cache",
          "rotary_embedding", "apply_token_bitmask", "mrope", "fused_qk_norm_rope",
          "fused_qk_norm_rope_store_kv")  # fmt: skip


@pytest.fixture(scope="module")
def module(site: Path) -> ModuleType:
    """Import the extension of warp 64."""
    path = simt.library("64")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_each_file_implements_the_op_that_it_is_named_after(module: ModuleType) -> None:
    lines = module.interface().split("\n")[:-1]
    assert module.warp == 64
    assert lines == [find(name).interface for name in sorted(OPS)]


@pytest.fixture(scope="module")
def native(module: ModuleType) -> Iterator[Any]:
    """Register some ops of one module in this process, without core's checks before them."""
    definitions = torch.library.Library("opmux_test_simt", "DEF")
    for name in NATIVE:
        definitions.define(name + find(name).schema)
    module.register("opmux_test_simt")
    yield torch.ops.opmux_test_simt
    definitions._destroy()


ROWS = ("uniform", "ties", "equal", "peaked", "weird", "none")


def rows(kind: str, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    noise = torch.rand(2, size, generator=generator)
    if kind == "ties":
        return (noise * 5).floor() / size
    if kind == "equal":
        return torch.full((2, size), 1 / size)
    if kind == "peaked":
        return torch.softmax(noise * 60, -1)
    if kind == "weird":
        noise[:, ::3] = -1
        noise[:, 1::5] = torch.nan
        return noise
    return noise if kind == "uniform" else torch.zeros(2, size)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("size", [8192, 4999])  # vectors, and none
def test_filters_on_rows_of_every_kind(native: Any, kind: str, size: int) -> None:
    """Few candidates, too many, none; ties at the threshold: tokens are equal, not close."""
    probs = rows(kind, size)
    uniform = torch.tensor([0.0, 0.73])
    for k, p, joint in ((0, 0.9, False), (3000, 0.7, False), (size - 1, 0.5, True), (50, 0.2, True),
                        (0, 1.0, False), (4500, 0.99, False), (1, 0.0, False)):  # fmt: skip
        token = torch.full((2,), -7, dtype=torch.int32)
        native.top_k_top_p_sample(probs, None, k, None, p, uniform, joint, token)
        wanted = find("top_k_top_p_sample")(probs, k, p, uniform, joint, backend="reference")
        assert torch.equal(token, wanted), (k, p, joint, token, wanted)
    for k in (50, 3000):
        out = torch.full_like(probs, 9)
        native.top_k_renorm_prob(probs, None, k, out)
        torch.testing.assert_close(out, find("top_k_renorm_prob")(probs, k, backend="reference"))
    out = torch.full_like(probs, 9)
    native.top_p_renorm_prob(probs, None, 0.6, out)
    torch.testing.assert_close(out, find("top_p_renorm_prob")(probs, 0.6, backend="reference"))


@pytest.mark.parametrize("bad", [-1, 5, 1 << 40])
def test_indices_outside_are_skipped(native: Any, bad: int) -> None:
    """On a device nobody can look at them before the launch; nothing else is touched."""
    slots = torch.tensor([2, bad])
    cache, new = torch.zeros(2, 5, 8), torch.ones(2, 2, 8)
    native.store_kv_cache(cache[0], cache[1], slots, new[0], new[1], None, 1.0, None, 1.0)
    assert torch.equal(cache.nonzero()[:, 1].unique(), torch.tensor([2]))

    query = torch.ones(2, 8)
    native.rotary_embedding(slots, query, None, 8, torch.full((5, 8), 0.5), True)
    assert torch.equal(query[1], torch.ones(8)) and not torch.equal(query[0], query[1])

    logits = torch.ones(5, 8)
    native.apply_token_bitmask(logits, torch.zeros(5, 1, dtype=torch.int32), slots)
    assert torch.equal(logits.isinf().nonzero()[:, 0].unique(), torch.tensor([2]))


@pytest.mark.parametrize("bad", [-1, 5, 1 << 40])
@pytest.mark.parametrize("head_dim", [64, 6])  # vectors, and none
def test_positions_outside_leave_a_token_as_it_is(native: Any, bad: int, head_dim: int) -> None:
    """In place and on the way to the cache; a slot outside keeps the query's part."""
    positions, slots = torch.tensor([2, bad, 3]), torch.tensor([4, 1, bad])
    angles = torch.full((5, head_dim), 0.5)
    for row in range(3):
        query, rows = torch.ones(3, 2 * head_dim), torch.zeros(3, 3, dtype=torch.int64)
        rows[row] = positions
        native.mrope(rows, query, None, head_dim, angles, 1, 1, head_dim // 2 - 2, False, True)
        assert query.ne(1).any(-1).tolist() == [True, False, True]
    weight = torch.full((head_dim,), 3.0)
    norm = (2, 1, 1, head_dim, 1e-6, weight, weight, angles, True, positions)
    qkv = torch.ones(3, 4 * head_dim)
    native.fused_qk_norm_rope(qkv, *norm)
    assert qkv.ne(1).any(-1).tolist() == [True, False, True]

    qkv, cache = torch.ones(3, 4 * head_dim), torch.zeros(2, 5, head_dim)
    caches = cache[0], cache[1]
    native.fused_qk_norm_rope_store_kv(qkv, *caches, slots, *norm, None, 1.0, None, 1.0)
    assert qkv.ne(1).any(-1).tolist() == [True, False, True]
    assert torch.equal(cache.nonzero()[:, 1].unique(), torch.tensor([4]))


def test_shared_sources_name_no_vendor() -> None:
    """Only the vendor headers may: an op file must compile for all of them."""
    allowed = {GPU / "gpu.h", *(GPU / "vendors").iterdir(), *(GPU / "testing").iterdir()}
    pattern = re.compile(
        r"\b(cuda[A-Z]\w*|hip[A-Z]\w*|musa[A-Z]\w*|__nv_\w+|OPMUX_VENDOR_\w+|asm\s*[(v])"
    )
    found = [
        f"{path.relative_to(GPU)}: {match[0]}"
        for path in sorted(GPU.rglob("*"))
        if path.is_file() and path not in allowed
        for match in pattern.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)

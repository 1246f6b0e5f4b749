# SPDX-License-Identifier: Apache-2.0
"""The shared GPU kernels, executed on the CPU at warp 32, 64 and 128, and what that would find."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from opmux.op import all_ops, find
from plugins import make_plugin, manifest_for

ROOT = Path(__file__).resolve().parent.parent
GPU = ROOT / "backends" / "common" / "gpu"
PACKAGES = ROOT / "backends" / "cuda" / "src"
BUILD = ROOT / "build" / "simt"  # kept: only what has changed is compiled again
WARPS = (32, 64, 128)
SMALL = 150_000  # elements of a sample: one token of the largest models, some of the others
LOGITS = 300_000  # takes in two rows of a large vocabulary

# name -> (file, what is replaced, by what, op, warp, what the run says)
MUTANTS = {
    "missing_barrier": (
        "reduce.cuh", "  if (lane == 0) scratch[warp] = value;\n  __syncthreads();",
        "  if (lane == 0) scratch[warp] = value;", "norm/rmsnorm", 32, "shared memory read before",
    ),
    "reused_too_early": (
        "sampling/row.cuh", "f, w.counts);\n  __syncthreads();", "f, w.counts);",
        "sampling/min_p_sample", 32, "race: shared memory written without a barrier",
    ),
    "thirty_two_lanes": (
        "reduce.cuh", "reduce_lanes<kWarp>(value, f);\n  if", "reduce_lanes<32>(value, f);\n  if",
        "norm/rmsnorm", 64, "tolerance",
    ),
    "out_of_bounds": (
        "reduce.cuh", "scratch[warp] = value", "scratch[warp + kMaxWarps] = value",
        "norm/rmsnorm", 32, "out of its bounds",
    ),
    "divergent_barrier": (
        "norm/norm_kernels.cuh", "  float value[kSize];\n  float squares = 0;\n",
        "  float value[kSize];\n  float squares = 0;\n  if (first >= a.width) return;\n",
        "norm/rmsnorm", 32, "only some threads reach",
    ),
    "does_not_wait": (
        "norm/norm_kernels.cuh", "  wait_for_previous();\n", "", "norm/rmsnorm", 32,
        "without wait_for_previous",
    ),
}  # fmt: skip

PLUGIN = """
from pathlib import Path
from opmux import Backend, hookimpl
from opmux_cuda.kernels import KERNELS

OPS = {ops!r}

@hookimpl
def opmux_backend() -> Backend:
    kernels = {{name: KERNELS[name] for name in OPS}}
    return Backend(name={name!r}, device="cpu", kernels=kernels, library=Path({library!r}))
"""


def mutated(name: str) -> str:
    """Write the sources of a mutant, unless they are there, and describe it to CMake."""
    file, old, new, op, warp, _ = MUTANTS[name]
    folder = BUILD / "mutants" / name
    for source in GPU.rglob("*"):
        if not source.is_file():
            continue
        text = source.read_text(encoding="utf-8")
        if source == GPU / file:
            assert old in text, f"{name}: {file} has changed, change the mutant too"
            text = text.replace(old, new, 1)
        target = folder / source.relative_to(GPU)
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    return f"{name}:{warp}:{op}:{folder}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the modules and offer each as a backend."""
    pytest.importorskip("pybind11", reason="the SIMT modules are pybind11 extensions")
    if not shutil.which("ninja"):
        pytest.skip("ninja is not installed")
    from opmux_cuda.kernels import KERNELS

    shared = {path.stem for path in GPU.glob("*/*.cu")}
    BUILD.mkdir(parents=True, exist_ok=True)
    steps = (
        ["cmake", "-S", str(GPU / "testing"), "-B", str(BUILD), "-G", "Ninja",
         f"-DPython_EXECUTABLE={sys.executable}",
         "-DOPMUX_MUTANTS=" + ";".join(mutated(name) for name in MUTANTS)],
        ["cmake", "--build", str(BUILD), "-j", os.environ.get("MAX_JOBS", "2")],
    )  # fmt: skip
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    folder = tmp_path_factory.mktemp("site")
    for suffix in [*map(str, WARPS), *(f"_{name}" for name in MUTANTS)]:
        library = BUILD / f"_opmux_simt{suffix}.so"
        only = MUTANTS[suffix[1:]][3].rpartition("/")[2] if suffix.startswith("_") else None
        ops = [only] if only else sorted(shared & set(KERNELS) & set(all_ops()))
        digest = hashlib.sha256(library.read_bytes()).hexdigest()
        make_plugin(
            folder,
            dist=f"opmux-simt{suffix}".replace("_", "-"),
            name=f"simt{suffix}",
            code=PLUGIN.format(ops=ops, name=f"simt{suffix}", library=str(library)),
            manifest=manifest_for(f"simt{suffix}", ops, library={"sha256": digest}),
        )
    return folder


@pytest.fixture(scope="module", autouse=True)
def _cuda_package() -> None:
    sys.path.insert(0, str(PACKAGES))


def run(site: Path, *args: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, str(Path(__file__).with_name("simt_cases.py")), *args],
        env={**os.environ, "PYTHONPATH": path, "OPMUX_BACKENDS": args[0]},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


SAMPLERS = ("top_k_top_p_sample", "top_p_renorm_prob", "top_k_renorm_prob", "min_p_sample")


def test_every_shared_op_matches_the_reference(site: Path) -> None:
    """Warp 32 in every layout and with special values, the others dense and misaligned."""
    runs = [
        ("simt32", "all", str(SMALL)),
        ("simt64", "dense,misaligned", str(SMALL)),
        ("simt128", "dense,misaligned", str(SMALL)),
        ("simt32", "rows", str(LOGITS), *SAMPLERS),
    ]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda args: run(site, *args), runs))
    for args, done in zip(runs, results, strict=True):
        assert done.returncode == 0, f"{args}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        count = re.search(r"(\d+) cases", done.stdout)
        assert count is not None and int(count[1]) > 100, done.stdout


@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_mutants_are_found(site: Path, name: str) -> None:
    """Each by the error that says what is wrong, not by chance."""
    done = run(site, f"simt_{name}", "all", str(SMALL))
    assert done.returncode == 1, f"{name} passed\n{done.stdout}{done.stderr}"
    assert MUTANTS[name][5] in done.stdout, done.stdout


@pytest.fixture(scope="module")
def native(site: Path) -> object:
    """Register the ops of one module in this process."""
    library = ctypes.CDLL(str(BUILD / "_opmux_simt64.so"))
    library.opmux_register.restype = ctypes.c_char_p
    definitions = torch.library.Library("opmux_test_simt", "DEF")
    for name in (*SAMPLERS, "store_kv_cache", "rotary_embedding", "apply_token_bitmask"):
        definitions.define(name + find(name).schema)
    assert library.opmux_register(b"opmux_test_simt") is None
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
def test_filters_on_rows_of_every_kind(native: object, kind: str, size: int) -> None:
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
def test_indices_outside_are_skipped(native: object, bad: int) -> None:
    """On a device nobody can look at them before the launch; nothing else is touched."""
    slots = torch.tensor([2, bad])
    cache, new = torch.zeros(2, 5, 8), torch.ones(2, 2, 8)
    native.store_kv_cache(cache[0], cache[1], slots, new[0], new[1])
    assert torch.equal(cache.nonzero()[:, 1].unique(), torch.tensor([2]))

    query = torch.ones(2, 8)
    native.rotary_embedding(slots, query, None, 8, torch.full((5, 8), 0.5), True)
    assert torch.equal(query[1], torch.ones(8)) and not torch.equal(query[0], query[1])

    logits = torch.ones(5, 8)
    native.apply_token_bitmask(logits, torch.zeros(5, 1, dtype=torch.int32), slots)
    assert torch.equal(logits.isinf().nonzero()[:, 0].unique(), torch.tensor([2]))


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

# SPDX-License-Identifier: Apache-2.0
"""The examples are wheels like those of third parties: built, installed, conformance-tested."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from environments import ROOT, Environment, job
from opmux import manifest
from opmux.op import find

CHOOSES = """
import json
import torch, opmux

assert "acme_pybind11" in {b.name for b in opmux.load().backends}, opmux.failures()
x, w, half = torch.randn(4, 64), torch.randn(64), torch.randn(4, 64).half()
found = {
    "specific": opmux.rmsnorm.explain(x, w).winner.name,
    "why": opmux.rmsnorm.explain(x, w).why,
    "predicate": opmux.silu_and_mul.explain(x).winner.name,
    "outside": opmux.rmsnorm.explain(half, w.half()).winner.name,
    "backends": sorted(b.name for b in opmux.load().backends),
}
with opmux.use("cpu_amx", "*"):
    found["other"] = opmux.rmsnorm.explain(x, w).winner.name
with opmux.use("acme_pybind11", "*"):
    found["policy"] = opmux.rmsnorm.explain(x, w).winner.name
    found["policy why"] = opmux.rmsnorm.explain(x, w).why
print(json.dumps(found))
"""
TORCH_OPS = """
import torch, opmux

name = "acme_pybind11"
opmux.load()
schema = str(torch.ops.opmux_acme_pybind11.fused_add_rmsnorm.default._schema)
assert "Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps) -> ()" in schema, schema

x, w = torch.randn(5, 3, 64), torch.randn(64)
out = torch.empty_like(x)
assert opmux.rmsnorm(x, w, out=out, backend=name) is out
torch.testing.assert_close(out, opmux.rmsnorm(x, w, backend="reference"))

@torch.compile(fullgraph=True, backend="inductor")
def block(x, residual, w):
    opmux.fused_add_rmsnorm(x, residual, w, backend=name)
    return opmux.silu_and_mul(opmux.rmsnorm(x, w, backend=name), backend=name)

a, r = torch.randn(5, 64), torch.randn(5, 64)
b, s = a.clone(), r.clone()
got = block(a, r, w)
opmux.fused_add_rmsnorm(b, s, w, backend="reference")
wanted = opmux.silu_and_mul(opmux.rmsnorm(b, w, backend="reference"), backend="reference")
torch.testing.assert_close((a, r, got), (b, s, wanted))

for call, word in (
    (lambda: opmux.rmsnorm(x, w[:-1], backend=name), "weight"),
    (lambda: opmux.rmsnorm(x, w.double(), backend=name), "weight"),
    (lambda: opmux.rmsnorm(x[..., ::2], w[:32], backend=name), "contiguous"),
):
    try:
        call()
    except (TypeError, ValueError) as error:
        assert word in str(error) and "rmsnorm" in str(error), error
    else:
        raise AssertionError(word)
print("held")
"""


def install(author: Environment, name: str, folder: Path) -> Path:
    """Install an example, built from a copy, into a folder of its own."""
    project = folder / name
    ignored = shutil.ignore_patterns("build", "__pycache__")
    shutil.copytree(ROOT / "examples" / name, project, ignore=ignored)
    author.install(author.build(project), "--target", folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def pybind11_site(author: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(author, "acme_pybind11", tmp_path_factory.mktemp("acme"))


def conform(author: Environment, folder: Path) -> Any:
    site = install(author, "acme_pybind11", folder)
    report = folder / "conformance.json"
    # speed is not what plain loops are about, nor what a shared machine can measure
    author.conform("acme_pybind11", "--opmux-level", "7", "--opmux-report", report, cwd=folder,
                   PYTHONPATH=str(site))  # fmt: skip
    return json.loads(report.read_text())


@job(conform)
def test_existing_vendor_code_conforms(outcome: Any) -> None:
    assert outcome["passed"] and outcome["level"] == 7
    assert set(outcome["ops"]) == {"fused_add_rmsnorm", "rmsnorm", "silu_and_mul"}


def test_it_is_chosen_by_policy_and_by_its_declared_domain(
    author: Environment, pybind11_site: Path
) -> None:
    done = author.run(author.python, "-c", CHOOSES, PYTHONPATH=str(pybind11_site))
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["policy"] == "acme_pybind11"
    if "cpu_amx" not in found["backends"]:
        pytest.skip("opmux-cpu-amx is not in service here: see opmux doctor")
    assert found["specific"] == found["predicate"] == "acme_pybind11"
    assert found["why"] == "narrower declared domain than cpu_amx"
    assert "use()" in found["policy why"]
    assert found["outside"] == found["other"] == "cpu_amx"


def test_its_functions_are_torch_ops(author: Environment, pybind11_site: Path) -> None:
    done = author.run(author.python, "-c", TORCH_OPS, PYTHONPATH=str(pybind11_site))
    assert done.stdout.endswith("held\n"), done.stdout


def test_a_module_of_another_build_is_refused(
    author: Environment, pybind11_site: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    shutil.copytree(pybind11_site, site)
    native = next(site.glob("opmux_acme_pybind11/_native*.so"))
    code = "import opmux; print(*opmux.failures(), sep='\\n')"
    native.write_bytes(native.read_bytes() + b"\0")
    done = author.run(author.python, "-c", code, PYTHONPATH=str(site))
    assert "is not the one that its manifest names" in done.stdout
    native.unlink()
    done = author.run(author.python, "-c", code, PYTHONPATH=str(site))
    assert "extension module opmux_acme_pybind11._native does not exist" in done.stdout


def test_triton_kernels_are_refused_without_triton_or_match(
    author: Environment, tmp_path: Path
) -> None:
    site = install(author, "acme_triton", tmp_path)
    code = (
        "import sys, importlib.util, opmux, opmux_acme_triton\n"
        "assert 'triton' not in sys.modules, 'importing the package imports Triton'\n"
        "print(*opmux.failures())\n"
    )
    done = author.run(author.python, "-c", code, PYTHONPATH=str(site))
    tests = author.pytest(ROOT / "examples/acme_triton/tests", cwd=tmp_path, PYTHONPATH=str(site))
    if "Triton is not installed (pip install triton)" in done.stdout:
        assert "Triton is not installed" in tests and "skipped" in tests
    else:
        assert "2 passed" in tests


@pytest.mark.parametrize("example", ["acme_triton"])
def test_manifests_in_the_tree_are_fresh(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples" / example / "src")
    static = manifest.find(f"opmux_{example}")
    kernels = __import__(f"opmux_{example}.kernels", fromlist=["KERNELS"]).KERNELS
    assert dict(static.ops) == {op: find(op).schema_hash for op in kernels}
    sys.modules.pop(f"opmux_{example}", None)

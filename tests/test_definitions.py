# SPDX-License-Identifier: Apache-2.0
"""Op definitions: complete, in one place, and enough by themselves."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fakes
import opmux
from opmux import loader, ops
from opmux.kernel import Backend, Kernel
from opmux.op import OPS, all_ops, find, op
from opmux.samples import Sample, Tolerance, randn

NAMES = sorted(all_ops())
ROOT = Path(__file__).parents[1]
ORDER = ("Shapes:", "Raises:", "Source:")
# The digests are a promise to backends that are already built. A changed one needs a new op
# interface: every backend in the field then refuses the op until it is built again.
DIGESTS = {
    "silu_and_mul": "(Tensor x, Tensor(a!) out) -> ()",
    "rmsnorm": "(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()",
    "fused_add_rmsnorm": "(Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps) -> ()",
    "rotary_embedding": (
        "(Tensor positions, Tensor(a!) query, Tensor(b!)? key, int head_dim, "
        "Tensor cos_sin_cache, bool is_neox) -> ()"
    ),
    "store_kv_cache": (
        "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, Tensor k, Tensor v, "
        "Tensor? k_scale_per_row, float k_scale, Tensor? v_scale_per_row, float v_scale) -> ()"
    ),
    "apply_token_bitmask": "(Tensor(a!) logits, Tensor bitmask, Tensor? indices) -> ()",
    "top_k_top_p_sample": (
        "(Tensor probs, Tensor? top_k_per_row, int top_k, Tensor? top_p_per_row, float top_p, "
        "Tensor uniform, bool joint, Tensor(a!) out) -> ()"
    ),
}
HASHES = {
    "apply_token_bitmask": "c80a64cc52b1",
    "fused_add_rmsnorm": "24d1e5b83ae8",
    "gelu_and_mul": "f38be8377e93",
    "gelu_quick": "f96fcbf132ba",
    "gelu_tanh_and_mul": "29f5db9e6c41",
    "gemma_fused_add_rmsnorm": "14c597d9ca38",
    "gemma_rmsnorm": "ebd8b7d599d3",
    "min_p_sample": "7836656158df",
    "rmsnorm": "847b12f42a90",
    "rotary_embedding": "b21017af9f1b",
    "silu_and_mul": "bfdd3a31876d",
    "store_kv_cache": "8e1cbb7ba3b9",
    "top_k_renorm_prob": "8ffc7ff9e8cc",
    "top_k_top_p_sample": "3bd51059590b",
    "top_p_renorm_prob": "cba3c86c0830",
}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    fakes.isolate(monkeypatch, tmp_path)
    before = dict(OPS)
    yield
    for name in set(OPS) - set(before):
        del OPS[name]
    loader.reset()


# ---- every definition ----


@pytest.mark.parametrize("name", NAMES)
def test_docstring(name: str) -> None:
    """Formula, numerics, then the sections in their order; every argument has its shape."""
    text = find(name).__doc__ or ""
    places = [text.find(f"\n    {section}") for section in ORDER]
    assert min(places) > 0, f"{name}: sections missing of {ORDER}"
    assert places == sorted(places)
    head = text[: places[0]]
    assert len(head.strip().splitlines()) >= 3, f"{name}: a formula, then its numerics"
    assert re.search(r"arXiv:\d{4}\.\d{5}|https?://|doi:|\w", text[places[2] + 13 :])
    shapes = text[places[0] : places[1]]
    for p in find(name).params:
        if p.is_tensor or p.per_row:
            assert re.search(rf"\b{p.name}\b", shapes), f"{name}: Shapes: does not name {p.name}"


@pytest.mark.parametrize("name", NAMES)
def test_samples(name: str) -> None:
    """There are some, one is empty, all are accepted and drawn alike for one seed."""
    definition = find(name)
    samples = definition.draw()
    assert len(samples) >= 3
    dtype = definition.dtypes[0] if definition.dtypes else torch.float32
    small = 0
    names = [p.name for p in definition.params]
    for sample in samples:
        args, kwargs = sample.make(dtype)
        call = {p.name: p.default for p in definition.params} | dict(zip(names, args, strict=False))
        definition.check(list((call | kwargs).values()))
        call |= kwargs
        small += any(isinstance(v, Tensor) and not v.numel() for v in call.values())
        for a, b in zip(args, sample.make(dtype)[0], strict=True):
            if isinstance(a, Tensor):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert small, f"{name}: no empty sample"


@pytest.mark.parametrize("name", NAMES)
def test_file_and_names(name: str) -> None:
    """ops/<family>/<op>.py defines <op> and no other."""
    definition = find(name)
    family = ops.families()[name]
    assert definition.__module__ == f"opmux.ops.{family}.{name}"
    source = Path(sys.modules[definition.__module__].__file__ or "").read_text()
    assert len(re.findall(r"^@op\b", source, re.MULTILINE)) == 1
    assert getattr(opmux, name).__name__ == name
    assert name in dir(opmux)


@pytest.mark.parametrize("name", NAMES)
def test_interface_follows_the_schema(name: str) -> None:
    """The library's side of the handshake: one type for each schema argument."""
    definition = find(name)
    arguments = definition.schema.removeprefix("(").removesuffix(") -> ()").split(", ")
    kinds = definition.interface.removeprefix(f"{name}(").removesuffix(")").split(",")
    assert len(arguments) == len(kinds)
    for argument, kind in zip(arguments, kinds, strict=True):
        plain = re.sub(r"\(\w!\)", "!", argument.split(" ")[0])
        assert plain == kind
    mutated = {n for n, _, m in definition.native if m}
    assert mutated == {p.name for p in definition.params if p.mutated} | set(definition.outs)
    torch._C.parse_schema(name + definition.schema)


@pytest.mark.parametrize("name", NAMES)
def test_tolerance_has_a_reason(name: str) -> None:
    tolerance = find(name).tolerance
    assert len(tolerance.reason.split()) >= 4
    if tolerance != Tolerance():
        assert tolerance.reason != Tolerance().reason, "another tolerance needs its own reason"


def test_schemas_and_hashes_are_stable() -> None:
    """See DIGESTS above before changing these."""
    assert {name: find(name).schema for name in DIGESTS} == DIGESTS
    assert {name: find(name).schema_hash for name in HASHES} == HASHES


def test_no_schema_text_outside_core() -> None:
    """Backends implement; what an op's schema is, core says."""
    sources = [
        path
        for folder in (ROOT / "backends", ROOT / "examples")
        for path in folder.rglob("*")
        if path.suffix in {".cpp", ".h", ".cu", ".cuh", ".hip", ".py", ".cmake", ".txt"}
        and not {"build", "dist", "node_modules"} & set(path.relative_to(ROOT).parts)
    ]
    assert sources
    for path in sources:
        text = path.read_text(encoding="utf-8", errors="replace")
        found = re.search(r'-> \(\)|"\w*\(Tensor(\([a-z]!\))?\?? \w', text)
        assert found is None, f"{path}: {found and found.group()}"


# ---- ops defined here ----


def test_union_arguments() -> None:
    """``Tensor | int`` is a per-row tensor and a scalar in the schema, one argument outside."""

    @op
    def scale_rows(x: Tensor, factor: Tensor | float, times: Tensor | int = 1) -> Tensor:
        f = factor[:, None] if isinstance(factor, Tensor) else factor
        n = times[:, None] if isinstance(times, Tensor) else times
        return (x.float() * f * n).to(x.dtype)

    @scale_rows.outputs
    def _(x: Tensor, factor: Tensor | float, times: Tensor | int) -> Tensor:
        return torch.empty_like(x)

    assert scale_rows.schema == (
        "(Tensor x, Tensor? factor_per_row, float factor, Tensor? times_per_row, int times, "
        "Tensor(a!) out) -> ()"
    )
    assert scale_rows.interface == "scale_rows(Tensor,Tensor?,float,Tensor?,int,Tensor!)"
    seen = []

    def kernel(
        x: Tensor, fs: Tensor | None, f: float, ns: Tensor | None, n: int, out: Tensor
    ) -> None:
        seen.append((fs is not None, f, ns is not None, n))
        out.copy_(scale_rows.body(x, f if fs is None else fs, n if ns is None else ns))

    fakes.serve(Backend("acme", "cpu", {"scale_rows": Kernel(opmux.FLOATS, fn=kernel)}))
    x, f, n = torch.randn(3, 4), torch.rand(3), torch.arange(3)
    for args in ((x, f, n), (x, 2.0, n), (x, f, 3), (x, 0.5)):
        assert torch.equal(scale_rows.call(*args), scale_rows.call(*args, backend="reference"))
    assert seen == [(True, 0, True, 0), (False, 2.0, True, 0), (True, 0, False, 3),
                    (False, 0.5, False, 1)]  # fmt: skip
    with pytest.raises(TypeError, match="scale_rows: factor must be a Tensor or float, got str"):
        scale_rows.call(x, "2", backend="reference")


@pytest.mark.parametrize("who", ["reference", "acme"])
def test_several_outputs(who: str) -> None:
    """Outputs of an op that returns a tuple: allocated, given, or some of each; compiled, too."""

    @op(out=("low", "high"))
    def split_halves(x: Tensor, up: float = 0.0) -> tuple[Tensor, Tensor]:
        low, high = x.chunk(2, dim=-1)
        return low.clone(), high + up

    @split_halves.outputs
    def _(x: Tensor, up: float) -> tuple[Tensor, Tensor]:
        half = x.shape[-1] // 2
        return x.new_empty(*x.shape[:-1], half), x.new_empty(*x.shape[:-1], half)

    @split_halves.samples
    def _() -> Iterator[Sample]:
        yield Sample(randn(2, 8))

    def kernel(x: Tensor, up: float, low: Tensor, high: Tensor) -> None:
        a, b = split_halves.body(x, up)
        low.copy_(a)
        high.copy_(b)

    fn = fakes.recorder("acme", kernel)
    fakes.serve(Backend("acme", "cpu", {"split_halves": Kernel(opmux.FLOATS, fn=fn)}))
    assert split_halves.schema == "(Tensor x, float up, Tensor(a!) low, Tensor(b!) high) -> ()"
    x = torch.randn(2, 8)
    expected = split_halves.body(x, 1.0)
    given = torch.empty(2, 4)
    for got in (
        split_halves.call(x, 1.0, backend=who),
        split_halves.call(x, 1.0, torch.empty(2, 4), backend=who),
        split_halves.call(x, up=1.0, high=given, backend=who),
        split_halves.bind(x, 1.0, backend=who)(x, 1.0),
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert split_halves.call(x, high=given, backend=who)[1] is given
    with pytest.raises(ValueError, match=r"split_halves: high must have shape \(2, 4\)"):
        split_halves.call(x, high=torch.empty(2, 5), backend=who)
    assert split_halves.explain(x, backend=who).winner.name == who
    calls = len(fakes.RAN)
    split_halves.call(x)
    assert len(fakes.RAN) == calls + 1


NEW = '''
from torch import Tensor
from opmux.op import op
@op
def brand_new(x: Tensor) -> Tensor:
    """x + 1."""
    return x + 1
@brand_new.outputs
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)
'''


def test_a_definition_file_is_all_an_op_needs(tmp_path: Path) -> None:
    """Reference, explain, bind, kernels of a backend and policy: none needs another line."""
    (tmp_path / "opmux_brand_new_op.py").write_text(NEW)
    with fakes.on_path(tmp_path):
        brand_new = importlib.import_module("opmux_brand_new_op").brand_new
        x = torch.zeros(2, 3)
        assert torch.equal(brand_new.call(x), torch.ones(2, 3))
        assert brand_new.explain(x).winner.name == "reference"
        kernel = Kernel(opmux.FLOATS, fn=fakes.recorder("acme", lambda x, out: out.fill_(7)))
        fakes.serve(Backend("acme", "cpu", {"brand_new": kernel}))
        assert brand_new.call(x).unique().item() == 7
        assert brand_new.bind(x)(x).unique().item() == 7
        with opmux.use(ops={"brand_new": {"backends": ["reference"]}}):
            assert brand_new.call(x).unique().item() == 1


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("@op\ndef f(x: list) -> Tensor: ...", TypeError, "annotation of x must be one of"),
        ("@op\ndef f(x) -> Tensor: ...", TypeError, "annotation of x must be one of"),
        ("@op\ndef f(n: int) -> Tensor: ...", TypeError, "needs a tensor argument"),
        ("@op(mutates=('y',))\ndef f(x: Tensor) -> None: ...", TypeError, "names no argument: y"),
        ("@op\ndef silu_and_mul(x: Tensor) -> Tensor: ...", ValueError, "is defined twice"),
        ("@op\ndef f(x: Tensor) -> Tensor: ...\nf.draw()", TypeError, "has no @f.samples"),
        ("@op\ndef f(x: Tensor) -> Tensor: ...\nf.allocate(1)", TypeError, "has no @f.outputs"),
    ],
)
def test_wrong_definitions(code: str, error: type[Exception], message: str) -> None:
    """Each is refused with the op's name, and a sentence."""
    text = "from __future__ import annotations\nfrom torch import Tensor\nfrom opmux.op import op\n"
    with pytest.raises(error, match=message):
        exec(compile(text + code, "definition", "exec"), {"__name__": "definition"})


def test_find_suggests() -> None:
    with pytest.raises(ValueError, match="unknown op 'rms_norm'; did you mean rmsnorm"):
        find("rms_norm")
    with pytest.raises(AttributeError, match="no attribute 'rms_norm'"):
        _ = opmux.rms_norm

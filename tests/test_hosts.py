# SPDX-License-Identifier: Apache-2.0
"""What would run elsewhere: the hosts of the package, host files, and the reviewed decisions."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import fakes
import opmux
from opmux import Backend, Capability, Code, Kernel, Reason, hosts, loader, selection
from opmux.cli import report
from opmux.cli.app import cli
from opmux.op import all_ops, find
from opmux.policy import Settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import tables  # noqa: E402

NAMES = ["b200", "h100", "mi300x", "mi355x", "s5000", "sapphire_rapids", "zen4"]
BF16 = Kernel((torch.bfloat16,), fn=fakes.silu_and_mul)


@pytest.fixture(autouse=True)
def _nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    fakes.isolate(monkeypatch, tmp_path)
    yield
    loader.reset()


def explain(*args: str) -> Result:
    return CliRunner().invoke(cli, ["explain", "silu_and_mul", *args])


def decide(host: hosts.Host, *backends: Backend, dtype: torch.dtype = torch.bfloat16) -> Any:
    registry = hosts.registry(host, [(b, f"opmux-{b.name}", "1") for b in backends])
    signature = report.signature_of(find("silu_and_mul"), dtype, hosts.device(host.device))
    return selection.evaluate(find("silu_and_mul"), signature, lambda _: Settings(), registry)


def test_decisions_are_those_that_were_reviewed() -> None:
    """All ops on all hosts; `make tables` writes the file, a review accepts its difference."""
    assert tables.HOSTS.read_text() == tables.hosts_page(), "run: make tables, and read the diff"


def test_the_record_of_wheels_is_the_page() -> None:
    assert tables.ABI.read_text() == tables.abi_page(), "run: make tables"


def test_every_host_of_the_package_is_sound() -> None:
    assert hosts.names() == NAMES
    for name in NAMES:
        host = hosts.load(name)
        assert host.device in host.devices and host.title
        assert host.devices[host.device].arch
        assert all(r.remedy or r.sentence for r in host.refused.values())


@pytest.mark.parametrize("name", NAMES)
def test_every_op_has_a_kernel_everywhere(name: str) -> None:
    """The reference at least; and nothing of this machine shines through."""
    host = hosts.load(name)
    registry = hosts.registry(host, tables.source_backends())
    for op in all_ops().values():
        signature = report.signature_of(
            op, (op.dtypes or opmux.FLOATS)[0], hosts.device(host.device)
        )
        found = selection.evaluate(op, signature, lambda _: Settings(), registry)
        assert found.winner is not None
        assert found.winner.backend in ("reference", "cuda", "rocm", "musa", "cpu_amx")


def test_arch_dtype_and_device_gates_hold_there() -> None:
    """A kernel for one generation serves that one, on the host that has it."""
    fast = Backend(
        "fast", "cuda", {"silu_and_mul": Kernel(BF16.dtypes, archs=("sm100",), fn=BF16.fn)}
    )
    wide = Backend("wide", "cuda", {"silu_and_mul": BF16})
    assert decide(hosts.load("b200"), fast, wide).winner.backend == "fast"
    on_h100 = decide(hosts.load("h100"), fast, wide)
    assert on_h100.winner.backend == "wide"
    assert "cuda is sm90, the kernel needs sm100" in str(on_h100)
    assert decide(hosts.load("h100"), wide, dtype=torch.float32).winner.backend == "reference"
    assert "tensor is on cpu" in str(decide(hosts.load("zen4"), wide))


def test_a_host_may_refuse_a_backend() -> None:
    """On ROCm the device is called cuda as well; a CUDA library is none the less of no use."""
    cuda = Backend("cuda", "cuda", {"silu_and_mul": BF16})
    rocm = Backend("rocm", "cuda", {"silu_and_mul": BF16})
    decision = decide(hosts.load("mi300x"), cuda, rocm)
    assert decision.winner.backend == "rocm"
    assert "cuda       runtime: this torch is a ROCm build" in str(decision)
    assert decide(hosts.load("h100"), cuda, rocm).winner.backend == "cuda"


def test_a_device_that_torch_does_not_know() -> None:
    musa = Backend("musa", "musa", {"silu_and_mul": BF16})
    decision = decide(hosts.load("s5000"), musa)
    assert decision.winner.backend == "musa"
    assert str(decision.signature) == "silu_and_mul(bfloat16, last_dim=2 on musa)"
    with pytest.raises(RuntimeError, match="described for another host"):
        decision.call()


def test_explain_answers_for_a_host() -> None:
    fakes.serve(fakes.backend("acme", device="cuda", probe=lambda *_: Capability("sm75")))
    done = explain("--shape", "4096x28672", "--dtype", "bfloat16", "--host", "h100", "--json")
    data = json.loads(done.output)
    assert data["signature"] == "silu_and_mul(bfloat16, last_dim=28672 on cuda)"
    assert (data["winner"], data["host"]) == ("acme", "NVIDIA H100 SXM5")
    said = {c["backend"]: c["reason"] for c in data["candidates"]}
    assert "is not installed here, so its claims are not known" in said["cuda"]
    assert "built without ROCm" in said["rocm"]
    assert "which is not this machine" in explain("--host", "h100").output
    assert json.loads(explain("--host", "h100", "--device", "cpu", "--json").output)["winner"] == (
        "reference"
    )


def test_a_plugin_that_only_this_host_refuses_is_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA wheel on a laptop: refused by its own check of the host, known by its claims."""
    import plugins

    code = (
        "import opmux\n"
        "def fn(x, out): pass\n"
        "@opmux.hookimpl\n"
        "def opmux_backend():\n"
        "    why = opmux.Reason(opmux.Code.RUNTIME, 'no driver here')\n"
        "    kernels = {'silu_and_mul': opmux.Kernel(opmux.FLOATS, fn=fn)}\n"
        "    return opmux.Backend('acme', 'cuda', kernels, check_host=lambda: why)\n"
    )
    plugins.make_plugin(tmp_path, code=code, manifest=plugins.manifest_for(device="cuda"))
    real = loader.importlib.metadata.distributions
    found = [
        e for d in real(path=[str(tmp_path)]) for e in d.entry_points.select(group=loader.GROUP)
    ]
    monkeypatch.setattr(loader, "discover", lambda: found)
    with fakes.on_path(tmp_path):
        assert [f.reason.sentence for f in opmux.failures()] == ["no driver here"]
        assert json.loads(explain("--host", "h100", "--json").output)["winner"] == "acme"


def test_this_machine_as_a_host_file(tmp_path: Path) -> None:
    """What doctor writes, explain reads: the same decisions as here."""
    refused = loader.Failure("bad", "opmux-bad", Reason(Code.RUNTIME, "no such CPU", "buy one"))
    fakes.serve(fakes.backend("acme", probe=lambda *_: Capability("avx9")), failures=[refused])
    path = tmp_path / "mine.json"
    done = CliRunner().invoke(cli, ["doctor", "--save-host", str(path)])
    assert done.exit_code == 0, done.output
    host = hosts.load(str(path))
    assert host.devices["cpu"].arch == "avx9"
    data = json.loads(explain("--host", str(path), "--json").output)
    assert data["winner"] == opmux.silu_and_mul.explain(torch.ones(2, 2)).winner.name == "acme"
    assert "no such CPU" in json.dumps(data)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "host file"),
        ("[]", "host file"),
        ('{"format": 2}', "format is 2, this core reads 1"),
        ('{"format": 1}', "'devices' is missing"),
        ('{"format": 1, "title": "x", "device": "cuda", "devices": {}}', "not among its devices"),
        (
            '{"format": 1, "title": "x", "device": "cpu", "devices": {"cpu": {"arch": ""}},'
            ' "refused": {"a": {"code": "tired", "sentence": "x"}}}',
            "tired",
        ),
    ],
)
def test_a_wrong_host_file_is_said(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(text)
    done = explain("--host", str(path))
    assert done.exit_code == 1
    assert words in done.output and "Traceback" not in done.output


@pytest.mark.parametrize(
    ("name", "words"), [("h10", "did you mean h100"), ("no/such.json", "no/such.json")]
)
def test_an_unknown_host_is_said(name: str, words: str) -> None:
    done = explain("--host", name)
    assert done.exit_code == 1
    assert words in done.output


def test_a_name_with_its_ending_is_the_host_too() -> None:
    """As the documentation writes it: --host h100.json."""
    assert hosts.load("h100.json") == hosts.load("h100")

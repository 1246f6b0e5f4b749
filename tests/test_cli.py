# SPDX-License-Identifier: Apache-2.0
"""The command line: tables for people, JSON for tools, sentences for mistakes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner, Result

import opmux
from opmux import ops
from opmux.cli.app import cli


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, list(args))


def test_list_shows_every_op() -> None:
    done = run("list", "--json")
    data = json.loads(done.output)
    assert {row["op"] for row in data["ops"]} == set(ops.families())
    assert data["backends"][-1] == "reference"
    table = run("list").output
    assert "silu_and_mul" in table and "reference" in table


def test_explain_is_the_decision_of_a_call() -> None:
    import torch

    done = run("explain", "silu_and_mul", "--shape", "4x64", "--dtype", "float32", "--json")
    data = json.loads(done.output)
    winner = opmux.silu_and_mul.explain(torch.randn(4, 64)).winner
    assert data["winner"] == winner.name
    assert data["signature"] == "silu_and_mul(float32, last_dim=64 on cpu)"
    assert all(c["reason"] for c in data["candidates"])


def test_explain_takes_scalars_and_a_backend() -> None:
    done = run("explain", "rotary_embedding", "--set", "head_dim=64", "--backend", "reference")
    assert done.exit_code == 0
    assert "head_dim=64" in done.output and "reference" in done.output


def test_explain_answers_for_a_device_that_is_not_here() -> None:
    data = json.loads(run("explain", "silu_and_mul", "--device", "xpu", "--json").output)
    assert data["winner"] == "reference"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["silu_and_mull"], "did you mean silu_and_mul"),
        (["silu_and_mul", "--dtype", "bf16"], "unknown dtype 'bf16'"),
        (["silu_and_mul", "--shape", "4,64"], "4,64"),
        (["silu_and_mul", "--device", "gpu"], "device"),
        (["silu_and_mul", "--backend", "cpu_amd"], "cpu_am"),
        (["silu_and_mul", "--set", "d=4"], "no integer argument 'd'"),
        (["rotary_embedding", "--set", "head_dim=x"], "head_dim"),
    ],
)
def test_mistakes_get_a_sentence(args: list[str], words: str) -> None:
    done = run("explain", *args)
    assert done.exit_code == 1
    assert words in done.output
    assert "Traceback" not in done.output


def test_doctor_names_host_backends_and_policy() -> None:
    data = json.loads(run("doctor", "--json").output)
    assert data["host"]["opmux"] == opmux.__version__
    assert {b["name"] for b in data["backends"]} == {b.name for b in opmux.load().backends}
    assert set(data["policy"]) >= {"backends", "on_unsupported", "require"}
    assert "policy" in run("doctor").output


def test_the_command_line_says_what_it_needs() -> None:
    code = "import sys; sys.modules['click'] = None\nfrom opmux.cli import main\nmain()\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'pip install "opmux[cli]"' in done.stderr

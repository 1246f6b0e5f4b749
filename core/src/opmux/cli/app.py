# SPDX-License-Identifier: Apache-2.0
"""Commands. Each prints a rich table, or with ``--json`` plain data for tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import opmux
from opmux import hosts
from opmux.cli import report
from opmux.cli.abi import check_abi
from opmux.cli.conform import conform
from opmux.cli.demo import demo
from opmux.cli.new_backend import new_backend

console = Console()
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
@click.version_option(opmux.__version__, prog_name="opmux")
def cli() -> None:
    """See which LLM-inference kernels are here, and which runs for a call, and why."""


def _emit(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, default=str))


@cli.command("list")
@as_json
@click.option("--markdown", is_flag=True, help="Print the table of the README.")
def list_command(as_json: bool, markdown: bool) -> None:
    """Show every op and the dtypes that each installed backend serves."""
    data = report.matrix()
    if as_json:
        _emit(data)
        return
    backends = data["backends"]
    if markdown:
        click.echo(report.markdown(data))
        return
    table = Table("family", "op", *backends, title="ops and the backends that serve them")
    for row in data["ops"]:
        cells = [", ".join(row["backends"].get(name, [])) or "-" for name in backends]
        table.add_row(row["family"], row["op"], *cells)
    console.print(table)


@cli.command()
@click.argument("op")
@click.option("--dtype", default="bfloat16", show_default=True, help="Dtype of the leading tensor.")
@click.option("--shape", help="Shape of the leading tensor, such as 4096x28672.")
@click.option("--device", help="Where the tensors are; default: cpu, or the host's own.")
@click.option("--host", "host_name", help="Another machine: h100, or a host file.")
@click.option("--backend", help="Ask for one backend, as backend= does at a call.")
@click.option("--set", "scalars", multiple=True, help="An integer argument, such as head_dim=128.")
@as_json
def explain(
    op: str,
    dtype: str,
    shape: str | None,
    device: str | None,
    host_name: str | None,
    backend: str | None,
    scalars: tuple[str, ...],
    as_json: bool,
) -> None:
    """Say which kernel a call would run and why, without running it."""
    try:
        host = hosts.load(host_name) if host_name else None
        decision = report.what_if(op, dtype, shape, device, backend, scalars, host)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        there = {"host": host.title} if host is not None else {}
        _emit({**decision.to_dict(), **there})
        return
    if host is not None:
        console.print(f"on {host.title}, which is not this machine:")
    winner = decision.winner.name if decision.winner else "no kernel"
    console.print(f"{decision.signature} -> [bold]{winner}[/bold]: {decision.why}")
    table = Table("kernel", "distribution", "verdict", "remedy")
    for c in decision.candidates:
        remedy = c.refused.remedy if c.refused else ""
        verdict = f"{c.refused.code.value}: {c.refused.sentence}" if c.refused else c.describe()
        table.add_row(c.name, c.dist, verdict, remedy)
    console.print(table)


@cli.command()
@as_json
@click.option(
    "--save-host", type=click.Path(dir_okay=False, path_type=Path),
    help="Write this machine as a host file for explain --host.",
)  # fmt: skip
def doctor(as_json: bool, save_host: Path | None) -> None:
    """Show this host, the installed backends, every failure with its remedy, and the policy."""
    if save_host is not None:
        save_host.write_text(json.dumps(hosts.describe(), indent=1) + "\n", encoding="utf-8")
        click.echo(f"written: {save_host}")
        return
    data = report.doctor()
    if as_json:
        _emit(data)
        return
    host = Table("", "", title="host", show_header=False)
    for key, value in data["host"].items():
        host.add_row(key, str(value))
    console.print(host)
    table = Table("backend", "distribution", "serves", "ops", "facts", title="backends")
    for b in data["backends"]:
        facts = "\n".join(f"{key}: {value}" for key, value in b["facts"].items() if value)
        table.add_row(b["name"], f"{b['dist']} {b['version']}", b["device"], str(b["ops"]), facts)
    console.print(table)
    if data["failures"]:
        failures = Table("backend", "distribution", "op", "reason", "remedy", title="refused")
        for f in data["failures"]:
            failures.add_row(f["backend"], f["dist"], f["op"] or "all", f["reason"], f["remedy"])
        console.print(failures)
    policy = Table("setting", "value", "origin", title="policy")
    for key, entry in data["policy"].items():
        value = entry["value"]
        shown = ", ".join(value) if isinstance(value, (tuple, list)) else str(value)
        policy.add_row(key, shown or "-", entry["origin"])
    console.print(policy)


cli.add_command(check_abi)
cli.add_command(conform)
cli.add_command(demo)
cli.add_command(new_backend)

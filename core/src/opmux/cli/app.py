# SPDX-License-Identifier: Apache-2.0
"""Commands. Each prints a rich table, or with ``--json`` plain data for tools."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import opmux
from opmux.cli import report
from opmux.cli.demo import demo

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
@click.option("--device", default="cpu", show_default=True, help="Where the tensors are.")
@click.option("--backend", help="Ask for one backend, as backend= does at a call.")
@click.option("--set", "scalars", multiple=True, help="An integer argument, such as head_dim=128.")
@as_json
def explain(
    op: str,
    dtype: str,
    shape: str | None,
    device: str,
    backend: str | None,
    scalars: tuple[str, ...],
    as_json: bool,
) -> None:
    """Say which kernel a call would run and why, without running it."""
    try:
        decision = report.what_if(op, dtype, shape, device, backend, scalars)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        _emit(decision.to_dict())
        return
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
def doctor(as_json: bool) -> None:
    """Show this host, the installed backends, every failure with its remedy, and the policy."""
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


cli.add_command(demo)

# SPDX-License-Identifier: Apache-2.0
"""``opmux check-abi``: what a wheel's libraries load in, and what to change."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

_COLOURS = {"error": "red", "warning": "yellow", "info": "dim"}


@click.command("check-abi")
@click.argument(
    "wheels", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option(
    "--torch", "torches", multiple=True, metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Compare with the torch in this folder, site-packages/torch; may be repeated.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check_abi(wheels: tuple[Path, ...], torches: tuple[Path, ...], as_json: bool) -> None:
    """Say which torch, Python and Linux each of WHEELS loads in, and what to change.

    Nothing is loaded. The exit status is 1 when a wheel has an error.
    """
    try:
        from opmux.abi import check
        from opmux.abi.wheel import WheelError

        reports = [check(wheel, torches) for wheel in wheels]
    except ModuleNotFoundError as error:
        needs = (error.name or "").partition(".")[0]
        if needs not in ("elftools", "packaging"):
            raise
        text = f'check-abi needs {needs}: pip install "opmux[abi]"'
        raise click.ClickException(text) from None
    except WheelError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps([report.to_dict() for report in reports], indent=2))
    else:
        console = Console()
        for report in reports:
            table = Table("", "", "remedy", title=report.wheel, show_header=False)
            table.add_row("torch", report.torch, "")
            table.add_row("Python", report.python, "")
            table.add_row("system", report.system, "")
            for f in report.findings:
                table.add_row(f"[{_COLOURS[f.level]}]{f.level}[/]", f.sentence, f.remedy)
            console.print(table)
    raise SystemExit(1 if any(report.errors for report in reports) else 0)

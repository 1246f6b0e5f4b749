# SPDX-License-Identifier: Apache-2.0
"""``opmux new-backend``: a complete backend distribution, ready to be built and tested."""

from __future__ import annotations

from pathlib import Path

import click

from opmux import scaffold


@click.command("new-backend")
@click.argument("name")
@click.option("--device", type=click.Choice(scaffold.DEVICES), default="cpu", show_default=True,
              help="Whose tensors it serves.")  # fmt: skip
@click.option("--binding", type=click.Choice(scaffold.BINDINGS), default="stable-abi",
              show_default=True, help="How its kernels are written.")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path),
              help="The folder to write, which must not exist; default: opmux-NAME.")  # fmt: skip
def new_backend(name: str, device: str, binding: str, output: Path | None) -> None:
    """Write a backend distribution with one working kernel, tests and CI."""
    target = output or Path(f"opmux-{name.replace('_', '-')}")
    try:
        files = scaffold.write(name, device, binding, target)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    for path in files:
        click.echo(f"wrote {path}")
    click.echo(
        f"\nNext:\n  pip install --no-build-isolation ./{target}\n  pytest {target}/tests\n"
        f"  pytest --pyargs opmux.conformance --opmux-backend {name}"
    )

# SPDX-License-Identifier: Apache-2.0
"""``opmux demo``: a small model generates text through opmux, and says what served it."""

from __future__ import annotations

import sys
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import opmux
from opmux.op import OPS

console = Console()


@click.command()
@click.argument("prompt", default="The with statement is used to")
@click.option("--tokens", default=300, show_default=True, help="Bytes to generate.")
@click.option("--dtype", default="bfloat16", show_default=True,
              type=click.Choice(["float32", "bfloat16"]))  # fmt: skip
@click.option("--device", default="cpu", show_default=True)
@click.option("--temperature", default=0.7, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Time torch.compile as well.")
def demo(
    prompt: str,
    tokens: int,
    dtype: str,
    device: str,
    temperature: float,
    seed: int,
    compiled: bool,
) -> None:
    """Generate text after PROMPT, then compare eager torch, reference and opmux."""
    try:
        from opmux.demo import eager, generate, load_model, opmux_ops
    except ModuleNotFoundError as error:
        if error.name not in ("safetensors", "numpy"):
            raise
        raise click.ClickException(
            f'the demo needs {error.name}: pip install "opmux[demo]"'
        ) from None
    model = load_model(device=device, dtype=getattr(torch, dtype))
    ops = opmux_ops()
    console.rule(f"a {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameter model")
    sys.stdout.write(prompt)
    stream = sys.stdout.buffer
    sys.stdout.flush()
    for piece in generate(model, ops, prompt.encode(), tokens, temperature, seed=seed):
        stream.write(piece)
        stream.flush()
    sys.stdout.write("\n")
    console.print(_served())
    console.print(_compared(model, eager(), ops, compiled))


def _served() -> Table:
    """Return which kernel ran for each op so far, and why."""
    table = Table("op", "kernel", "why", title="what served each op")
    for name in sorted(OPS):
        seen: dict[str, str] = {}
        for decision in OPS[name].table.decisions.values():
            if decision.winner is not None:
                seen[decision.winner.name] = decision.why
        for kernel, why in seen.items():
            table.add_row(name, kernel, why)
    return table


def _compared(model: Any, plain: Any, ops: Any, compiled: bool) -> Table:
    """Return perplexity and tokens/s of eager torch, reference and opmux, side by side."""
    from opmux.demo import heldout, perplexity, throughput

    text = heldout()
    table = Table("", "perplexity, held out", "tokens/s, batch 1", "tokens/s, batch 16",
                  title="torch eager, reference and opmux")  # fmt: skip
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        for name in ("eager", "reference", "opmux"):
            used = plain if name == "eager" else ops
            with opmux.use(*(["reference"] if name == "reference" else [])):
                progress.update(task, description=f"perplexity of {name}")
                value = perplexity(model, used, text)
                speeds = []
                for batch in (1, 16):
                    progress.update(task, description=f"tokens/s of {name}, batch {batch}")
                    speeds.append(f"{throughput(model, used, batch=batch):.0f}")
            table.add_row(name, f"{value:.4f}", *speeds)
        if compiled:
            progress.update(task, description="tokens/s of opmux under torch.compile")
            speeds = [f"{throughput(model, ops, batch=b, compiled=True):.0f}" for b in (1, 16)]
            table.add_row("opmux, compiled", "", *speeds)
    return table

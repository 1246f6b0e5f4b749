# SPDX-License-Identifier: Apache-2.0
"""``opmux demo``: a small model generates text through opmux, and says what served it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import opmux
from opmux.op import OPS

console = Console()
BATCHES = (1, 16)


@click.command()
@click.argument("prompt", default="The with statement is used to")
@click.option("--tokens", default=300, show_default=True, help="Bytes to generate.")
@click.option("--dtype", default="bfloat16", show_default=True,
              type=click.Choice(["float32", "bfloat16"]))  # fmt: skip
@click.option("--device", default="cpu", show_default=True)
@click.option("--temperature", default=0.7, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--compile/--no-compile", "compiled", default=None,
              help="Time torch.compile as well; on a GPU that is the default.")  # fmt: skip
@click.option("--record", type=click.Path(dir_okay=False, path_type=Path),
              help="Write the figures to a JSON file.")  # fmt: skip
def demo(
    prompt: str,
    tokens: int,
    dtype: str,
    device: str,
    temperature: float,
    seed: int,
    compiled: bool | None,
    record: Path | None,
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
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise click.ClickException(f"device {device}: torch finds no GPU on this host")
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
    served = _served()
    table = Table("op", "kernel", "why", title="what served each op")
    for name, kernels in served.items():
        for kernel, why in kernels.items():
            table.add_row(name, kernel, why)
    console.print(table)
    on_gpu = model.embedding.weight.is_cuda
    figures = _compared(model, eager(), ops, on_gpu if compiled is None else compiled, on_gpu)
    table = Table("", "perplexity, held out", "tokens/s, batch 1", "tokens/s, batch 16",
                  title=f"torch eager, reference and opmux, {_device_name(model)}")  # fmt: skip
    for row in figures:
        shown = "" if row["perplexity"] is None else f"{row['perplexity']:.4f}"
        table.add_row(row["name"], shown, *(f"{speed:.0f}" for speed in row["tokens_per_s"]))
    console.print(table)
    if record is not None:
        backends = {b.name: {"version": b.version, **b.info} for b in opmux.load().backends}
        facts = {"device": _device_name(model), "dtype": dtype, "torch": torch.__version__,
                 "opmux": opmux.__version__, "backends": backends, "served": served,
                 "batches": BATCHES, "figures": figures}  # fmt: skip
        record.write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")


def _device_name(model: Any) -> str:
    device = model.embedding.weight.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _served() -> dict[str, dict[str, str]]:
    """Return, by op, which kernels ran so far, and why."""
    found = {}
    for name in sorted(OPS):
        made = OPS[name].table.decisions.values()
        if seen := {d.winner.name: d.why for d in made if d.winner is not None}:
            found[name] = seen
    return found


def _ways(compiled: bool, graphs: bool) -> Iterator[tuple[str, bool, bool]]:
    """Yield name of the ops, under torch.compile or not, in a CUDA graph or not."""
    yield from ((name, False, False) for name in ("eager", "reference", "opmux"))
    for graphed in (False, True) if graphs else (False,):
        for with_compiler in (False, True) if compiled else (False,):
            if graphed or with_compiler:
                yield from ((name, with_compiler, graphed) for name in ("eager", "opmux"))


def _compared(
    model: Any, plain: Any, ops: Any, compiled: bool, graphs: bool
) -> list[dict[str, Any]]:
    """Return perplexity and tokens/s of eager torch, reference and opmux."""
    from opmux.demo import heldout, perplexity, throughput

    text, rows = heldout(), []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        for name, with_compiler, graphed in _ways(compiled, graphs):
            used = plain if name == "eager" else ops
            label = name + ", torch.compile" * with_compiler + ", CUDA graph" * graphed
            value, speeds = None, []
            with opmux.use(*(["reference"] if name == "reference" else [])):
                if not with_compiler and not graphed:
                    progress.update(task, description=f"perplexity of {label}")
                    value = perplexity(model, used, text)
                for batch in BATCHES:
                    progress.update(task, description=f"tokens/s of {label}, batch {batch}")
                    speed = throughput(
                        model, used, batch=batch, compiled=with_compiler, graphed=graphed
                    )
                    speeds.append(round(speed, 1))
            rows.append({"name": label, "perplexity": value, "tokens_per_s": speeds})
    return rows

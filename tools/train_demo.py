# SPDX-License-Identifier: Apache-2.0
"""Train the demo model from data/corpus.txt: ``python tools/train_demo.py --device cuda``.

Needs torch and safetensors; a progress bar appears where rich is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Training needs only the demo's files: an empty parent package spares the registry and pluggy.
package = types.ModuleType("opmux")
package.__path__ = [str(Path(__file__).parents[1] / "core" / "src" / "opmux")]
sys.modules["opmux"] = package

from opmux.demo import Config, Model, eager, heldout, load_model, perplexity, save_model  # noqa: E402
from opmux.demo.corpus import DATA  # noqa: E402
from opmux.demo.training import initialise, train_logits  # noqa: E402
from opmux.demo.weights import WEIGHTS  # noqa: E402


def arguments() -> argparse.Namespace:
    """Defaults suit one large GPU; see --help for what a laptop should change."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, default=WEIGHTS)
    add("--steps", type=int, default=2500)
    add("--batch", type=int, default=64, help="windows of one context per step (cpu: 8)")
    add("--learning-rate", type=float, default=2e-3)
    add("--weight-decay", type=float, default=0.1)
    add("--dropout", type=float, default=0.3, help="0 for runs too short to overfit")
    add("--warmup", type=int, default=100, help="steps")
    add("--evaluate", type=int, default=100, help="steps between two looks at the held-out text")
    add("--minutes", type=float, default=4.0, help="the schedule ends by then, whatever --steps is")
    add("--seed", type=int, default=0)
    yes_or_no = argparse.BooleanOptionalAction
    add("--bfloat16", action=yes_or_no, default=True, help="autocast (slow on a CPU without it)")
    add("--compile", action="store_true", help="torch.compile the training step")
    return parser.parse_args()


def rate(progress: float, step: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to 2 %."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[[float, str], None]]:
    """Takes (progress, message): a rich bar, or a printed line per message."""

    def show(progress: float, message: str) -> None:
        if message:
            print(f"{progress:5.0%}  {message}", flush=True)

    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield show
        return
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns) as bar:
        task = bar.add_task(label, total=1.0)

        def update(progress: float, message: str) -> None:
            bar.update(task, completed=progress)
            if message:
                bar.console.print(message, highlight=False)

        yield update


def train(options: argparse.Namespace, model: Model, text: bytes) -> float:
    """Train in place, leave the best checkpoint in the model; its held-out bits per byte."""
    device, context = torch.device(options.device), model.config.context
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    windows = torch.arange(context + 1, device=device)
    draws = torch.Generator().manual_seed(options.seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, options.learning_rate, (0.9, 0.95), weight_decay=options.weight_decay
    )

    def loss_of(tokens: Tensor) -> Tensor:
        logits = train_logits(model, tokens[:, :-1], options.dropout)
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    compute = torch.compile(loss_of) if options.compile else loss_of
    held, best, best_state = heldout(), math.inf, model.state_dict()
    start = time.monotonic()
    with progress_bar("training") as report:
        for step in range(options.steps):
            elapsed = (time.monotonic() - start) / (60 * options.minutes)
            progress = max(step / options.steps, elapsed)
            last = step + 1 == options.steps or progress >= 1
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * rate(min(progress, 1.0), step, options.warmup)
            offsets = torch.randint(len(data) - context, (options.batch, 1), generator=draws)
            tokens = data[offsets.to(device) + windows].long()
            with torch.autocast(device.type, torch.bfloat16, enabled=options.bfloat16):
                loss = compute(tokens)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            message = ""
            if last or (step + 1) % options.evaluate == 0:
                bits = math.log2(perplexity(model, eager(), held))
                seen = loss.item() / math.log(2)
                message = f"step {step + 1:5d}  bits/byte: train {seen:.3f}, held-out {bits:.3f}"
                if bits < best:
                    best, best_state = bits, {k: v.clone() for k, v in model.state_dict().items()}
            report(1.0 if last else progress, message)
            if last:
                break
    model.load_state_dict(best_state)
    return best


def main() -> None:
    """Train, save, and score the file that was written."""
    options = arguments()
    torch.manual_seed(options.seed)
    model = Model(Config())
    initialise(model)
    model.to(options.device)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters on {options.device}, torch {torch.__version__}")
    best = train(options, model, (DATA / "corpus.txt").read_bytes())
    save_model(model, options.output)
    saved = load_model(options.output, options.device)
    bits = math.log2(perplexity(saved, eager(), heldout()))
    size = options.output.stat().st_size
    print(f"held-out bits per byte: {best:.4f} float32, {bits:.4f} as saved (bfloat16)")
    print(f"wrote {options.output} ({size:,} bytes)")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Text from the model, and what it costs: generation, perplexity, decode throughput."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import Model
from .ops import Ops


def _sample(
    ops: Ops, logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """One int32 token per row of logits (rows, vocab)."""
    if temperature == 0:
        return logits.argmax(dim=-1).int()
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    return ops.top_k_top_p_sample(probs, top_k, top_p, uniform)


def _tokens(data: bytes | bytearray, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device).int()


@torch.no_grad()
def generate(
    model: Model,
    ops: Ops,
    prompt: bytes,
    max_new_tokens: int,
    temperature: float = 0.7,
    top_k: int = 40,
    top_p: float = 0.95,
    seed: int = 0,
) -> Iterator[bytes]:
    """Stream one byte at a time; the same seed gives the same draws on every device.

    A full context is halved and read again, so the length of the text has no limit.
    """
    if temperature < 0 or max_new_tokens < 0:
        raise ValueError(
            "generate: temperature and max_new_tokens must not be negative, "
            f"got {temperature} and {max_new_tokens}"
        )
    device, context = model.embedding.weight.device, model.config.context
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(max_new_tokens, generator=generator).to(device)
    cache = model.new_cache()
    text = bytearray(prompt or b"\n")
    keep, position = context - 1, context
    token = torch.empty(1, dtype=torch.int32, device=device)
    for step in range(max_new_tokens):
        if position == context:
            window = text[-keep:]
            logits = model.prefill(ops, _tokens(window, device)[None], cache)[:, -1]
            keep, position = context // 2, len(window)
        else:
            at = torch.full((1,), position, device=device)
            position += 1
            logits = model.decode(ops, token, at, cache, length=position)
        token = _sample(ops, logits, uniform[step : step + 1], temperature, top_k, top_p)
        value = int(token)
        if value < 0:
            raise RuntimeError(
                f"generate: step {step} has no probability mass left; "
                f"an op of the set '{ops.name}' probably gave NaN"
            )
        text.append(value)
        yield bytes([value])


@torch.no_grad()
def perplexity(model: Model, ops: Ops, data: bytes, batch: int = 16) -> float:
    """Per byte, over windows of one context each; log2 of it is bits per byte."""
    if len(data) <= 1:
        raise ValueError(f"perplexity: data must have at least 2 bytes, got {len(data)}")
    context = model.config.context
    tokens = _tokens(data, model.embedding.weight.device)
    whole = (len(tokens) - 1) // context * context
    moved = tokens[1 : whole + 1]
    # Each window's targets are its bytes moved by one: every byte but the first counts once.
    inputs = [*torch.split(tokens[:whole].view(-1, context), batch), tokens[whole:-1][None]]
    targets = [*torch.split(moved.view(-1, context), batch), tokens[whole + 1 :][None]]
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)
    for seen, wanted in zip(inputs, targets, strict=True):
        if seen.numel():
            logits = model.prefill(ops, seen, model.new_cache(len(seen)))
            loss = F.cross_entropy(
                logits.float().flatten(0, 1), wanted.flatten().long(), reduction="none"
            )
            total += loss.double().sum()
    return math.exp(total.item() / (len(tokens) - 1))


@torch.no_grad()
def throughput(
    model: Model,
    ops: Ops,
    batch: int = 1,
    tokens: int = 128,
    repeats: int = 5,
    compiled: bool = False,
    graphed: bool = False,
) -> float:
    """Decoded tokens per second, sampling included: the median of repeats after a warm-up.

    ``compiled`` decodes under torch.compile; ``graphed`` captures a step, sampling and all, in a
    CUDA graph. Both need static shapes, so attention then reads the whole cache under a mask.
    """
    if not 0 < tokens <= model.config.context:
        raise ValueError(f"throughput: tokens must be in 1..{model.config.context}, got {tokens}")
    device = model.embedding.weight.device
    decode: Callable[..., Tensor] = model.decode
    if compiled:
        decode = torch.compile(model.decode, fullgraph=True, dynamic=False)
    uniform = torch.rand(tokens, batch, generator=torch.Generator().manual_seed(0)).to(device)
    cache = model.new_cache(batch)
    token = torch.empty(batch, dtype=torch.int32, device=device)
    positions = torch.empty(batch, dtype=torch.int64, device=device)
    draw = torch.empty_like(uniform[0])

    def step(length: int | None) -> None:
        logits = decode(ops, token, positions, cache, length)
        token.copy_(_sample(ops, logits, draw, 0.7, 40, 0.95))
        positions.add_(1)

    def start() -> None:
        token.fill_(ord("\n"))
        positions.zero_()
        draw.zero_()

    start()
    replay = _graph(lambda: step(None)) if graphed else None

    def run() -> float:
        start()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for i in range(tokens):
            draw.copy_(uniform[i])
            if replay is not None:
                replay()
            else:
                step(None if compiled else i + 1)
        token.cpu()  # waits for the device
        return batch * tokens / (time.perf_counter() - begin)

    run()
    return statistics.median(run() for _ in range(repeats))


def _graph(step: Callable[[], None]) -> Callable[[], None]:
    """Capture a step; the calls before it load and compile what a capture may not."""
    side: Any = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay

# SPDX-License-Identifier: Apache-2.0
"""Gated activations, and the one that quantises what it computes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import opmux

from ..case import FP8, LARGE, Case, Set, Way, dequantised, poison, randn
from ..peers import compiled, fi, liger, sgl

OPS = torch.ops
GROUP, TOP = 128, 448.0


def eager(x: Tensor) -> Tensor:
    """Torch, as a model author writes it."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def eager_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """Torch: the gate, then fp8 by groups."""
    groups = eager(x).unflatten(-1, (-1, GROUP)).float()
    scale = groups.abs().amax(-1).clamp_min(1e-10) / TOP
    return (groups / scale.unsqueeze(-1)).flatten(-2).to(FP8), scale


def keep(way: Way) -> Way:
    """Store what a run returns as ``out``."""

    def run(s: Set) -> None:
        s.out = way(s)

    return run


def pair(way: Way) -> Way:
    """Store what a run returns as ``q`` and ``scale``."""

    def run(s: Set) -> None:
        s.q, s.scale = way(s)

    return run


def gate(name: str, tokens: int, d: int, goal: float = 0.0, goal_us: float = 0.0) -> Case:
    """One gated activation of ``[gate, up]``."""
    peers: dict[str, Way] = {
        "vllm": lambda s: getattr(OPS._C, name)(s.out, s.x),
        "sglang": lambda s: getattr(sgl("elementwise"), name)(s.x, s.out),
        "flashinfer": lambda s: getattr(fi("activation"), name)(s.x, out=s.out),
    }
    if name == "silu_and_mul":
        peers["torch"] = keep(lambda s: eager(s.x))
        peers["compile"] = keep(lambda s: compiled(eager)(s.x))
        peers["liger"] = keep(lambda s: liger("swiglu").swiglu_fused_gate_up_forward(s.x)[-1])
    return Case(
        name, f"T={tokens} d={d}", 6 * tokens * d,
        lambda: Set(x=randn(tokens, 2 * d), out=poison(tokens, d)),
        lambda s, b: getattr(opmux, name)(s.x, out=s.out, backend=b),
        lambda s: (s.out,), peers, goal=goal, goal_us=goal_us,
    )  # fmt: skip


def quick(tokens: int, d: int) -> Case:
    """gelu_quick."""
    return Case(
        "gelu_quick", f"T={tokens} d={d}", 4 * tokens * d,
        lambda: Set(x=randn(tokens, d), out=poison(tokens, d)),
        lambda s, b: opmux.gelu_quick(s.x, out=s.out, backend=b),
        lambda s: (s.out,), {"vllm": lambda s: OPS._C.gelu_quick(s.out, s.x)}, goal=LARGE,
    )  # fmt: skip


def exponents(words: Tensor, tokens: int) -> Tensor:
    """Return packed scales (..., words, padded tokens) as float32 (..., tokens, groups)."""
    parts = words.unsqueeze(-1).view(torch.uint8).movedim(-3, -2)  # ..., tokens, words, 4
    return torch.exp2(parts.flatten(-2).float() - 127)[..., :tokens, :]


def quantised(tokens: int, d: int, packed: bool = False, goal: float = 0.0) -> Case:
    """SwiGLU and fp8 by groups of 128.

    sglang-kernel fuses them for packed scales alone; for float32 scales it takes two kernels.
    """
    groups = d // GROUP

    def scales() -> Tensor:
        if packed:
            return poison(groups // 4, tokens, dtype=torch.int32)
        return poison(tokens, groups, dtype=torch.float32)

    def results(s: Set) -> tuple[Tensor, ...]:
        return (dequantised(s.q, exponents(s.scale, tokens) if packed else s.scale),)

    def two(s: Set) -> None:
        sgl("elementwise").silu_and_mul(s.x, s.out)
        sgl("gemm").sgl_per_token_group_quant_8bit(
            s.out, s.q, s.scale, GROUP, 1e-10, -TOP, TOP, False
        )

    def fused(s: Set) -> None:
        sgl("gemm").sgl_per_token_group_quant_8bit(
            s.x, s.q, s.scale.T, GROUP, 1e-10, -TOP, TOP, True, True, None, True
        )

    peers: dict[str, Way] = {"sglang": fused}
    if not packed:
        peers = {
            "vllm": lambda s: OPS._C.silu_and_mul_per_block_quant(
                s.q, s.x, s.scale, GROUP, None, False
            ),
            "sglang": two,
            "torch": pair(lambda s: eager_quant(s.x)),
            "compile": pair(lambda s: compiled(eager_quant)(s.x)),
        }
    return Case(
        "silu_and_mul_per_token_group_quant",
        f"T={tokens} d={d} fp8 g128{' packed' if packed else ''}",
        tokens * (5 * d + (1 if packed else 4) * groups),
        lambda: Set(x=randn(tokens, 2 * d), q=poison(tokens, d, dtype=FP8), scale=scales(),
                    out=poison(tokens, d)),
        lambda s, b: opmux.silu_and_mul_per_token_group_quant(
            s.x, GROUP, False, 2 * packed, out_q=s.q, out_scale=s.scale, backend=b),
        results, peers, bound=3e-2, goal=goal,
    )  # fmt: skip


def masked(experts: int, tokens: int, d: int, packed: bool) -> Case:
    """The same for the first tokens of every expert; scales in columns, as DeepGEMM wants them."""
    groups = d // GROUP
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(tokens // 2, tokens, (experts,), generator=generator)
    size = int(counts.sum()) * (5 * d + (1 if packed else 4) * groups)

    def make() -> Set:
        x = randn(experts, tokens, 2 * d)
        dtype = torch.int32 if packed else torch.float32
        scale = poison(experts, groups // 4 if packed else groups, tokens, dtype=dtype)
        return Set(x=x, q=poison(experts, tokens, d, dtype=FP8), scale=scale,
                   counts=counts.to(x.device, torch.int32))  # fmt: skip

    def results(s: Set) -> tuple[Tensor, ...]:
        valid = torch.arange(tokens, device=s.x.device) < s.counts[:, None]
        scale = exponents(s.scale, tokens) if packed else s.scale.transpose(1, 2)
        return (dequantised(s.q, scale)[valid],)

    peers: dict[str, Way] = {
        "vllm": lambda s: OPS._C.persistent_masked_m_silu_mul_quant(
            s.x, s.counts, s.q, s.scale.transpose(1, 2), packed
        )
    }
    if packed:
        peers["sglang"] = lambda s: sgl("gemm").sgl_per_token_group_quant_8bit(
            s.x, s.q, s.scale.transpose(1, 2), GROUP, 1e-10, -TOP, TOP, True, True, s.counts, True
        )
    return Case(
        "silu_and_mul_masked_per_token_group_quant",
        f"E={experts} T={tokens} d={d} fp8 g128{' packed' if packed else ''}", size, make,
        lambda s, b: opmux.silu_and_mul_masked_per_token_group_quant(
            s.x, s.q, s.scale, s.counts, GROUP, 2 if packed else 1, backend=b),
        results, peers, bound=3e-2,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """Yield the family's cases."""
    yield gate("silu_and_mul", 1, 14336)
    yield gate("silu_and_mul", 16, 14336, goal_us=2.0)
    yield gate("silu_and_mul", 64, 14336)
    yield gate("silu_and_mul", 4096, 14336, goal=0.95)
    yield gate("silu_and_mul", 8192, 28672, goal=0.95)
    yield gate("gelu_and_mul", 4096, 14336, goal=LARGE)
    yield gate("gelu_tanh_and_mul", 4096, 14336, goal=LARGE)
    yield quick(4096, 14336)
    yield quantised(8192, 2048, goal=0.90)
    yield quantised(8192, 2048, packed=True)
    yield masked(32, 256, 2048, packed=False)
    yield masked(32, 256, 2048, packed=True)

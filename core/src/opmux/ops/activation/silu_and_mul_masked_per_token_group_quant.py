# SPDX-License-Identifier: Apache-2.0
"""SwiGLU gate fused with group quantisation, for the first tokens of every expert."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from opmux.op import op
from opmux.ops.quantization._quantize import (
    FP8,
    PACKED,
    ROWS,
    TOLERANCE,
    quantize_groups,
    scale_dtype,
    scale_shape,
)
from opmux.samples import Sample, randint, randn


@op(mutates=("out_q", "out_scale"), tolerance=TOLERANCE)
def silu_and_mul_masked_per_token_group_quant(
    x: Tensor,
    out_q: Tensor,
    out_scale: Tensor,
    expert_num_tokens: Tensor,
    group_size: int = 128,
    scale_layout: int = 0,
) -> None:
    """In place: quantise ``silu(x[..., :d]) * x[..., d:]`` of the first tokens of every expert.

    Of expert e only the tokens below expert_num_tokens[e] are computed; what out_q and out_scale
    hold for the others, and for the padding of T4, is not written. The gate's value stays in
    float32 until it is quantised as :func:`per_token_group_quant` says: the scale of a group is
    ``max(amax, 1e-10) / top``, top is 448 for fp8 e4m3 and 127 for int8, which the dtype of out_q
    chooses. A packed word of a token that counts is written whole, groups behind G as 0.

    Shapes:
        x: (E, T, 2 * d), float32, bfloat16 or float16; last dimension contiguous
        out_q: (E, T, d), float8_e4m3fn or int8; written
        out_scale: of G = d / group_size groups and T4 = T rounded up to 4: for scale_layout 0
            (E, T, G) float32, 1 (E, G, T4) float32, 2 (E, ceil(G / 4), T4) int32 with four
            exponents each; written
        expert_num_tokens: (E,), int32; below 0 counts as 0, above T as T

    Raises:
        ValueError: a shape does not fit, group_size does not divide d, or scale_layout is none of
            0, 1, 2.
        TypeError: out_q, out_scale or expert_num_tokens has another dtype.

    Source: DeepSeek-V3 Technical Report, arXiv:2412.19437
    """
    gate, up = x.float().chunk(2, dim=-1)
    int8 = out_q.dtype == torch.int8
    quantised, scale = quantize_groups(F.silu(gate) * up, group_size, int8, scale_layout)
    counts = expert_num_tokens[:, None, None]
    rows = torch.arange(x.shape[1], device=x.device)[:, None] < counts
    # fp8 has no where(): choose among the bytes
    raw = out_q.view(torch.uint8)
    raw.copy_(torch.where(rows, quantised.view(torch.uint8), raw))
    if scale_layout == ROWS:
        out_scale.copy_(torch.where(rows, scale, out_scale))
        return
    columns = torch.arange(scale.shape[-1], device=x.device) < counts.clamp(max=x.shape[1])
    out_scale.copy_(torch.where(columns, scale, out_scale))


@silu_and_mul_masked_per_token_group_quant.outputs
def _(
    x: Tensor,
    out_q: Tensor,
    out_scale: Tensor,
    expert_num_tokens: Tensor,
    group_size: int,
    scale_layout: int,
) -> None:
    name = "silu_and_mul_masked_per_token_group_quant"
    if x.dim() != 3 or x.shape[2] % 2:
        raise ValueError(f"{name}: x must be (experts, tokens, 2 * d), got {tuple(x.shape)}")
    experts, tokens, width = x.shape[0], x.shape[1], x.shape[2] // 2
    shapes: dict[str, tuple[Tensor, tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "out_q": (out_q, (experts, tokens, width), (FP8, torch.int8)),
        "out_scale": (
            out_scale,
            (experts, *scale_shape(name, tokens, width, group_size, scale_layout)),
            (scale_dtype(scale_layout),),
        ),
        "expert_num_tokens": (expert_num_tokens, (experts,), (torch.int32,)),
    }
    for label, (tensor, shape, dtypes) in shapes.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: {label} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype not in dtypes:
            wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(f"{name}: {label} must be {wanted}, got {tensor.dtype}")


@silu_and_mul_masked_per_token_group_quant.samples
def _() -> Iterator[Sample]:
    def sample(
        experts: int, tokens: int, d: int, group_size: int, layout: int, int8: bool
    ) -> Sample:
        groups, padded = d // group_size, (tokens + 3) // 4 * 4
        shape = (tokens, groups) if layout == ROWS else (groups, padded)
        if layout == PACKED:
            scale = randint(0, 2**31, experts, (groups + 3) // 4, padded, dtype=torch.int32)
        else:
            scale = randn(experts, *shape, dtype=torch.float32)
        return Sample(
            randn(experts, tokens, 2 * d),
            randn(experts, tokens, d, dtype=torch.int8 if int8 else FP8),
            scale,
            randint(-1, tokens + 2, experts, dtype=torch.int32),  # none, all and too many
            group_size,
            layout,
        )

    for layout in (0, 1, 2):
        yield sample(6, 5, 160, 32, layout, True)  # tokens and groups to pad, int8
        yield sample(3, 0, 128, 128, layout, False)  # empty
    yield sample(1, 1, 128, 128, 0, False)  # decode
    yield sample(300, 2, 32, 32, 1, True)  # more experts than a block has threads
    yield sample(8, 9, 192, 64, 0, False)  # the middle group size, odd group count
    yield sample(9, 10, 192, 64, 0, True)
    yield sample(4, 16, 2048, 128, 0, False)  # DeepSeek-V3
    yield sample(4, 16, 2048, 128, 2, False)

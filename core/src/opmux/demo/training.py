# SPDX-License-Identifier: Apache-2.0
"""The model's mathematics without in-place ops, so that autograd can follow it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import eager_ops
from .model import Model


def initialise(model: Model) -> None:
    """Small normal weights; projections into the residual stream shrink with depth."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            into_residual = name.endswith(("output.weight", "down.weight"))
            depth = math.sqrt(2 * model.config.layers) if into_residual else 1.0
            nn.init.normal_(parameter, std=0.02 / depth)


def train_logits(model: Model, tokens: Tensor, dropout: float = 0.0) -> Tensor:
    """Logits (batch, count, vocab) of whole sequences; dropout acts on each residual branch."""
    c = model.config
    batch, count = tokens.shape
    positions = torch.arange(count, device=tokens.device).expand(batch, count).flatten()
    sizes = [c.num_heads * c.head_dim] + 2 * [c.num_kv_heads * c.head_dim]

    def heads(x: Tensor) -> Tensor:
        return x.reshape(batch, count, -1, c.head_dim).transpose(1, 2)

    residual = F.dropout(model.embedding(tokens.flatten()), dropout)
    for layer in model.layers:
        x = eager_ops.rmsnorm(residual, layer.attention_norm, c.eps)
        q, k, v = torch.split(layer.qkv(x), sizes, dim=-1)
        q, k = (eager_ops.rotated(positions, x, c.head_dim, model.cos_sin) for x in (q, k))
        attended = F.scaled_dot_product_attention(
            heads(q), heads(k), heads(v), is_causal=True, enable_gqa=True
        )
        x = layer.output(attended.transpose(1, 2).reshape(batch * count, -1))
        residual = residual + F.dropout(x, dropout)
        x = eager_ops.rmsnorm(residual, layer.ffn_norm, c.eps)
        x = layer.down(F.dropout(eager_ops.silu_and_mul(layer.gate_up(x)), dropout))
        residual = residual + F.dropout(x, dropout)
    x = F.dropout(eager_ops.rmsnorm(residual, model.norm, c.eps), dropout)
    return F.linear(x, model.embedding.weight).view(batch, count, -1)

# SPDX-License-Identifier: Apache-2.0
"""A byte-level Llama: RMSNorm, rotary positions, grouped queries, SwiGLU, tied embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import Ops


@dataclass(frozen=True)
class Config:
    """Sizes of the model; stored beside the weights."""

    vocab: int = 256
    dim: int = 192
    layers: int = 4
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    ffn_dim: int = 512
    context: int = 512
    rope_base: float = 10000.0
    eps: float = 1e-6


@dataclass(frozen=True)
class KVCache:
    """Keys and values (layers, batch * context, kv heads, head_dim), one block per sequence."""

    keys: Tensor
    values: Tensor
    batch: int
    context: int

    def slots(self, positions: Tensor) -> Tensor:
        """Slot of each token of positions (batch, count), flattened."""
        first = torch.arange(self.batch, device=positions.device) * self.context
        return (first.unsqueeze(1) + positions).flatten()


class Layer(nn.Module):
    """Weights of one layer, with fused qkv and gate_up projections."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.attention_norm = nn.Parameter(torch.ones(config.dim))
        self.qkv = nn.Linear(config.dim, query + 2 * key, bias=False)
        self.output = nn.Linear(query, config.dim, bias=False)
        self.ffn_norm = nn.Parameter(torch.ones(config.dim))
        self.gate_up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)


class Model(nn.Module):
    """Weights, and the forward pass over a KV cache."""

    cos_sin: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.dim)
        layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.layers = cast(Sequence[Layer], layers)  # ModuleList has no element type
        self.norm = nn.Parameter(torch.ones(config.dim))
        frequency = config.rope_base ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        angle = torch.outer(torch.arange(config.context), frequency)
        table = torch.cat((angle.cos(), angle.sin()), dim=-1)
        self.register_buffer("cos_sin", table, persistent=False)

    def new_cache(self, batch: int = 1) -> KVCache:
        """Make an empty cache: zeros, because a masked NaN would still poison the attention."""
        c = self.config
        shape = (c.layers, batch * c.context, c.num_kv_heads, c.head_dim)
        keys, values = (self.embedding.weight.new_zeros(shape) for _ in range(2))
        return KVCache(keys, values, batch, c.context)

    def prefill(self, ops: Ops, tokens: Tensor, cache: KVCache, start: int = 0) -> Tensor:
        """Logits (batch, count, vocab) of tokens (batch, count) at positions from start."""
        stop = start + tokens.shape[1]
        positions = torch.arange(start, stop, device=tokens.device).expand(tokens.shape)
        logits: Tensor = self(ops, tokens, positions, cache, stop)
        return logits

    def decode(
        self, ops: Ops, tokens: Tensor, positions: Tensor, cache: KVCache, length: int | None = None
    ) -> Tensor:
        """Logits (batch, vocab) of one token (batch,) per sequence at positions (batch,).

        Without ``length`` every shape is static (full graphs, mixed positions). With it, all
        positions are ``length - 1``: attention reads only that much and needs no mask.
        """
        logits: Tensor = self(ops, tokens[:, None], positions[:, None], cache, length)
        return logits[:, 0]

    def forward(
        self, ops: Ops, tokens: Tensor, positions: Tensor, cache: KVCache, length: int | None = None
    ) -> Tensor:
        """Store tokens (batch, count) at their positions; logits (batch, count, vocab)."""
        c = self.config
        flat, slots = positions.flatten(), cache.slots(positions)
        span = cache.context if length is None else length
        mask = None
        if length is None or tokens.shape[1] > 1:
            seen = torch.arange(span, device=tokens.device) <= positions.unsqueeze(-1)
            mask = seen.unsqueeze(1)  # one for all heads
        sizes = [c.num_heads * c.head_dim] + 2 * [c.num_kv_heads * c.head_dim]
        residual = self.embedding(tokens.flatten())
        x = ops.rmsnorm(residual, self.layers[0].attention_norm, c.eps)
        for i, layer in enumerate(self.layers):
            if i:
                ops.fused_add_rmsnorm(x, residual, layer.attention_norm, c.eps)
            q, k, v = torch.split(layer.qkv(x), sizes, dim=-1)
            ops.rotary_embedding(flat, q, k, c.head_dim, self.cos_sin, True)
            keys, values = cache.keys[i], cache.values[i]
            kv_shape = (c.num_kv_heads, c.head_dim)
            ops.store_kv_cache(keys, values, slots, k.view(-1, *kv_shape), v.view(-1, *kv_shape))
            attended = F.scaled_dot_product_attention(
                q.view(*tokens.shape, -1, c.head_dim).transpose(1, 2),
                keys.view(cache.batch, -1, *kv_shape)[:, :span].transpose(1, 2),
                values.view(cache.batch, -1, *kv_shape)[:, :span].transpose(1, 2),
                attn_mask=mask,
                enable_gqa=True,
            )
            x = layer.output(attended.transpose(1, 2).reshape(len(flat), -1))
            ops.fused_add_rmsnorm(x, residual, layer.ffn_norm, c.eps)
            x = layer.down(ops.silu_and_mul(layer.gate_up(x)))
        ops.fused_add_rmsnorm(x, residual, self.norm, c.eps)
        return F.linear(x, self.embedding.weight).view(*tokens.shape, -1)

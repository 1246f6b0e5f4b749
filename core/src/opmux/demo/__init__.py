# SPDX-License-Identifier: Apache-2.0
"""A small byte-level language model whose memory-bound work runs through opmux ops."""

from .corpus import heldout
from .generate import generate, perplexity, throughput
from .model import Config, KVCache, Model
from .ops import Ops, eager, opmux_ops
from .weights import load_model, save_model

__all__ = [
    "Config",
    "KVCache",
    "Model",
    "Ops",
    "eager",
    "generate",
    "heldout",
    "load_model",
    "opmux_ops",
    "perplexity",
    "save_model",
    "throughput",
]

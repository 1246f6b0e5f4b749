# SPDX-License-Identifier: Apache-2.0
"""The model's file: bfloat16 safetensors, the configuration in its metadata."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from .model import Config, Model

WEIGHTS = Path(__file__).parent / "data" / "model.safetensors"


def save_model(model: Model, path: Path = WEIGHTS) -> None:
    """Write the weights as bfloat16."""
    from safetensors.torch import save_file

    tensors = {k: v.detach().to("cpu", torch.bfloat16) for k, v in model.state_dict().items()}
    save_file(tensors, path, {"format": "pt", "config": json.dumps(asdict(model.config))})
    path.chmod(0o644)  # it is written for its owner alone, and wheels keep the mode


def load_model(
    path: Path = WEIGHTS,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> Model:
    """Read the weights for inference; the rotary table stays float32."""
    try:
        from safetensors import safe_open
    except ImportError as error:
        message = "the demo model is read with safetensors: install the package safetensors"
        raise ImportError(message) from error
    with safe_open(path, framework="pt") as file:
        config = (file.metadata() or {}).get("config")
        if config is None:
            raise ValueError(f"load_model: {path} has no 'config' in its metadata")
        model = Model(Config(**json.loads(config)))
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.requires_grad_(False).eval().to(device)

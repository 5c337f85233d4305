"""Modules straight from safetensors: no random initialisation first, float32 whatever the disk holds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

if TYPE_CHECKING:
    from pathlib import Path

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a model's configuration file."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def read_weights(path: Path, *, keep: str = "", skip: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Parameters by name as float32 on the CPU: those whose names start with `keep` and with none of `skip`."""
    with safe_open(path, framework="pt") as weights:
        names = [name for name in weights.keys() if name.startswith(keep) and not name.startswith(skip)]  # noqa: SIM118 (no mapping)
        return {name: weights.get_tensor(name).float() for name in names}


def default_device() -> str:
    """Where models run unless told: the first GPU, or the CPU where torch sees none."""
    return "cuda" if torch.cuda.is_available() else "cpu"

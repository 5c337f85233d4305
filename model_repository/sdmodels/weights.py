"""Modules straight from safetensors: no random initialisation first, float32 or half, whatever the disk holds."""

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


def read_weights(
    path: Path,
    *,
    keep: str = "",
    skip: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: torch.memory_format = torch.preserve_format,
) -> dict[str, torch.Tensor]:
    """Parameters by name: those whose names start with `keep` and with none of `skip`.

    They come to the device one by one, convolutions in their memory layout: there is never a second copy of all.
    """

    def laid_out(weight: torch.Tensor) -> torch.Tensor:
        return weight.to(device, dtype, memory_format=layout if weight.ndim == 4 else torch.preserve_format)

    with safe_open(path, framework="pt") as weights:
        names = [name for name in weights.keys() if name.startswith(keep) and not name.startswith(skip)]  # noqa: SIM118 (no mapping)
        return {name: laid_out(weights.get_tensor(name)) for name in names}

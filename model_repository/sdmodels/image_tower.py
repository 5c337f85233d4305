"""CLIP's image tower, straight from open_clip's own files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from open_clip import CLIP

from sdmodels.weights import read_weights

if TYPE_CHECKING:
    from pathlib import Path


def read_image_tower(folder: Path, config: dict[str, Any]) -> Any:
    """The tower of the CLIP in `folder`, in float32 on the CPU; `config` is its `model_cfg`."""
    # open_clip builds no tower alone; on "meta" the other one costs nothing.
    with torch.device("meta"):
        tower = CLIP(**config).visual
    weights = read_weights(folder / "open_clip_model.safetensors", keep="visual.")
    tower.load_state_dict({name.removeprefix("visual."): weight for name, weight in weights.items()}, assign=True)
    return tower.eval().requires_grad_(False)

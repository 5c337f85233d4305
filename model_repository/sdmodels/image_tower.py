"""CLIP's image tower, straight from open_clip's own files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from open_clip import CLIP
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sdmodels.weights import read_weights

if TYPE_CHECKING:
    from pathlib import Path


def read_image_tower(folder: Path, config: dict[str, Any]) -> Any:
    """The tower of the CLIP in `folder`, in float32 on the CPU; `config` is its `model_cfg`.

    The batch norms of a ResNet are part of the convolutions before them, whose results they only scale and shift.
    """
    # open_clip builds no tower alone; on "meta" the other one costs nothing.
    with torch.device("meta"):
        tower = CLIP(**config).visual
    weights = read_weights(folder / "open_clip_model.safetensors", keep="visual.")
    tower.load_state_dict({name.removeprefix("visual."): weight for name, weight in weights.items()}, assign=True)
    return _folded(tower.eval()).requires_grad_(False)


def _folded(module: torch.nn.Module) -> torch.nn.Module:
    """`module` with each batch norm that is the next child after a convolution put into it."""
    before: tuple[str, torch.nn.Module] | None = None
    for name, child in module.named_children():
        if before and isinstance(before[1], torch.nn.Conv2d) and isinstance(child, torch.nn.BatchNorm2d):
            setattr(module, before[0], fuse_conv_bn_eval(before[1], child))
            setattr(module, name, torch.nn.Identity())
        before = name, _folded(child)
    return module

"""How near everything in a picture is: the depth estimator that depth checkpoints carry along (MiDaS, DPT)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from sdmodels.weights import read_config, read_weights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

FOLDER = "depth_estimator"
WEIGHTS = "model.safetensors"
PREPROCESSOR = "preprocessor_config.json"
# What transformers' DPTImageProcessor does where a configuration is silent.
PREPROCESSING: dict[str, Any] = {
    "size": 384,
    "resample": 3,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "keep_aspect_ratio": False,
}


class DepthEstimator:
    """transformers' DPTForDepthEstimation from `engine_folder/depth_estimator`, in float32."""

    def __init__(self, engine_folder: Path, device: str = "cpu") -> None:
        folder = engine_folder / FOLDER
        self.module = empty_estimator(read_config(folder / "config.json"))
        self.module.load_state_dict(read_weights(folder / WEIGHTS, device=device), assign=True)
        self.module.eval().requires_grad_(False).to(device)
        self._device = device
        config = PREPROCESSING | read_config(folder / PREPROCESSOR)
        self._size = _sides(config["size"])
        self._resample = Image.Resampling(config["resample"])
        self._mean, self._std = (np.array(config[name], np.float32) for name in ("image_mean", "image_std"))

    @torch.inference_mode()
    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[B, h, w] how near everything is, of no scale, in RGB pixels [B, H, W, 3].

        h and w are the module's own, because it looks at pictures of one size. Rows are computed one by one, so that a
        row depends on itself alone.
        """
        return np.stack([self._estimate(row) for row in pixels])

    def _estimate(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        height, width = self._size
        picture = Image.fromarray(pixels).resize((width, height), self._resample)
        values = (np.asarray(picture, np.float32) / 255 - self._mean) / self._std
        image = torch.from_numpy(values.transpose(2, 0, 1)[None].astype(np.float32))
        depths: NDArray[np.float32] = self.module(image.to(self._device)).predicted_depth[0].float().cpu().numpy()
        return depths


def empty_estimator(config: Mapping[str, Any]) -> Any:
    """The module of a configuration, without weights. Raises ModuleNotFoundError where transformers is missing."""
    if sys.modules.get("transformers", sys) is None:
        # `light_imports` leaves it out of processes that do without.
        del sys.modules["transformers"]
    from transformers import DPTConfig, DPTForDepthEstimation

    with torch.device("meta"):
        return DPTForDepthEstimation(DPTConfig.from_dict(dict(config)))


def _sides(size: int | Mapping[str, int]) -> tuple[int, int]:
    """Height and width, which older configurations say by one number."""
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])

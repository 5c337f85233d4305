"""The denoising network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from sdmodels.errors import InvalidInput
from sdmodels.weights import DIFFUSERS_WEIGHTS, read_config, read_weights

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray


class UNet:
    """A diffusers UNet2DConditionModel in float32, from `engine_folder/unet`."""

    def __init__(self, engine_folder: Path, device: str = "cpu") -> None:
        folder = engine_folder / "unet"
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(read_config(folder / "config.json"))
        unet.load_state_dict(read_weights(folder / DIFFUSERS_WEIGHTS), assign=True)
        self.module = unet.eval().requires_grad_(False).to(device)
        self._device = device

    @torch.inference_mode()
    def __call__(
        self, latents: NDArray[np.float32], timesteps: NDArray[np.float32], text_states: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """[B, 4, h, w] prediction for latents [B, 4, h, w], timesteps [B] and text states [B, T, D].

        T may be any number of text states: the UNet attends to all of them. Timesteps count from 0 to 999 and may lie
        between two. Whether noise or velocity is predicted is the engine's matter. Raises `InvalidInput` where the
        numbers of rows disagree.
        """
        if not len(latents) == len(timesteps) == len(text_states):
            raise InvalidInput(
                f"a row is one latent, one timestep and one text: "
                f"got {len(latents)} latents, {len(timesteps)} timesteps and {len(text_states)} texts"
            )
        x, t, c = (torch.from_numpy(array).to(self._device) for array in (latents, timesteps, text_states))
        prediction: NDArray[np.float32] = self.module(x, t, c, return_dict=False)[0].cpu().numpy()
        return prediction

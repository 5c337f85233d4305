"""The denoising network in two parts, for block caching (DeepCache, Ma et al. 2023, arXiv:2312.00858).

The outermost blocks are the first down block and the last up block, which works on the skips of the first one and on
what comes up from below: the features [B, F, h, w]. They change little from step to step, and cost most of the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sdmodels.batching import check_rows
from sdmodels.unet import UNet

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from numpy.typing import NDArray


class WithFeatures(torch.nn.Module):
    """The whole network, which also returns the features."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        unet.up_blocks[-2].register_forward_hook(self._keep)

    def forward(
        self, latents: torch.Tensor, timesteps: torch.Tensor, text_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prediction [B, 4, h, w] and features [B, F, h, w]."""
        prediction: torch.Tensor = self.unet(latents, timesteps, text_states, return_dict=False)[0]
        return prediction, self._features

    def _keep(self, block: torch.nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
        self._features = output


class FromFeatures(torch.nn.Module):
    """The outermost blocks, with the features of another step in the place of what comes up from below."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, latents: torch.Tensor, timesteps: torch.Tensor, text_states: torch.Tensor, features: torch.Tensor
    ) -> torch.Tensor:
        """Prediction [B, 4, h, w]."""
        unet, down, up = self.unet, self.unet.down_blocks[0], self.unet.up_blocks[-1]
        embedding = unet.time_embedding(unet.get_time_embed(sample=latents, timestep=timesteps))
        sample = unet.conv_in(latents)
        skips = [sample]
        # Layer by layer, because nobody needs what the block's last one makes for the blocks below.
        for number, resnet in enumerate(down.resnets):
            sample = resnet(sample, embedding)
            if getattr(down, "has_cross_attention", False):
                sample = down.attentions[number](sample, encoder_hidden_states=text_states, return_dict=False)[0]
            skips.append(sample)
        arguments = {"hidden_states": features, "temb": embedding, "res_hidden_states_tuple": tuple(skips)}
        if getattr(up, "has_cross_attention", False):
            arguments["encoder_hidden_states"] = text_states
        prediction: torch.Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(up(**arguments))))
        return prediction


class UNetCache:
    """Both parts by torch, in float32, from `engine_folder/unet`."""

    def __init__(self, engine_folder: Path, device: str = "cpu") -> None:
        unet = UNet(engine_folder, device).module
        self._whole = WithFeatures(unet)
        self._outermost = FromFeatures(unet)
        self._device = device

    @torch.inference_mode()
    def __call__(
        self,
        latents: NDArray[np.float32],
        timesteps: NDArray[np.float32],
        text_states: NDArray[np.float32],
        features: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """[B, 4 + F, h, w]: the whole network's prediction for latents [B, 4, h, w], timesteps [B] and text states
        [B, T, D], and its features; with features [B, F, h, w] the prediction [B, 4, h, w] of the outermost blocks.

        As `sdmodels.unet.UNet.__call__`. Raises `InvalidInput` where the numbers of rows disagree.
        """
        check_rows(latents, timesteps, text_states, features)
        x, t, c = (torch.from_numpy(array).to(self._device) for array in (latents, timesteps, text_states))
        if features is None:
            made = torch.cat(self._whole(x, t, c), dim=1)
        else:
            made = self._outermost(x, t, c, torch.from_numpy(features).to(self._device))
        result: NDArray[np.float32] = made.cpu().numpy()
        return result

"""The denoising network in two parts, for block caching (DeepCache, Ma et al. 2023, arXiv:2312.00858).

The outermost blocks are the first down block and the last up block, which works on the skips of the first one and on
what comes up from below: the features [B, F, h, w]. They change little from step to step, and cost most of the time.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from sdmodels.batching import check_rows
from sdmodels.class_labels import apart
from sdmodels.precision import DTYPES, InRange
from sdmodels.row_buckets import in_buckets
from sdmodels.unet import UNet

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from numpy.typing import NDArray

    from sdmodels.precision import Precision, Rows


class WithFeatures(torch.nn.Module):
    """The whole network, which also returns the features."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        unet.up_blocks[-2].register_forward_hook(self._keep)

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        text_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prediction [B, 4, h, w] and features [B, F, h, w]."""
        prediction: torch.Tensor = self.unet(
            latents, timesteps, text_states, class_labels=class_labels, return_dict=False
        )[0]
        return prediction, self._features

    def _keep(self, block: torch.nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
        self._features = output


class FromFeatures(torch.nn.Module):
    """The outermost blocks, with the features of another step in the place of what comes up from below."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        text_states: torch.Tensor,
        features: torch.Tensor,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Prediction [B, 4, h, w]."""
        unet, down, up = self.unet, self.unet.down_blocks[0], self.unet.up_blocks[-1]
        embedding = unet.time_embedding(unet.get_time_embed(sample=latents, timestep=timesteps))
        if class_labels is not None:
            embedding = embedding + unet.get_class_embed(sample=latents, class_labels=class_labels)
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
    """Both parts by torch, from `engine_folder/unet`; precision and row buckets as `sdmodels.unet.UNet` has them."""

    def __init__(
        self,
        engine_folder: Path,
        device: str = "cpu",
        precision: Precision = "fp32",
        row_buckets: Sequence[int] = (),
    ) -> None:
        self._device, self._dtype = device, DTYPES[precision]
        unet = UNet(engine_folder, device, precision).module
        self._networks = WithFeatures(unet), FromFeatures(unet)
        self._whole: Rows = self.whole
        self._outermost: Rows = self.outermost
        if row_buckets:
            self._whole, self._outermost = (in_buckets(part, row_buckets) for part in (self.whole, self.outermost))
        if precision != "fp32":
            in_float32 = cache(lambda: UNetCache(engine_folder, device))
            self._whole = InRange("unet_cache", self._whole, lambda: in_float32().whole)
            self._outermost = InRange("unet_cache", self._outermost, lambda: in_float32().outermost)

    def whole(self, latents: torch.Tensor, timesteps: torch.Tensor, text_states: torch.Tensor) -> torch.Tensor:
        """Float32 prediction and features, one below the other, of tensors on the device."""
        network, _ = self._networks
        rows, labels = apart(latents, network.unet.config)
        labelled = () if labels is None else (labels.long(),)
        made = network(rows.to(self._dtype), timesteps, text_states.to(self._dtype), *labelled)
        return torch.cat(made, dim=1).float()

    def outermost(
        self, latents: torch.Tensor, timesteps: torch.Tensor, text_states: torch.Tensor, features: torch.Tensor
    ) -> torch.Tensor:
        """The float32 prediction of tensors on the device."""
        _, network = self._networks
        rows, labels = apart(latents, network.unet.config)
        inputs = rows.to(self._dtype), timesteps, text_states.to(self._dtype), features.to(self._dtype)
        prediction: torch.Tensor = network(*inputs, *(() if labels is None else (labels.long(),)))
        return prediction.float()

    @torch.inference_mode()
    def __call__(
        self,
        latents: NDArray[np.float32],
        timesteps: NDArray[np.float32],
        text_states: NDArray[np.float32],
        features: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """[B, 4 + F, h, w]: the whole network's prediction for latents [B, U, h, w], timesteps [B] and text states
        [B, T, D], and its features; with features [B, F, h, w] the prediction [B, 4, h, w] of the outermost blocks.

        As `sdmodels.unet.UNet.__call__`. Raises `InvalidInput` where the numbers of rows disagree.
        """
        check_rows(latents, timesteps, text_states, features)
        x, t, c = (torch.from_numpy(array).to(self._device) for array in (latents, timesteps, text_states))
        if features is None:
            made = self._whole(x, t, c)
        else:
            made = self._outermost(x, t, c, torch.from_numpy(features).to(self._device))
        result: NDArray[np.float32] = made.cpu().numpy()
        return result

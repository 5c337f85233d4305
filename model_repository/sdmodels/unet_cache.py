"""The denoising network in two parts, for block caching (DeepCache, Ma et al. 2023, arXiv:2312.00858).

The outermost blocks are the first down block and the last up block, which works on the skips of the first one and on
what comes up from below: the features [B, F, h, w]. They change little from step to step, and cost most of the time.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from sdmodels.batching import check_rows
from sdmodels.class_labels import apart
from sdmodels.precision import DTYPES, InRange
from sdmodels.row_buckets import in_buckets
from sdmodels.unet import UNet
from sdmodels.unet_parts import OutermostBlocks, WholeUNet

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from sdmodels.precision import Precision, Rows


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
        self._networks = WholeUNet(unet), OutermostBlocks(unet)
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
        label = None if labels is None else labels.long()
        made = network(rows.to(self._dtype), timesteps, text_states.to(self._dtype), class_labels=label)
        return torch.cat(made, dim=1).float()

    def outermost(
        self, latents: torch.Tensor, timesteps: torch.Tensor, text_states: torch.Tensor, features: torch.Tensor
    ) -> torch.Tensor:
        """The float32 prediction of tensors on the device."""
        _, network = self._networks
        rows, labels = apart(latents, network.unet.config)
        inputs = rows.to(self._dtype), timesteps, text_states.to(self._dtype), features.to(self._dtype)
        prediction: torch.Tensor = network(*inputs, class_labels=None if labels is None else labels.long())
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

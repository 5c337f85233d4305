"""Gradients through the denoising network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from sdmodels.class_labels import apart
from sdmodels.small_rows import SmallRows
from sdmodels.unet import UNet

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


# Of a place of the latents, with every autoencoder of Stable Diffusion but the upscaler's.
PIXELS = 8 * 8


class UNetGradient:
    """From the gradient of a loss by the UNet's prediction to that by its latents: the vector-Jacobian product."""

    def __init__(self, engine_folder: Path, device: str = "cpu") -> None:
        self._unet = UNet(engine_folder, device).module
        self._device = device
        self._rows = SmallRows(device)

    def __call__(
        self,
        latents: NDArray[np.float32],
        timesteps: NDArray[np.float32],
        text_states: NDArray[np.float32],
        gradients: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """[B, 4, h, w] gradients by the noisy `latents` from those by the prediction, `gradients` [B, 4, h, w].

        The other arguments are those of `UNet`; channels of a conditioning have no gradient. Each row is computed
        by itself: it depends on itself alone, and memory does not grow with the batch.
        """
        rows = list(zip(latents, timesteps, text_states, gradients, strict=True))
        return np.stack(self._rows.map(lambda row: self._row(*row), rows, [row[0].size * PIXELS for row in latents]))

    def _row(
        self,
        latents: NDArray[np.float32],
        timestep: np.float32,
        text_states: NDArray[np.float32],
        gradient: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        x, t, c, g = (
            torch.tensor(np.asarray(value)[None], device=self._device)
            for value in (latents, timestep, text_states, gradient)
        )
        x.requires_grad_()
        row, labels = apart(x, self._unet.config)
        labelled = {} if labels is None else {"class_labels": labels.long()}
        prediction = self._unet(row, t, c, return_dict=False, **labelled)[0]
        by_latents = torch.autograd.grad(prediction, x, g)[0][0, : len(gradient)]
        result: NDArray[np.float32] = by_latents.cpu().numpy()
        return result

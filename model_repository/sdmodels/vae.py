"""The way back from latents to pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from sdmodels.errors import InvalidInput
from sdmodels.weights import DIFFUSERS_WEIGHTS, read_config, read_weights

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


class VaeDecoder:
    """The decoder half of a diffusers AutoencoderKL in float32, from `engine_folder/vae`."""

    def __init__(self, engine_folder: Path, device: str = "cpu") -> None:
        folder = engine_folder / "vae"
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(read_config(folder / "config.json"))
        del vae.encoder, vae.quant_conv
        weights = read_weights(folder / DIFFUSERS_WEIGHTS, skip=("encoder.", "quant_conv."))
        vae.load_state_dict({_current_name(name): weight for name, weight in weights.items()}, assign=True)
        # Channels last takes a sixth off a decode on one core; the UNet gains nothing from it.
        self._vae = vae.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self._device = device
        self._scaling_factor: float = vae.config.scaling_factor

    @torch.inference_mode()
    def __call__(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """[B, 8h, 8w, 3] RGB pixels of latents [B, 4, h, w] in the UNet's scale; the scaling factor is taken off here.

        Rows are decoded one by one: an image then depends on its own latents alone, and memory does not grow with the
        batch. Raises `InvalidInput` for NaN or infinity, which would be a black picture.
        """
        return np.stack([self._decode(row) for row in latents])

    def _decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        if not np.isfinite(latents).all():
            raise InvalidInput("the latents hold NaN or infinity: the denoising before went wrong")
        scaled = torch.from_numpy(latents[None]).to(self._device, memory_format=torch.channels_last)
        image = self._vae.decode(scaled / self._scaling_factor, return_dict=False)[0][0]
        if not image.isfinite().all():
            raise InvalidInput("the latents are out of the decoder's range: they decode to NaN or infinity")
        # [-1, 1] to 0..255, halves to even, as diffusers' image processor does.
        pixels: NDArray[np.uint8] = (image / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
        return pixels


def _current_name(name: str) -> str:
    """Today's name of a parameter: the VAE files of SD 1 and 2 carry the names that attention had in diffusers 0.x."""
    for old, new in ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")):
        name = name.replace(old, new)
    return name

"""Pixels to latents and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from sdmodels.errors import InvalidInput
from sdmodels.precision import DTYPES, InRange
from sdmodels.small_rows import SmallRows
from sdmodels.strips import decode_in_strips
from sdmodels.weights import DIFFUSERS_WEIGHTS, read_config, read_weights

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from sdmodels.precision import Precision, Rows


# Images up to this size are decoded as a whole: 0.4 GB in float32 with the autoencoder of SD 2.1.
WHOLE_PIXELS = 320 * 320


class VaeEncoder:
    """The encoder half of a diffusers AutoencoderKL, from `engine_folder/vae`.

    In half precision, which is for GPUs, rows that leave its range are computed again in float32.
    """

    def __init__(self, engine_folder: Path, device: str = "cpu", precision: Precision = "fp32") -> None:
        self._vae = _read_vae(engine_folder / "vae", ("decoder", "post_quant_conv"), device, precision)
        self._device, self._dtype = device, DTYPES[precision]
        self._encode_image: Rows = self.latents
        if precision != "fp32":
            self._encode_image = InRange("vae_encoder", self.latents, lambda: VaeEncoder(engine_folder, device).latents)
        self._scaling_factor: float = self._vae.config.scaling_factor
        self._downsampling = 2 ** (len(self._vae.config.block_out_channels) - 1)
        self._rows = SmallRows(device)

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[B, 4, h, w] latents, in the UNet's scale, of RGB pixels [B, 8h, 8w, 3], or RGBA [B, 8h, 8w, 4].

        Transparent pixels are 0 for the encoder, between the bytes 127 and 128: what inpainting UNets are shown in the
        place of what they are to paint. Any other opacity counts for nothing. The mean of the posterior, and no sample
        of it: its spread is far below what can be seen, and the same picture has the same latents. Each row is encoded
        by itself, as `VaeDecoder` decodes them. Raises `InvalidInput` for sizes that are no multiples of 8.
        """
        return np.stack(self._rows.map(self._encode, list(pixels), [row[..., 0].size for row in pixels]))

    def latents(self, image: torch.Tensor) -> torch.Tensor:
        """[B, 4, h, w] float32 latents, in the UNet's scale, of images [B, 3, 8h, 8w] from -1 to 1."""
        posterior = self._vae.encode(image.to(self._dtype, memory_format=torch.channels_last), return_dict=False)[0]
        latents: torch.Tensor = posterior.mode().float() * self._scaling_factor
        return latents

    @torch.inference_mode()
    def _encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        height, width, channels = pixels.shape
        step = self._downsampling
        if channels not in (3, 4) or not height or not width or height % step or width % step:
            raise InvalidInput(
                f"{width} x {height} pixels of {channels} channels: width and height must be multiples of {step}, "
                "and channels 3 or 4"
            )
        image = torch.tensor(pixels[..., :3], dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1
        if channels == 4:
            image[..., torch.from_numpy(pixels[..., 3] == 0)] = 0
        latents = self._encode_image(image.to(self._device, memory_format=torch.channels_last))[0]
        encoded: NDArray[np.float32] = latents.contiguous().cpu().numpy()
        return encoded


class VaeDecoder:
    """The decoder half of a diffusers AutoencoderKL, from `engine_folder/vae`.

    In half precision, which is for GPUs, rows that leave its range are computed again in float32.
    """

    def __init__(self, engine_folder: Path, device: str = "cpu", precision: Precision = "fp32") -> None:
        self._vae = _read_vae(engine_folder / "vae", ("encoder", "quant_conv"), device, precision)
        self._device, self._dtype = device, DTYPES[precision]
        self._decode_latents: Rows = self.image_alone
        if precision != "fp32":
            self._decode_latents = InRange(
                "vae_decoder", self.image_alone, lambda: VaeDecoder(engine_folder, device).image_alone
            )
        self._scaling_factor: float = self._vae.config.scaling_factor
        self.upsampling: int = 2 ** (len(self._vae.config.block_out_channels) - 1)
        """Pixels in each direction of one place of the latents."""
        self._rows = SmallRows(device)

    def image(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] float32 image, about -1 to 1, of latents [B, 4, h, w] in the UNet's scale; differentiable."""
        scaled = latents.to(memory_format=torch.channels_last) / self._scaling_factor
        image: torch.Tensor = self._vae.decode(scaled.to(self._dtype), return_dict=False)[0].float()
        return image

    def image_alone(self, latents: torch.Tensor) -> torch.Tensor:
        """As `image`, not differentiable; large ones in strips, for their memory."""
        height, width = latents.shape[2:]
        if height * width * self.upsampling**2 <= WHOLE_PIXELS:
            return self.image(latents)
        scaled = latents.to(memory_format=torch.channels_last) / self._scaling_factor
        return decode_in_strips(self._vae, scaled.to(self._dtype)).float()

    @property
    def module(self) -> AutoencoderKL:
        """Of diffusers, without the encoder."""
        return self._vae

    def __call__(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """[B, 8h, 8w, 3] RGB pixels of latents [B, 4, h, w] in the UNet's scale; the scaling factor is taken off here.

        Each row is decoded by itself: an image then depends on its own latents alone, and memory does not grow with
        the batch. Raises `InvalidInput` for NaN or infinity, which would be a black picture.
        """
        pixels = [row[0].size * self.upsampling**2 for row in latents]
        return np.stack(self._rows.map(self._decode, list(latents), pixels))

    @torch.inference_mode()
    def _decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        if not np.isfinite(latents).all():
            raise InvalidInput("the latents hold NaN or infinity: the denoising before went wrong")
        image = self._decode_latents(torch.from_numpy(latents[None]).to(self._device))[0]
        if not image.isfinite().all():
            raise InvalidInput("the latents are out of the decoder's range: they decode to NaN or infinity")
        decoded: NDArray[np.uint8] = self.pixels(image).cpu().numpy()
        return decoded

    @staticmethod
    def pixels(image: torch.Tensor) -> torch.Tensor:
        """[..., H, W, 3] bytes of images [..., 3, H, W]: -1 to 1 becomes 0 to 255, halves to even, as in diffusers."""
        return (image / 2 + 0.5).clamp(0, 1).mul(255).round().byte().movedim(-3, -1)


def _read_vae(folder: Path, without: tuple[str, ...], device: str, precision: Precision) -> AutoencoderKL:
    """The autoencoder but for those of its modules."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(read_config(folder / "config.json"))
    for name in without:
        delattr(vae, name)
    weights = read_weights(
        folder / DIFFUSERS_WEIGHTS,
        skip=tuple(f"{name}." for name in without),
        dtype=DTYPES[precision],
        device=device,
        # Takes a sixth off a decode on one core, where the UNet gains nothing from it.
        layout=torch.channels_last,
    )
    vae.load_state_dict({current_name(name): weight for name, weight in weights.items()}, assign=True)
    return vae.eval().requires_grad_(False)


def current_name(name: str) -> str:
    """Today's name of a parameter: the VAE files of SD 1 and 2 carry the names that attention had in diffusers 0.x."""
    for old, new in ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")):
        name = name.replace(old, new)
    return name

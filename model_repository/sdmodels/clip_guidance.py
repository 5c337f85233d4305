"""The gradient of CLIP's opinion of an unfinished image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import interpolate, normalize

from sdmodels.errors import InvalidInput
from sdmodels.image_tower import read_image_tower
from sdmodels.vae import VaeDecoder
from sdmodels.weights import read_config

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

Region = tuple[int, int, int, int]
"""Top, left, height and width of a part of the latents."""


class ClipGuidance:
    """How to change latents so that CLIP sees more of a text in them.

    It has an engine's VAE decoder and CLIP image tower. CLIP looks at cutouts of the latents, each of which is decoded
    by itself. One that would decode to more than `clip_guidance.cutout_size` pixels, of `engine_folder/engine.json`, in
    a direction is averaged down to that before, so that a cutout costs the same in an image of any size. Rows and
    cutouts are computed one by one: a row depends on itself alone, and memory is that of one cutout, however many there
    are.
    """

    def __init__(self, engine_folder: Path, device: str = "cpu") -> None:
        config = read_config(engine_folder / "clip" / "open_clip_config.json")
        self._decoder = VaeDecoder(engine_folder, device)
        self._tower = read_image_tower(engine_folder / "clip", config["model_cfg"]).to(device)
        self._device = device
        size = config["model_cfg"]["vision_cfg"]["image_size"]
        self._size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        most_pixels: int = read_config(engine_folder / "engine.json")["clip_guidance"]["cutout_size"]
        self._most_places = most_pixels // self._decoder.upsampling
        mean, deviation = (torch.tensor(config["preprocess_cfg"][name], device=device) for name in ("mean", "std"))
        self._mean, self._deviation = mean[:, None, None], deviation[:, None, None]

    def __call__(
        self,
        latents: NDArray[np.float32],
        targets: NDArray[np.float32],
        seeds: NDArray[np.int64],
        cutouts: NDArray[np.integer[Any]],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """[B, C, h, w] gradient of the loss by the latents, and [B] similarity, -1 to 1.

        `latents` [B, C, h, w] are denoised, in the UNet's scale; `targets` [B, D] text features of unit length.
        `cutouts` [B] squares follow from `seeds` [B], as `regions` says. The loss is the mean over the cutouts of
        half the squared angle, in radians, between their features and the target; the similarity the mean cosine.
        Raises InvalidInput for latents that are not finite.
        """
        rows = [self._row(*row) for row in zip(latents, targets, seeds, cutouts, strict=True)]
        gradients, similarities = zip(*rows, strict=True)
        return np.stack(gradients), np.array(similarities, np.float32)

    def _row(
        self, latents: NDArray[np.float32], target: NDArray[np.float32], seed: int, cutouts: int
    ) -> tuple[NDArray[np.float32], float]:
        if not np.isfinite(latents).all():
            raise InvalidInput("the latents hold NaN or infinity: the denoising before went wrong")
        x = torch.tensor(latents, device=self._device, requires_grad=True)
        y = torch.tensor(target, device=self._device)
        looked_at = regions(latents.shape[-2], latents.shape[-1], int(cutouts), int(seed))
        gradient, similarity = torch.zeros_like(x), 0.0
        for region in looked_at:
            features = self.features(x, region)
            loss = spherical_distance(features, y)
            gradient += torch.autograd.grad(loss, x)[0]
            similarity += float(features.detach() @ y)
        mean: NDArray[np.float32] = (gradient / len(looked_at)).cpu().numpy()
        return mean, similarity / len(looked_at)

    def features(self, latents: torch.Tensor, region: Region) -> torch.Tensor:
        """[D] features, of unit length, of what a part of the latents [C, h, w] decodes to."""
        top, left, height, width = region
        part = latents[None, :, top : top + height, left : left + width]
        part = _resized(part, (min(height, self._most_places), min(width, self._most_places)))
        image = _resized(self._decoder.image(part), self._size)
        features: torch.Tensor = self._tower(((image / 2 + 0.5) - self._mean) / self._deviation)
        return normalize(features, dim=-1)[0]


def regions(height: int, width: int, cutouts: int, seed: int) -> list[Region]:
    """The parts of [height, width] latents that CLIP looks at; no cutouts: all of it, squeezed to CLIP's shape.

    A cutout is a square. Its side is uniform between half the shorter side, rounded up, and all of it, and its place
    uniform among all that lie inside. The numbers come from Philox, keyed by `seed`.
    """
    if cutouts == 0:
        return [(0, 0, height, width)]
    generator = np.random.Generator(np.random.Philox(key=seed))
    longest = min(height, width)
    sides = generator.integers(-(-longest // 2), longest, size=cutouts, endpoint=True)
    tops, lefts = (generator.integers(0, full - sides, endpoint=True) for full in (height, width))
    return [(int(top), int(left), int(side), int(side)) for top, left, side in zip(tops, lefts, sides, strict=True)]


def spherical_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Half the squared angle, in radians, between two vectors of unit length.

    As 2 arcsin(|a - b| / 2)^2, which keeps its precision where the vectors almost agree (Crowson's CLIP guided
    diffusion, 2021).
    """
    half_angle: torch.Tensor = (torch.linalg.vector_norm(a - b) / 2).arcsin()
    return 2 * half_angle**2


def _resized(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if tuple(images.shape[-2:]) == size:
        return images
    resized: torch.Tensor = interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
    return resized

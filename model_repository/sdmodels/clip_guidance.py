"""The gradient of CLIP's opinion of an unfinished image."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate, normalize

from sdmodels.errors import InvalidInput
from sdmodels.image_tower import read_image_tower
from sdmodels.small_rows import SmallRows
from sdmodels.vae import VaeDecoder
from sdmodels.weights import read_config

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

Region = tuple[int, int, int, int]
"""Top, left, height and width of a part of the latents."""


class _Look(NamedTuple):
    """What CLIP sees in one look: the part of a row's latents [C, h, w], and the features [D] that it is to see."""

    latents: torch.Tensor
    target: torch.Tensor
    region: Region


class ClipGuidance:
    """How to change latents so that CLIP sees more of a text in them.

    It has an engine's VAE decoder and CLIP image tower. CLIP looks at cutouts of the latents, each of which is decoded
    by itself. One that would decode to more than `clip_guidance.cutout_size` pixels, of `engine_folder/engine.json`, in
    a direction is averaged down to that before, so that a cutout costs the same in an image of any size. Each cutout of
    a row is computed by itself, so that a row depends on itself alone, and memory is that of one, or of a few small
    ones (`SmallRows`), however many there are.
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
        self._rows = SmallRows(device)

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
        if not np.isfinite(latents).all():
            raise InvalidInput("the latents hold NaN or infinity: the denoising before went wrong")
        rows = [self._looks(*row) for row in zip(latents, targets, seeds, cutouts, strict=True)]
        looks = [look for row in rows for look in row]
        found = iter(self._rows.map(self._gradient, looks, [self._pixels(look.region) for look in looks]))
        gradients, similarities = [], []
        for row in rows:
            of_row, seen = zip(*(next(found) for _ in row), strict=True)
            gradients.append(torch.stack(of_row).mean(dim=0).cpu().numpy())
            similarities.append(sum(seen) / len(seen))
        return np.stack(gradients), np.array(similarities, np.float32)

    def _looks(
        self, latents: NDArray[np.float32], target: NDArray[np.float32], seed: np.int64, cutouts: np.integer[Any]
    ) -> list[_Look]:
        x, y = (torch.tensor(array, device=self._device) for array in (latents, target))
        _, height, width = latents.shape
        return [_Look(x, y, region) for region in regions(height, width, int(cutouts), int(seed))]

    def _pixels(self, region: Region) -> int:
        return math.prod(self._decoded(region)) * self._decoder.upsampling**2

    def _decoded(self, region: Region) -> tuple[int, int]:
        """Height and width of the latents that are decoded for a part of them."""
        _, _, height, width = region
        return min(height, self._most_places), min(width, self._most_places)

    def _gradient(self, look: _Look) -> tuple[torch.Tensor, float]:
        x = look.latents.clone().requires_grad_()
        features = self.features(x, look.region)
        [gradient] = torch.autograd.grad(spherical_distance(features, look.target), x)
        return gradient, float(features.detach() @ look.target)

    def features(self, latents: torch.Tensor, region: Region) -> torch.Tensor:
        """[D] features, of unit length, of what a part of the latents [C, h, w] decodes to."""
        top, left, height, width = region
        part = latents[None, :, top : top + height, left : left + width]
        part = _resized(part, self._decoded(region))
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

"""Depth maps as a depth UNet takes them: as many numbers as the latents have places, from -1 (far) to 1 (near)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Of the cubic kernel (Keys 1981), as torch has it.
SHARPNESS = -0.75


def depth_channel(depths: Floats, height: int, width: int) -> Floats:
    """[height, width] of depths [H, W] of any scale, more being nearer: the least becomes -1, the greatest 1.

    Resampled as diffusers' StableDiffusionDepth2ImgPipeline does it, by torch's bicubic interpolation, which looks at
    the four nearest depths in each direction and no others. A map without differences says nothing: 0.
    """
    resampled = _cubic_weights(depths.shape[0], height) @ depths @ _cubic_weights(depths.shape[1], width).T
    least, greatest = resampled.min(), resampled.max()
    if least == greatest:
        return np.zeros((height, width), np.float32)
    return np.asarray(2 * (resampled - least) / (greatest - least) - 1, np.float32)


def _cubic_weights(length: int, count: int) -> NDArray[np.float64]:
    """[count, length] how much of each of `length` values goes into `count` of them; the edges are continued."""
    places = (np.arange(count) + 0.5) * length / count - 0.5
    below = np.floor(places).astype(int)
    weights = np.zeros((count, length))
    for offset in (-1, 0, 1, 2):
        taken = np.clip(below + offset, 0, length - 1)
        np.add.at(weights, (np.arange(count), taken), _cubic(np.abs(places - below - offset)))
    return weights


def _cubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    a = SHARPNESS
    inner = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    outer = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    return np.where(distance <= 1, inner, np.where(distance < 2, outer, 0.0))

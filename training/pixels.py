"""Pixel statistics: what can be said of a picture without a model. Pure numpy; pictures are [H, W, 3] uint8.

Every test here is checked on the true world, on pictures with the thing and without it (`evaluate.pixel_test_rates`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

Picture = np.ndarray[Any, np.dtype[np.uint8]]


def _channels(picture: Picture) -> tuple[Any, Any, Any]:
    scaled = picture.astype(np.float32) / 255
    return scaled[..., 0], scaled[..., 1], scaled[..., 2]


def green_share(picture: Picture) -> float:
    """Share of pixels that are green by hue, however dark: leaves and meadows."""
    red, green, blue = _channels(picture)
    return float(np.mean((green > 1.12 * red) & (green > 1.12 * blue) & (green > 0.08)))


def blue_share(picture: Picture) -> float:
    """Share of pixels in the lower 40 % that are blue: water."""
    red, green, blue = _channels(picture[round(picture.shape[0] * 0.6) :])
    return float(np.mean((blue > 1.25 * green) & (blue > 1.8 * red)))


def time_of_day(picture: Picture) -> str:
    """`day`, `sunset` or `night`, from the sky (rows 3 to 30 %): dark at night, more red than green at sunset."""
    height = picture.shape[0]
    red, green, blue = _channels(picture[round(height * 0.03) : round(height * 0.3)])
    if float(np.median(red + green + blue)) / 3 < 0.27:
        return "night"
    return "sunset" if float(np.median(red - green)) > 0.04 else "day"


def colour_share(picture: Picture, colour: str) -> float:
    """Share of pixels of the named colour as houses and sails have it (`red`, `blue`, `yellow`), in any light."""
    red, green, blue = _channels(picture)
    if colour == "red":
        hit = (red > 0.5) & (green < 0.45 * red) & (blue < 0.45 * red)
    elif colour == "blue":
        hit = (blue > 0.5) & (red < 0.4 * blue) & (green < 0.5 * blue)
    elif colour == "yellow":
        hit = (red > 0.55) & (green > 0.65 * red) & (green < 0.95 * red) & (blue < 0.4 * red)
    else:
        raise ValueError(f"colour={colour!r}: pixels can tell red, blue and yellow")
    return float(np.mean(hit))

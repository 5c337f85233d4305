"""The linear map from latents to colours that comes nearest to an engine's decoder, for previews."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from sdmodels.vae import VaeDecoder, VaeEncoder

    Floats = NDArray[np.float32]
    Pixels = NDArray[np.uint8]

PICTURES = 32
SIDE = 64


@dataclass(frozen=True, slots=True)
class PreviewMap:
    """`rgb = matrix @ latents + bias`, RGB of 0 to 1, at each place of the latents."""

    matrix: list[list[float]]
    """[3, C]."""
    bias: list[float]
    """[3]."""
    missed: float
    """The root mean square of what it misses, of those pairs that it was fitted to."""


def fit(pairs: Iterable[tuple[Floats, Pixels]]) -> PreviewMap:
    """The least-squares map of latents [C, h, w] to the mean colours of pixels [H, W, 3] around each place."""
    inputs, outputs = [], []
    for latents, pixels in pairs:
        channels, height, width = latents.shape
        scale = pixels.shape[0] // height
        places = pixels.reshape(height, scale, width, scale, 3).mean(axis=(1, 3)) / 255
        inputs.append(np.column_stack([latents.reshape(channels, -1).T, np.ones(height * width)]))
        outputs.append(places.reshape(-1, 3))
    known, wanted = np.concatenate(inputs), np.concatenate(outputs)
    solution, *_ = np.linalg.lstsq(known, wanted, rcond=None)
    missed = float(np.sqrt(np.mean((known @ solution - wanted) ** 2)))
    rounded = solution.round(4)
    return PreviewMap(rounded[:-1].T.tolist(), rounded[-1].tolist(), missed)


def of_autoencoder(encode: VaeEncoder, decode: VaeDecoder) -> PreviewMap:
    """The map that is fitted to what an autoencoder makes of coloured noise: it needs no images and no UNet."""
    latents = [encode(picture[None])[0] for picture in coloured_noise(PICTURES, SIDE)]
    return fit((each, decode(each[None])[0]) for each in latents)


def coloured_noise(count: int, side: int) -> Iterator[Pixels]:
    """[side, side, 3] pictures with the statistics of photographs: as much of each scale as of any other (an amplitude
    of 1 / frequency), more light and dark than hue, and any mean and contrast. Always the same ones."""
    rng = np.random.default_rng(0)
    frequencies = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequencies[0, 0] = np.inf
    for _ in range(count):
        spectrum = np.fft.rfft2(rng.standard_normal((3, side, side))) / frequencies
        fields = np.fft.irfft2(spectrum, (side, side))
        fields /= fields.std(axis=(1, 2), keepdims=True)
        # One field of light, two of hue.
        light, first, second = fields * rng.uniform((0.1, 0.02, 0.02), (0.3, 0.15, 0.15))[:, None, None]
        mean = rng.uniform(0.2, 0.8, 3)
        colours = np.stack([light + first, light - 0.5 * first + second, light - 0.5 * first - second], axis=-1) + mean
        yield (colours * 255).round().clip(0, 255).astype(np.uint8)

"""The preview map that `sdserver engine add` fits: near to the decoder, from no images but noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sdmodels.preview_map import coloured_noise, fit, of_autoencoder
from sdmodels.vae import VaeDecoder, VaeEncoder
from sdserver.engines import PreviewMap
from sdserver.images import preview

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "model_repository/engines/tiny-landscape"

rng = np.random.default_rng(5)


def test_a_linear_decoder_is_found_exactly() -> None:
    matrix, bias = rng.uniform(-0.1, 0.1, (3, 4)), np.array([0.5, 0.4, 0.6])
    latents = rng.standard_normal((4, 6, 9)).astype(np.float32)
    colours = np.tensordot(matrix, latents, axes=1).transpose(1, 2, 0) + bias
    found = fit([(latents, (colours * 255).repeat(8, axis=0).repeat(8, axis=1))])
    np.testing.assert_allclose(found.matrix, matrix, atol=1e-4)
    np.testing.assert_allclose(found.bias, bias, atol=1e-4)
    assert found.missed < 1e-6


def test_noise_is_coloured_always_the_same_and_neither_flat_nor_clipped() -> None:
    pictures = [*coloured_noise(3, 64)]
    for picture, again in zip(pictures, coloured_noise(3, 64), strict=True):
        np.testing.assert_array_equal(picture, again)
        assert 10 < picture.std() < 110
        assert np.isin(picture, (0, 255)).mean() < 0.2


def test_a_map_that_is_fitted_to_noise_shows_real_images() -> None:
    encode, decode = VaeEncoder(SHIPPED), VaeDecoder(SHIPPED)
    found = of_autoencoder(encode, decode)
    # What the engine has drawn itself.
    drawn = np.asarray(Image.open(ROOT / "docs/contact-sheet.png").convert("RGB"))[:256, :512]
    latents = encode(drawn[None])[0]
    wanted = decode(latents[None])[0].reshape(32, 8, 64, 8, 3).mean(axis=(1, 3))
    shown = preview(latents, PreviewMap.model_validate({"matrix": found.matrix, "bias": found.bias}))
    missed = np.sqrt(np.mean((shown - wanted) ** 2))
    # A single colour, the mean, would miss by their spread.
    assert missed < wanted.std() / 2
    assert found.missed == pytest.approx(0.08, abs=0.04)

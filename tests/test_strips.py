"""The decoder in strips draws what the whole decoder draws, whatever the height."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import Model
from diffusers_pictures import psnr
from sdmodels.strips import decode_in_strips
from sdmodels.vae import VaeDecoder

VAE = Model("2", "epsilon").vae


@pytest.mark.parametrize(("height", "width"), [(1, 3), (2, 2), (3, 5), (8, 4)])
def test_it_is_the_whole_decoder_but_for_rounding(height: int, width: int) -> None:
    torch.manual_seed(height)
    latents = 3 * torch.randn(2, 4, height, width)
    with torch.inference_mode():
        expected = VAE.decode(latents).sample
    np.testing.assert_allclose(decode_in_strips(VAE, latents).numpy(), expected.numpy(), atol=2e-5)


def test_in_bf16_it_is_as_near_to_float32_as_the_whole_decoder() -> None:
    latents = 3 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    half = Model("2", "epsilon").vae.to(torch.bfloat16)
    with torch.inference_mode():
        exact, whole = VAE.decode(latents).sample, half.decode(latents.bfloat16()).sample
    near, far = (
        psnr(VaeDecoder.pixels(image)[0].numpy().astype(np.float32), VaeDecoder.pixels(exact)[0].numpy())
        for image in (decode_in_strips(half, latents.bfloat16()).float(), whole.float())
    )
    assert near > far - 1

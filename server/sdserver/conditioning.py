"""What a UNet takes beside the noisy latents: channels after theirs, the same in every step, without any noise of it.

An inpainting UNet was trained to fill what it cannot see. It takes 1 where a place of the latents is to be repainted
and 0 where it is kept, then the latents of the image without what is repainted: the order of diffusers'
StableDiffusionInpaintPipeline, and of the original code.

A depth UNet takes how far away everything is (`depth`): the request says it, or a model estimates it from the image.

An upscaling UNet takes the image that it enlarges, which has as many pixels as the latents have places, with noise of
its own, and how much noise that is: faults of the image drown in it, and details, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sdserver.canvas import blank, padded_map, resized_map
from sdserver.depth import depth_channel
from sdserver.encoding import encode
from sdserver.parameterization import c_in

if TYPE_CHECKING:
    from sdserver.backends import Floats
    from sdserver.engine_schedulers import EngineSchedulers
    from sdserver.noise import ImageNoise
    from sdserver.passes import Pass
    from sdserver.request import GenerationRequest


async def conditioning(request: GenerationRequest, schedulers: EngineSchedulers, part: Pass) -> Floats | None:
    """[E, h, w] the channels for a pass, the same for all images of a request; None: the UNet takes none."""
    engine = request.engine
    if engine.conditioning == "none":
        return None
    width, height = engine.padded_size(part.width, part.height)
    if engine.conditioning == "upscaling":
        # Requests without an image are refused.
        assert request.init_image is not None
        scale = engine.latents.downsampling
        pixels = request.init_image.canvas.padded(width // scale, height // scale)
        return np.asarray(pixels.transpose(2, 0, 1) / 127.5 - 1, np.float32)
    if engine.conditioning == "depth":
        depths = await _depths(request, schedulers, part)
        return depth_channel(depths, *(side // engine.latents.downsampling for side in (height, width)))[None]
    # Without an image there is nothing to keep.
    canvas = blank(part.width, part.height) if request.init_image is None else request.init_image.canvas
    pixels, mask = canvas.masked(width, height, engine.latents.downsampling)
    assert schedulers.vae_encoder is not None
    channels: Floats = np.concatenate([mask[None], await encode(schedulers.vae_encoder, request, pixels)])
    return channels


def with_noise(request: GenerationRequest, channels: Floats, noise: ImageNoise) -> Floats:
    """[E, h, w] the channels of one image: an upscaler's with the image's own noise, any other's as they are."""
    upscaling, level = request.engine.upscaling, request.noise_level
    if upscaling is None or level is None:
        return channels
    sigma = float(upscaling.noise_schedule.sigmas[level])
    noised: Floats = c_in(sigma) * (channels + sigma * noise.of_image(channels.shape))
    with_level: Floats = np.concatenate([noised, np.full_like(channels[:1], level)])
    return with_level


async def _depths(request: GenerationRequest, schedulers: EngineSchedulers, part: Pass) -> Floats:
    """[H, W] depths of all that is generated in a pass, more being nearer, at any resolution."""
    width, height = request.engine.padded_size(part.width, part.height)
    if request.depth_map is not None:
        return padded_map(resized_map(request.depth_map.depths, part.width, part.height), width, height)
    # Requests without either are refused.
    assert request.init_image is not None
    assert schedulers.depth_estimator is not None
    pixels = request.init_image.canvas.padded(width, height)
    estimated = await schedulers.depth_estimator.predict([(pixels.transpose(2, 0, 1),)], request.tenant)
    depths: Floats = estimated[0]
    return depths

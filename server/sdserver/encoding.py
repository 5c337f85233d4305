"""Pixels -> latents, in tiles where they are large, so that the encoder's memory is bounded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sdserver.decoding import tile_grid

if TYPE_CHECKING:
    from sdserver.backends import Floats, Pixels
    from sdserver.request import GenerationRequest
    from sdserver.step_scheduler import StepScheduler


async def encode(vae_encoder: StepScheduler, request: GenerationRequest, pixels: Pixels) -> Floats:
    """[C, h, w] latents of pixels [H, W, 3 or 4] for a request; cancelling it falls between tiles.

    In the tiles in which they are decoded: the encoder needs no more memory for them.
    """
    scale = request.engine.latents.downsampling
    grid = tile_grid(request, pixels.shape[0] // scale, pixels.shape[1] // scale)
    parts = grid.scaled(scale).split(pixels.transpose(2, 0, 1))
    return grid.join(await vae_encoder.predict([(np.asarray(part, np.uint8),) for part in parts], request.tenant))

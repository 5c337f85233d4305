"""Pixels -> latents, in tiles where they are large, so that the encoder's memory is bounded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sdserver.decoding import tile_grid

if TYPE_CHECKING:
    from sdserver.backends import Backend, Floats, Pixels
    from sdserver.request import GenerationRequest


async def encode(backend: Backend, request: GenerationRequest, pixels: Pixels) -> Floats:
    """[C, h, w] latents of pixels [H, W, 3] for a request; cancelling it falls between tiles.

    In the tiles in which they are decoded: the encoder needs no more memory for them.
    """
    engine = request.engine
    scale = engine.latents.downsampling
    grid = tile_grid(request, pixels.shape[0] // scale, pixels.shape[1] // scale)
    tiles: list[Floats] = []
    for part in grid.scaled(scale).split(pixels.transpose(2, 0, 1)):
        [tile] = await backend.encode_image(engine, np.ascontiguousarray(part.transpose(1, 2, 0), np.uint8)[None])
        tiles.append(tile)
    return tiles[0] if len(tiles) == 1 else grid.join(tiles)

"""Latents -> pixels, in tiles where they are large, so that the decoder's memory is bounded."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np

from sdserver.windows import Grid, cover

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sdserver.backends import Floats, Pixels
    from sdserver.request import GenerationRequest
    from sdserver.step_scheduler import StepScheduler


async def decode(vae_decoder: StepScheduler, request: GenerationRequest, latents: Floats) -> Pixels:
    """[H, W, 3] pixels of latents [C, h, w] of a request; cancelling it falls between tiles.

    Tiles are decoded one by one and blended. Where the image is tiled itself, they go on at its other border.
    """
    grid = tile_grid(request, latents.shape[1], latents.shape[2])
    tiles = await vae_decoder.predict([(part,) for part in grid.split(latents)], request.tenant)
    if len(tiles) == 1:
        pixels: Pixels = tiles[0]
        return pixels
    return await asyncio.to_thread(_blended, grid.scaled(request.engine.latents.downsampling), tiles)


def tile_grid(request: GenerationRequest, height: int, width: int) -> Grid:
    """The tiles of latents of a height and width, in places of the latents."""
    tile, scale = request.engine.decode_tile, request.engine.latents.downsampling
    rows, columns = (
        cover(
            length,
            length if tile is None else tile.size // scale,
            0 if tile is None else tile.overlap // scale,
            ring=ring,
        )
        for length, ring in ((height, request.tile_y), (width, request.tile_x))
    )
    return Grid(rows, columns)


def _blended(grid: Grid, tiles: NDArray[np.uint8]) -> Pixels:
    joined = grid.join(tile.transpose(2, 0, 1) for tile in tiles)
    return joined.transpose(1, 2, 0).round().clip(0, 255).astype(np.uint8)

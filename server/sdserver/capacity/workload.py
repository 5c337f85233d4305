"""What callers ask for, as far as it costs time, and when they come."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdserver.windows import Grid, cover, worthwhile_cover

if TYPE_CHECKING:
    from sdserver.engines import Engine

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Work:
    """What a request asks for, as far as it costs time. Shapes are heights and widths of latents."""

    images: int
    evaluations: int
    """Of the UNet, for each image: its steps, or twice as many with samplers of second order."""
    rows: int
    """Of one evaluation."""
    shape: Shape
    """Of a row: of the image, or of its windows."""
    tiles: int
    tile: Shape
    """What the decoder takes: the image, or its tiles."""
    places: int
    """Of the image."""


def work_of(engine: Engine, width: int, height: int, evaluations: int, *, guided: bool = True, images: int = 1) -> Work:
    """The work of a request for images of so many pixels."""
    scale = engine.latents.downsampling
    padded_width, padded_height = engine.padded_size(width, height)
    rows, columns = padded_height // scale, padded_width // scale
    windows, tile = engine.windows, engine.decode_tile
    grid, tiles = (
        Grid(
            *(
                covers(length, *((length, 0) if of is None else (of.size // scale, of.overlap // scale)))
                for length in (rows, columns)
            )
        )
        for of, covers in ((windows, worthwhile_cover), (tile, cover))
    )
    return Work(
        images=images,
        evaluations=evaluations,
        rows=(2 if guided else 1) * len(grid),
        shape=(grid.rows.size, grid.columns.size),
        tiles=len(tiles),
        tile=(tiles.rows.size, tiles.columns.size),
        places=rows * columns,
    )


Mix = tuple[tuple[Work, float], ...]
"""Kinds of requests, and how often each is asked for, relative to the others."""


def images_of(mix: Mix) -> float:
    """Images of a request, on average."""
    return sum(work.images * share for work, share in mix) / sum(share for _, share in mix)


def poisson(mix: Mix, rate: float, requests: int, seed: int) -> list[tuple[float, Work]]:
    """Requests that arrive independently of each other, `rate` a second: when, and what they ask for.

    Of one seed, those of another rate are the same ones, closer to each other or further apart.
    """
    generator = random.Random(seed)
    kinds, weights = zip(*mix, strict=True)
    now = 0.0
    arrivals: list[tuple[float, Work]] = []
    for _ in range(requests):
        now += generator.expovariate(1.0) / rate
        arrivals.append((now, generator.choices(kinds, weights)[0]))
    return arrivals

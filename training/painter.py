"""Paints a scene: Pillow at twice the size, reduced by a box filter.

Shapes are large and flat, since an 8x autoencoder with four channels keeps nothing finer than about six pixels: stars
are a few soft dots, trees have one highlight, boats have no mast. Every element draws its place from its own random
stream, so that a changed attribute moves nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from training.world import NATIVE, Scene

Colour = tuple[int, int, int]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]

_SKY: dict[tuple[str, bool], tuple[Colour, Colour]] = {
    # (time, overcast): colour at the top, colour at the horizon
    ("day", False): ((70, 145, 235), (190, 225, 250)),
    ("day", True): ((135, 142, 152), (200, 204, 208)),
    ("sunset", False): ((110, 60, 140), (255, 160, 70)),
    ("sunset", True): ((105, 80, 110), (205, 140, 115)),
    ("night", False): ((6, 8, 38), (30, 36, 88)),
    ("night", True): ((20, 22, 32), (48, 50, 64)),
}
_CLOUD: dict[str, Colour] = {"day": (252, 252, 252), "sunset": (250, 170, 165), "night": (74, 78, 110)}
_GREY_CLOUD: dict[str, Colour] = {"day": (165, 170, 178), "sunset": (150, 105, 118), "night": (34, 36, 48)}
_GROUND: dict[str, Colour] = {"meadow": (98, 190, 62), "desert": (232, 190, 110), "snow": (240, 244, 250)}
_WATER: Colour = (24, 112, 178)
_SAND: Colour = (234, 212, 148)
# How the light of the hour multiplies the land's colours, and (milder) those of houses and boats, which must keep
# their names at night.
_LIGHT: dict[str, tuple[float, float, float]] = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (0.92, 0.68, 0.58),
    "night": (0.36, 0.4, 0.53),
}
_OBJECT_LIGHT: dict[str, tuple[float, float, float]] = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (0.98, 0.93, 0.88),
    "night": (0.74, 0.74, 0.78),
}
_NAMED: dict[str, Colour] = {
    "red": (222, 32, 30),
    "blue": (34, 60, 228),
    "yellow": (252, 212, 28),
    "white": (250, 250, 248),
}
_LEAVES: dict[str, tuple[Colour, Colour]] = {
    "round": ((38, 128, 36), (66, 160, 52)),
    "pine": ((14, 88, 56), (24, 108, 66)),
    "palm": ((34, 132, 48), (34, 132, 48)),
    "autumn": ((222, 92, 20), (244, 136, 38)),
}
_STREAMS = ("horizon", "sky", "orb", "stars", "mountains", "water", "lake", "trees", "house", "boat")


def _lit(colour: Colour, light: tuple[float, float, float]) -> Colour:
    return tuple(round(channel * factor) for channel, factor in zip(colour, light, strict=True))  # type: ignore[return-value]


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


class _Painter:
    """One painting in progress: canvas of twice the scene's size; `u` is the canvas length of one native pixel."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.width, self.height = 2 * scene.width, 2 * scene.height
        self.u = min(self.width, self.height) / NATIVE
        self.span = self.width / (NATIVE * self.u)  # width in native images: how often things repeat
        self.light, self.object_light = _LIGHT[scene.time], _OBJECT_LIGHT[scene.time]
        self.horizon = self.height * self.rng("horizon").uniform(0.46, 0.58)
        sky_top, sky_low = _SKY[scene.time, scene.sky == "overcast"]
        ramp = np.linspace(0, 1, self.height)[:, None] * self.height / self.horizon
        column = np.array(sky_top) + (np.array(sky_low) - np.array(sky_top)) * np.minimum(ramp, 1)
        pixels = np.repeat(column[:, None], self.width, 1)
        self.image = Image.fromarray(np.rint(pixels).astype(np.uint8))
        self.draw = ImageDraw.Draw(self.image)

    def rng(self, stream: str) -> np.random.Generator:
        return np.random.default_rng([self.scene.layout, 100 + _STREAMS.index(stream)])

    def disc(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        self.draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)

    def below(self, line: list[tuple[float, float]], colour: Colour) -> None:
        """Fill everything under a line that runs from the left edge to the right."""
        self.draw.polygon([*line, (self.width, self.height), (0, self.height)], fill=colour)

    def stars(self) -> None:
        rng = self.rng("stars")
        count = round(9 * self.span)
        for index in range(count):
            x, y = self.width * (index + rng.uniform(0.1, 0.9)) / count, rng.uniform(0.03, 0.8) * self.horizon
            radius = rng.uniform(1.7, 2.3) * self.u
            self.disc(x, y, radius, radius, (236, 236, 246))

    def orb(self) -> None:
        rng = self.rng("orb")
        x = self.width * rng.uniform(0.12, 0.88)
        radius = rng.uniform(9, 13) * self.u
        if self.scene.time == "day":
            y, colour = self.horizon * rng.uniform(0.2, 0.4), (255, 228, 70)
        elif self.scene.time == "sunset":
            y, colour = self.horizon - radius * rng.uniform(0.2, 1.6), (255, 226, 120)
        else:
            y, colour = self.horizon * rng.uniform(0.2, 0.4), (240, 238, 214)
        self.disc(x, y, radius, radius, colour)

    def clouds(self) -> None:
        rng = self.rng("sky")
        grey = self.scene.sky == "overcast"
        colour = (_GREY_CLOUD if grey else _CLOUD)[self.scene.time]
        for _ in range(int(rng.integers(2, 4) * self.span) + (2 if grey else 0)):
            x, y = rng.uniform(0, self.width), self.horizon * rng.uniform(0.1, 0.62)
            size = rng.uniform(11, 17) * self.u * (1.5 if grey else 1.0)
            self.disc(x, y, size * 1.7, size * 0.5, colour)
            self.disc(x + size * rng.uniform(-0.7, 0.7), y - size * 0.4, size * 0.8, size * 0.5, colour)

    def mountains(self) -> None:
        rng = self.rng("mountains")
        rock = _lit((132, 124, 132), self.light)
        shade = _lit((98, 92, 104), self.light)
        cap = _lit((248, 250, 255), tuple(0.4 + 0.6 * factor for factor in self.light))  # type: ignore[arg-type]
        count = max(2, round(rng.integers(3, 5) * self.span))
        for index in rng.permutation(count):
            x = self.width * (index + rng.uniform(0.2, 0.8)) / count
            tall = rng.uniform(22, 40) * self.u
            left, right = tall * rng.uniform(0.9, 1.3), tall * rng.uniform(0.9, 1.3)
            ridge = x + tall * rng.uniform(-0.1, 0.25)
            top, foot = self.horizon - tall, self.horizon + 2
            self.draw.polygon([(x, top), (x + right, foot), (x - left, foot)], fill=rock)
            self.draw.polygon([(x, top), (x + right, foot), (ridge, foot)], fill=shade)
            if self.scene.mountains == "snowy":
                down = 0.42
                low = top + tall * down
                self.draw.polygon(
                    [(x, top), (x + right * down, low), (x, low + tall * 0.1), (x - left * down, low)], cap
                )

    def land(self) -> None:
        rng = self.rng("water")
        if self.scene.ground != "sea":
            colour = _lit(_GROUND[self.scene.ground], self.light)
            self.below([(0, self.horizon), (self.width, self.horizon)], colour)
            middle = self.horizon + (self.height - self.horizon) * rng.uniform(0.3, 0.6)
            steps = np.linspace(0, self.width, 24)
            wave = middle + np.sin(steps / self.width * rng.uniform(2, 5) * self.span + rng.uniform(0, 6)) * 7 * self.u
            self.below([(float(x), float(y)) for x, y in zip(steps, wave, strict=True)], _mix(colour, (0, 0, 0), 0.1))
            return
        water = _lit(_WATER, self.light)
        self.below([(0, self.horizon), (self.width, self.horizon)], water)
        bands = 4
        for band in range(1, bands):
            y = self.horizon + (self.height - self.horizon) * band / bands
            self.below([(0, y), (self.width, y)], _mix(water, (0, 0, 20), 0.11 * band))
        beach = rng.random() < 0.3 or self.scene.trees != "none"
        if beach:
            steps = np.linspace(0, self.width, 24)
            shore = self.height - rng.uniform(15, 22) * self.u
            wave = shore + np.sin(steps / self.width * 4 * self.span + rng.uniform(0, 6)) * 3 * self.u
            self.below([(float(x), float(y)) for x, y in zip(steps, wave, strict=True)], _lit(_SAND, self.light))

    def lake(self) -> tuple[float, float, float]:
        """Paint the lake; returns its middle (x, y) and its half width."""
        rng = self.rng("lake")
        depth = self.height - self.horizon
        half = rng.uniform(38, 50) * self.u
        x = self.width * 0.5 + (self.width - 2 * half) * rng.uniform(-0.4, 0.4)
        y, tall = self.horizon + depth * rng.uniform(0.42, 0.52), min(depth * 0.3, 15 * self.u)
        self.disc(x, y, half, tall, _lit((36, 128, 214), self.light))
        return x, y, half

    def tree(self, x: float, foot: float, tall: float) -> None:
        kind = self.scene.trees
        leaves, bright = (_lit(colour, self.light) for colour in _LEAVES[kind])
        trunk = _lit((104, 66, 36), self.light)
        half = tall * 0.07
        self.draw.rectangle((x - half, foot - tall * 0.5, x + half, foot), fill=trunk)
        if kind == "pine":
            wide = tall * 0.3
            self.draw.polygon(
                [(x, foot - tall * 0.7), (x + wide, foot - tall * 0.16), (x - wide, foot - tall * 0.16)], leaves
            )
            self.draw.polygon(
                [(x, foot - tall), (x + wide * 0.8, foot - tall * 0.48), (x - wide * 0.8, foot - tall * 0.48)], bright
            )
        elif kind == "palm":
            crown = foot - tall * 0.8
            self.draw.rectangle((x - half * 0.9, crown, x + half * 0.9, foot), fill=trunk)
            for turn in (-1.0, -0.5, 0.5, 1.0):
                reach, lift = tall * 0.4 * turn, tall * (0.24 - 0.3 * abs(turn))
                middle = (x + reach * 0.55, crown - lift - tall * 0.13)
                self.draw.polygon(
                    [
                        (x, crown + half),
                        middle,
                        (x + reach, crown - lift + tall * 0.1),
                        (x + reach * 0.45, crown - lift + tall * 0.04),
                    ],
                    leaves,
                )
            self.disc(x, crown, tall * 0.09, tall * 0.09, leaves)
        else:
            radius = tall * 0.34
            self.disc(x, foot - tall + radius, radius, radius, leaves)
            self.disc(x - radius * 0.25, foot - tall + radius * 0.8, radius * 0.55, radius * 0.55, bright)

    def trees(self) -> None:
        rng = self.rng("trees")
        depth = self.height - self.horizon
        beach = self.scene.ground == "sea"
        if self.scene.tree_count == "one":
            foot = self.height - rng.uniform(4, 14) * self.u if beach else self.horizon + depth * rng.uniform(0.4, 0.7)
            self.tree(self.width * rng.uniform(0.2, 0.8), foot, rng.uniform(60, 78) * self.u)
            return
        forest = self.scene.tree_count == "forest"
        count = round((11 if forest else 3.4) * self.span)
        places = (np.arange(count) + rng.uniform(-0.25, 0.25, count) + 0.5) / count * self.width
        feet = depth * rng.uniform(0.08, 0.75, count)
        if forest:  # two rows: back trees first, so that the wood is closed
            feet = depth * (np.where(np.arange(count) % 2 == 0, 0.12, 0.6) + rng.uniform(-0.06, 0.14, count))
        for index in np.argsort(feet):
            foot = self.height - rng.uniform(3, 14) * self.u if beach else self.horizon + float(feet[index])
            self.tree(float(places[index]), foot, rng.uniform(42, 52) * self.u)

    def house(self) -> None:
        rng = self.rng("house")
        wall = _lit(_NAMED[self.scene.house], self.object_light)
        wide, tall = rng.uniform(42, 52) * self.u, rng.uniform(25, 31) * self.u
        x = self.width * 0.5 + (self.width - wide * 1.3) * rng.uniform(-0.42, 0.42)
        foot = self.horizon + (self.height - self.horizon) * rng.uniform(0.45, 0.72)
        left, right, eaves = x - wide / 2, x + wide / 2, foot - tall
        dark = _lit((74, 50, 46), self.object_light)
        glass = (255, 226, 120) if self.scene.time == "night" else _lit((120, 170, 200), self.object_light)
        self.draw.rectangle((left, eaves, right, foot), fill=wall)
        self.draw.polygon(
            [(left - wide * 0.1, eaves), (x, eaves - tall * 0.75), (right + wide * 0.1, eaves)], fill=dark
        )
        self.draw.rectangle((x - 4.5 * self.u, foot - tall * 0.6, x + 4.5 * self.u, foot), fill=dark)
        for side in (-1, 1):
            middle, size = x + side * wide * 0.31, 4.2 * self.u
            self.draw.rectangle(
                (middle - size, eaves + tall * 0.2, middle + size, eaves + tall * 0.2 + 2 * size), fill=glass
            )

    def boat(self, water: tuple[float, float, float] | None) -> None:
        """`water`: middle and half width of the lake it floats on, None for the sea."""
        rng = self.rng("boat")
        colour = _lit(_NAMED[self.scene.boat], self.object_light)
        hull = _lit((86, 54, 40), self.object_light)
        size = rng.uniform(0.9, 1.1) * self.u
        if water is None:
            x = self.width * 0.5 + (self.width - 64 * size) * rng.uniform(-0.42, 0.42)
            foot = self.horizon + (self.height - self.horizon) * rng.uniform(0.25, 0.5)
        else:
            x, foot = water[0] + water[2] * rng.uniform(-0.35, 0.35), water[1] + 6 * size
        deck = foot - 10 * size
        self.draw.polygon(
            [(x - 25 * size, deck), (x + 25 * size, deck), (x + 17 * size, foot), (x - 17 * size, foot)], fill=hull
        )
        self.draw.polygon(
            [(x - 1 * size, deck - 3 * size), (x - 1 * size, deck - 46 * size), (x + 25 * size, deck - 3 * size)],
            fill=colour,
        )
        self.draw.polygon(
            [(x - 5 * size, deck - 3 * size), (x - 5 * size, deck - 36 * size), (x - 22 * size, deck - 3 * size)],
            fill=colour,
        )

    def paint(self) -> Image.Image:
        scene = self.scene
        if scene.stars == "yes":
            self.stars()
        if scene.orb == "yes":
            self.orb()
        if scene.sky != "clear":
            self.clouds()
        if scene.mountains != "none":
            self.mountains()
        self.land()
        water = self.lake() if scene.lake == "yes" else None
        if scene.trees != "none":
            self.trees()
        if scene.house != "none":
            self.house()
        if scene.boat != "none":
            self.boat(water)
        return self.image.reduce(2)


def paint(scene: Scene) -> Pixels:
    """[height, width, 3] uint8 sRGB picture of the scene; the same scene always gives the same bytes."""
    return np.asarray(_Painter(scene).paint())

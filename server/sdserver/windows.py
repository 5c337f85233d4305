"""Overlapping windows of a picture that is too large to be looked at as a whole, and how their results become one.

Pure arithmetic: denoising cuts latents with it, decoding and encoding cut tiles.

    grid = Grid(cover(height, 16, 4), cover(width, 16, 4, ring=True))
    whole = grid.join(model(part) for part in grid.split(latents))

Where a model gives back more or fewer places than it takes, such as pixels for latents, the side with more places has
`grid.scaled(factor)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Cover:
    """Windows of `size` places that begin at `starts`, ascending, and together cover `length` places.

    On a `ring` the first place follows the last one, and windows may lie across that border.
    """

    length: int
    size: int
    starts: tuple[int, ...]
    ring: bool = False

    def places(self) -> NDArray[np.intp]:
        """[N, size] the places of each window."""
        places: NDArray[np.intp] = (np.array(self.starts)[:, None] + np.arange(self.size)) % self.length
        return places

    def weights(self) -> Floats:
        """[N, size] how much of each window goes into its places: above 0, and 1 in all at each place.

        A window fades in and out by a raised cosine over what it shares with its neighbours: models know least about
        what lies at the border of what they see. Exactly 1 where there is only one window.
        """
        count, at = len(self.starts), np.arange(self.size) + 0.5
        weights = np.ones((count, self.size))
        for index, start in enumerate(self.starts):
            before, after = self.starts[index - 1], self.starts[(index + 1) % count]
            if index > 0 or self.ring:
                weights[index] *= _rise(at, self.size - self._distance(before, start))
            if index < count - 1 or self.ring:
                weights[index] *= _rise(at[::-1], self.size - self._distance(start, after))
        sums = np.zeros(self.length)
        np.add.at(sums, self.places(), weights)
        return (weights / sums[self.places()]).astype(np.float32)

    def scaled(self, factor: int) -> Cover:
        """The same windows where each place is `factor` places."""
        starts = tuple(start * factor for start in self.starts)
        return Cover(self.length * factor, self.size * factor, starts, self.ring)

    def _distance(self, start: int, next_start: int) -> int:
        return (next_start - start) % self.length if self.ring else next_start - start


def cover(length: int, size: int, overlap: int, *, ring: bool = False) -> Cover:
    """The fewest windows of `size` places of which neighbours share at least `overlap`, evenly spread over a length.

    A length that fits into one window has one, as long as it. On a ring there are at least two, at most as long as it,
    so that each border of a window lies inside of another one. Raises ValueError unless 0 <= overlap < size.
    """
    if not 0 <= overlap < size or length < 1:
        raise ValueError(f"length={length}, size={size}, overlap={overlap}: 1 <= length, 0 <= overlap < size")
    if ring and length > 1:
        count = max(2, -(-length // (size - overlap)))
        return Cover(length, min(size, length), tuple(_share(length, index, count) for index in range(count)), ring)
    if length <= size:
        return Cover(length, length, (0,))
    count = -(-(length - overlap) // (size - overlap))
    return Cover(length, size, tuple(_share(length - size, index, count - 1) for index in range(count)))


def worthwhile_cover(length: int, size: int, overlap: int, *, ring: bool = False) -> Cover:
    """As `cover`, but one window for a length below that of a window and an overlap.

    Two windows would nearly double the work for a picture that the UNet still sees well as a whole.
    """
    if length < size + overlap:
        size, overlap = length, 0
    return cover(length, size, overlap, ring=ring)


@dataclass(frozen=True, slots=True)
class Grid:
    """Windows of a picture: each of `rows`, which cover its height, crossed with each of `columns`, which cover its
    width; row by row. Arrays are [..., height, width]."""

    rows: Cover
    columns: Cover

    def __len__(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    @property
    def whole(self) -> bool:
        """Whether there is one window, which is the whole picture as it lies."""
        return len(self) == 1 and not (self.rows.ring or self.columns.ring)

    def split(self, whole: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """[..., size, size] each window's part of a picture."""
        if self.whole:
            yield whole
            return
        for rows, columns in product(self.rows.places(), self.columns.places()):
            yield whole[..., rows[:, None], columns]

    def join(self, parts: Iterable[NDArray[Any]]) -> Floats:
        """[..., height, width] what was computed in the windows, in their order, as one picture."""
        if self.whole:
            [part] = parts
            return part
        return self.sum(self.weighted(parts))

    def weighted(self, parts: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
        """[..., size, size] each window's part by its weights; of `split(gradient)` it is the gradient of `join`."""
        for part, (rows, columns) in zip(parts, product(self.rows.weights(), self.columns.weights()), strict=True):
            yield part * (rows[:, None] * columns)

    def sum(self, parts: Iterable[NDArray[Any]]) -> Floats:
        """[..., height, width] the windows' parts, added where they overlap; the gradient of `split`."""
        whole: Floats | None = None
        for part, (rows, columns) in zip(parts, product(self.rows.places(), self.columns.places()), strict=True):
            if whole is None:
                whole = np.zeros((*part.shape[:-2], self.rows.length, self.columns.length), np.float32)
            # A window holds no place twice, so that adding in place is safe.
            whole[..., rows[:, None], columns] += part
        assert whole is not None
        return whole

    def scaled(self, factor: int) -> Grid:
        """The same windows where each place is `factor` x `factor` places."""
        return Grid(self.rows.scaled(factor), self.columns.scaled(factor))


def _rise(at: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """From 0 to 1 over `width` places."""
    rise: NDArray[np.float64] = np.sin(np.pi / 2 * np.minimum(at / width, 1.0)) ** 2 if width else np.ones_like(at)
    return rise


def _share(length: int, index: int, count: int) -> int:
    """The place nearest to `index / count` of a length."""
    return (2 * index * length + count) // (2 * count)

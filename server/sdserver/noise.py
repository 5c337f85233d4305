"""Noise: every random number of an image follows from its seed and from nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable

Array = NDArray[np.float32]

MAX_SEED = 2**63 - 1
# A pass draws the initial noise and then what its sampler adds; draws of the next one begin here.
DRAWS_A_PASS = 2**32


@dataclass(frozen=True, slots=True)
class ImageNoise:
    """The noise of one image: numbered draws, each of which depends on `seed` and its number alone.

    Philox (Salmon et al. 2011, doi:10.1145/2063384.2063405) is a function of a key and a counter, so that neither the
    company of an image nor the order of the draws can change them. Raises ValueError if `seed` is not 0 to 2^63 - 1.
    """

    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed={self.seed}: 0 to {MAX_SEED}")

    def draw(self, number: int, shape: tuple[int, ...]) -> Array:
        """Draw `number`, from 0: standard normal values of `shape`."""
        # The draw's number is the counter's highest word: 2^192 blocks lie between one draw and the next.
        philox = np.random.Philox(key=self.seed, counter=number << 192)
        return np.random.Generator(philox).standard_normal(shape, dtype=np.float32)

    def initial(self, shape: tuple[int, ...], number: int = 0) -> Array:
        """[C, h, w] the noise that pass `number`, from 0, starts from: the first of its draws."""
        return self.draw(number * DRAWS_A_PASS, shape)

    def steps(self, shape: tuple[int, ...], number: int = 0) -> Callable[[], Array]:
        """The noise that the sampler of pass `number` adds on its way: the draws after the initial one, in order."""
        numbers = count(number * DRAWS_A_PASS + 1)
        return lambda: self.draw(next(numbers), shape)

    def of_image(self, shape: tuple[int, ...]) -> Array:
        """[C, h, w] the noise of the image that an upscaler enlarges: a draw that no sampler reaches."""
        return self.draw(DRAWS_A_PASS // 4, shape)

    def cutout_seeds(self, number: int = 0) -> Callable[[], int]:
        """Integers, 0 to 2^63 - 1, a new one at each call, from draws of pass `number` that its noise never reaches."""
        numbers = count(number * DRAWS_A_PASS + DRAWS_A_PASS // 2)
        return lambda: int(np.random.Philox(key=self.seed, counter=next(numbers) << 192).random_raw()) >> 1


@dataclass(frozen=True, slots=True)
class VariedNoise(ImageNoise):
    """The noise of an image on its way to that of another: each draw moves, so that with `strength` 1 it is the other's
    with every sampler."""

    other: ImageNoise
    strength: float

    def draw(self, number: int, shape: tuple[int, ...]) -> Array:
        """Draw `number` of both, interpolated."""
        return slerp(ImageNoise.draw(self, number, shape), self.other.draw(number, shape), self.strength)


def slerp(a: Array, b: Array, share: float) -> Array:
    """Spherical interpolation (Shoemake 1985): `a` for a share of 0, `b` for 1, exactly.

    Noise has about the same norm everywhere on the way; on the straight line it would be too weak between.
    """
    cosine = float(np.vdot(a, b)) / math.sqrt(float(np.vdot(a, a)) * float(np.vdot(b, b)))
    angle = math.acos(min(max(cosine, -1.0), 1.0))
    # Two that are the same, as far as floats can tell, or opposite, have no one way between them.
    if math.sin(angle) < 1e-6:
        return (1 - share) * a + share * b
    first, second = (math.sin(part * angle) / math.sin(angle) for part in (1 - share, share))
    return first * a + second * b

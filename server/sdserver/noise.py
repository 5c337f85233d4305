"""Noise: every random number of an image follows from its seed and from nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable

Array = NDArray[np.float32]

MAX_SEED = 2**63 - 1


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

    def initial(self, shape: tuple[int, ...]) -> Array:
        """[C, h, w] the noise that the image starts from: draw 0."""
        return self.draw(0, shape)

    def steps(self, shape: tuple[int, ...]) -> Callable[[], Array]:
        """The noise that a sampler adds on its way: the first call gives draw 1, the next one draw 2, and so on."""
        numbers = count(1)
        return lambda: self.draw(next(numbers), shape)

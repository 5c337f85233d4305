"""What a sampler and whoever drives it say to each other.

A sampler is a generator that takes noise to an image, one denoiser evaluation at a time: it yields a `Query`, is sent
the denoised latents x0 for it, and returns the latents at the end of its schedule. It does no I/O and knows of no
model, guidance, clock or progress.

    x       [C, h, w] float32 latents of one image at sigmas[0], x = x0 + sigma * noise (the variance-exploding
            convention of Karras et al. 2022, arXiv:2206.00364); never written to
    sigmas  [steps + 1] noise levels, strictly decreasing; the last is 0, or what the caller wants to be left
    noise   gives fresh standard normal [C, h, w] at each call; who adds no noise leaves it alone
    eta     strength of the noise that a step puts in the place of what it removes, 0 (none) to 1 (all of it)
    churn   noise that is added before the steps and removed by them, 0 (none) or more, spread over all steps

In this convention the probability flow is dx/dsigma = (x - x0) / sigma. Were x0 constant over a step, the step would
end at x0 + (sigma_next / sigma) * (x - x0) exactly; the methods differ in what they take for x0.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Query:
    """Asks for the denoised latents of `x` at noise level `sigma`."""

    step: int
    """The denoising step that this evaluation belongs to, from 1."""
    x: Array
    """[C, h, w] noisy latents."""
    sigma: float
    """Their noise level, above 0."""


Noise = Callable[[], Array]
Sampler = Generator[Query, Array, Array]
# (x, sigmas, noise), and by keyword those of `eta` and `churn` that the sampler has.
SamplerFunction = Callable[..., Sampler]


def slope(x0: Array, last_x0: Array, last_h: float) -> Array:
    """[C, h, w] how x0 changed with log(1 / sigma) over the last step, which was `last_h` long."""
    return (x0 - last_x0) / last_h

"""Samplers: pure generators that take noise to an image, one denoiser evaluation at a time.

A sampler yields a `Query`, is sent the denoised latents x0 for it, and returns the latents at the end of its schedule.
It does no I/O and knows of no model, guidance, clock or progress.

    x       [C, h, w] float32 latents of one image at sigmas[0], x = x0 + sigma * noise (the variance-exploding
            convention of Karras et al. 2022, arXiv:2206.00364); never written to
    sigmas  [steps + 1] noise levels, strictly decreasing; the last is 0, or what the caller wants to be left
    noise   gives fresh standard normal [C, h, w] at each call; the deterministic samplers leave it alone

In this convention the probability flow is dx/dsigma = (x - x0) / sigma. Were x0 constant over a step, the step would
end at x0 + (sigma_next / sigma) * (x - x0) exactly; the methods differ in what they take for x0.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, expm1, log, sqrt

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


Sampler = Generator[Query, Array, Array]
SamplerFunction = Callable[[Array, Sequence[float], Callable[[], Array]], Sampler]


def euler(x: Array, sigmas: Sequence[float], noise: Callable[[], Array]) -> Sampler:
    """Euler: first order. Karras et al. 2022, algorithm 2 without churn."""
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas), 1):
        x0 = yield Query(step, x, sigma)
        x = x0 + (sigma_next / sigma) * (x - x0)
    return x


def euler_ancestral(x: Array, sigmas: Sequence[float], noise: Callable[[], Array]) -> Sampler:
    """Euler ancestral: first order, stochastic. DDPM's sampling, Ho et al. 2020 (arXiv:2006.11239), on any schedule."""
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas), 1):
        x0 = yield Query(step, x, sigma)
        if sigma_next == 0:
            return x0
        x = _ancestral(x, x0, sigma, sigma_next, noise)
    return x


def heun(x: Array, sigmas: Sequence[float], noise: Callable[[], Array]) -> Sampler:
    """Heun: second order, two evaluations a step but for the last. Karras et al. 2022, algorithm 1."""
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas), 1):
        x0 = yield Query(step, x, sigma)
        if sigma_next == 0:
            return x0
        d = (x - x0) / sigma
        x_next = x0 + sigma_next * d
        x0_next = yield Query(step, x_next, sigma_next)
        d_next = (x_next - x0_next) / sigma_next
        x = x + ((sigma_next - sigma) / 2) * (d + d_next)
    return x


def dpmpp_2m(x: Array, sigmas: Sequence[float], noise: Callable[[], Array]) -> Sampler:
    """DPM-Solver++(2M): second order, multistep. Lu et al. 2022 (arXiv:2211.01095), algorithm 2."""
    last: tuple[Array, float] | None = None
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas), 1):
        x0 = yield Query(step, x, sigma)
        if sigma_next == 0:
            return x0
        h = log(sigma / sigma_next)
        middle = x0 if last is None else x0 + (h / 2) * _slope(x0, *last)
        x = middle + (sigma_next / sigma) * (x - middle)
        last = x0, h
    return x


def dpmpp_2m_sde(x: Array, sigmas: Sequence[float], noise: Callable[[], Array]) -> Sampler:
    """SDE-DPM-Solver++(2M): DPM-Solver++(2M) with ancestral noise. Lu et al. 2022 (arXiv:2211.01095)."""
    last: tuple[Array, float] | None = None
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas), 1):
        x0 = yield Query(step, x, sigma)
        if sigma_next == 0:
            return x0
        h = log(sigma / sigma_next)
        middle = x0 if last is None else x0 + (h / 2) * _slope(x0, *last)
        x = _ancestral(x, middle, sigma, sigma_next, noise)
        last = x0, h
    return x


def unipc(x: Array, sigmas: Sequence[float], noise: Callable[[], Array]) -> Sampler:
    """UniPC: second order, B2(h), with a third-order corrector at no cost. Zhao et al. 2023 (arXiv:2302.04867)."""
    last: _UniStep | None = None
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas), 1):
        x0 = yield Query(step, x, sigma)
        if sigma_next == 0:
            return x0
        h = log(sigma / sigma_next)
        if last is None:
            last = _UniStep(x, x0, h)
        else:
            # x0 stays that of the predicted x: asking again for the corrected one would double the cost.
            last = _UniStep(last.corrected(x0), x0, h, last.h, _slope(x0, last.x0, last.h))
        x = last.predicted()
    return x


@dataclass(frozen=True, slots=True)
class _UniStep:
    """One step of UniPC, from `x` and the x0 there, over `h` in log(1 / sigma)."""

    x: Array
    x0: Array
    h: float
    last_h: float = 0.0
    slope: Array | None = None
    """Slope of x0 over the step before, which was `last_h` long; None in the first step."""

    def predicted(self) -> Array:
        """UniP: x at the end of the step. With B2(h) it is DPM-Solver++(2M)."""
        return self._towards(self.x0 if self.slope is None else self.x0 + (self.h / 2) * self.slope)

    def corrected(self, x0_next: Array) -> Array:
        """UniC: x at the end of the step, once the x0 there is known."""
        rise = x0_next - self.x0
        if self.slope is None:
            return self._towards(self.x0 + rise / 2)
        # x0 as the parabola x0 + u * rise + u * (u - 1) * bend through the last three, where u is 0 to 1 over the step.
        # The exact solution weighs it by exp(h * u), under which u and u**2 have these means.
        bend = (rise - self.h * self.slope) / (1 + self.last_h / self.h)
        mean_u = -1 / expm1(-self.h) - 1 / self.h
        mean_u2 = -1 / expm1(-self.h) - 2 * mean_u / self.h
        return self._towards(self.x0 + mean_u * rise + (mean_u2 - mean_u) * bend)

    def _towards(self, x0: Array) -> Array:
        return x0 + exp(-self.h) * (self.x - x0)


def _slope(x0: Array, last_x0: Array, last_h: float) -> Array:
    """[C, h, w] how x0 changed with log(1 / sigma) over the last step."""
    return (x0 - last_x0) / last_h


def _ancestral(x: Array, x0: Array, sigma: float, sigma_next: float, noise: Callable[[], Array]) -> Array:
    """[C, h, w] a draw from the latents at `sigma_next`, given those at `sigma` and x0."""
    # down**2 + up**2 == sigma_next**2
    down = sigma_next**2 / sigma
    up = sqrt(sigma_next**2 - down**2)
    return x0 + ((down / sigma) * (x - x0) + up * noise())


SAMPLERS: dict[str, SamplerFunction] = {
    # Without added noise DDIM is Euler's method in this convention: Song et al. 2020 (arXiv:2010.02502), equation 13.
    "ddim": euler,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": unipc,
}

_TWO_EVALUATIONS_A_STEP = frozenset({heun})


def evaluations(name: str, steps: int) -> int:
    """Evaluations that a sampler makes over `steps` steps down to sigma 0. Raises KeyError for an unknown name."""
    return 2 * steps - 1 if SAMPLERS[name] in _TWO_EVALUATIONS_A_STEP else steps

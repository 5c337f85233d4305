"""Samplers that replace noise: a step takes some out and adds fresh noise, as much as `eta` says.

They end in samples of the same distribution as the deterministic ones. With `eta` 0 none of them asks for noise.
"""

from __future__ import annotations

from itertools import pairwise
from math import expm1, log, sqrt
from typing import TYPE_CHECKING

from sdserver.samplers.query import Query, slope

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdserver.samplers.query import Array, Noise, Sampler


def ddim(x: Array, sigmas: Sequence[float], noise: Noise, *, eta: float = 0.0) -> Sampler:
    """DDIM: first order. Song et al. 2020 (arXiv:2010.02502), equations 12 and 16."""
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas), 1):
        x0 = yield Query(step, x, sigma)
        if sigma_next == 0:
            return x0
        down, up = _ancestral(sigma, sigma_next, eta)
        x = _noised(x0 + (down / sigma) * (x - x0), up, noise)
    return x


def euler_ancestral(x: Array, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0) -> Sampler:
    """Euler ancestral: DDIM with the noise of DDPM, Ho et al. 2020 (arXiv:2006.11239), equations 6 and 7."""
    return (yield from ddim(x, sigmas, noise, eta=eta))


def dpm2_ancestral(x: Array, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0) -> Sampler:
    """DPM2 ancestral: DPM2 down to below the next level, then noise up to it; as in k-diffusion."""
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas), 1):
        x0 = yield Query(step, x, sigma)
        if sigma_next == 0:
            return x0
        down, up = _ancestral(sigma, sigma_next, eta)
        middle = sqrt(sigma * down)
        x_middle = x0 + (middle / sigma) * (x - x0)
        x0_middle = yield Query(step, x_middle, middle)
        x = _noised(x + ((down - sigma) / middle) * (x_middle - x0_middle), up, noise)
    return x


def dpmpp_2s_ancestral(x: Array, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0) -> Sampler:
    """DPM-Solver++(2S), second order, single step, with ancestral noise: Lu et al. 2022 (arXiv:2211.01095), alg. 1."""
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas), 1):
        x0 = yield Query(step, x, sigma)
        if sigma_next == 0:
            return x0
        down, up = _ancestral(sigma, sigma_next, eta)
        middle = sqrt(sigma * down)
        x0_middle = yield Query(step, x0 + (middle / sigma) * (x - x0), middle)
        x = _noised(x0_middle + (down / sigma) * (x - x0_middle), up, noise)
    return x


def dpmpp_sde(x: Array, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0) -> Sampler:
    """DPM-Solver++ SDE: two evaluations a step but for the last, the second one halfway in log(sigma).

    Lu et al. 2022 (arXiv:2211.01095) on a single step, as in k-diffusion. Both evaluations see one Brownian path: the
    noise of the first half is part of that of the whole step.
    """
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas), 1):
        x0 = yield Query(step, x, sigma)
        if sigma_next == 0:
            return x0
        middle = sqrt(sigma * sigma_next)
        # Both halves are equally long in log(sigma), so that they keep and add the same parts.
        keep, up = _diffused(sigma, middle, eta)
        first = _noised(0 * x, up, noise)
        x0_middle = yield Query(step, x0 + (keep * (x - x0) + first), middle)
        second = _noised(keep * first, up * (sigma_next / middle), noise)
        x = x0_middle + (keep**2 * (x - x0_middle) + second)
    return x


def dpmpp_2m_sde(x: Array, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0) -> Sampler:
    """SDE-DPM-Solver++(2M): DPM-Solver++(2M) with fresh noise. Lu et al. 2022 (arXiv:2211.01095)."""
    last: tuple[Array, float] | None = None
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas), 1):
        x0 = yield Query(step, x, sigma)
        if sigma_next == 0:
            return x0
        h = log(sigma / sigma_next)
        middle = x0 if last is None else x0 + (h / 2) * slope(x0, *last)
        keep, up = _diffused(sigma, sigma_next, eta)
        x = _noised(middle + keep * (x - middle), up, noise)
        last = x0, h
    return x


def dpmpp_3m_sde(x: Array, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0) -> Sampler:
    """SDE-DPM-Solver++(3M): third order, multistep, with fresh noise. Lu et al. 2022 (arXiv:2211.01095).

    x0 is taken as the parabola in log(1 / sigma) through its last three values, integrated exactly. The curvature has
    the weight that this asks for, which makes the method third order. In k-diffusion it has half of that, in diffusers
    another sign: second order.
    """
    last: tuple[Array, float] | None = None
    last_slope: tuple[Array, float] | None = None
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas), 1):
        x0 = yield Query(step, x, sigma)
        if sigma_next == 0:
            return x0
        h = log(sigma / sigma_next)
        keep, up = _diffused(sigma, sigma_next, eta)
        # The exact solution weighs x0 by exp((1 + eta) * t) over the step, under which t and t**2 have these means.
        rate = 1 + eta
        mean_t = h / -expm1(-rate * h) - 1 / rate
        mean_t2 = h**2 / -expm1(-rate * h) - 2 * mean_t / rate
        mean = x0
        if last is not None:
            first = slope(x0, *last)
            mean = x0 + mean_t * first
            if last_slope is not None:
                bend = (first - last_slope[0]) / (last[1] + last_slope[1])
                mean = mean + (mean_t2 + mean_t * last[1]) * bend
            last_slope = first, last[1]
        x = _noised(mean + keep * (x - mean), up, noise)
        last = x0, h
    return x


def lcm(x: Array, sigmas: Sequence[float], noise: Noise) -> Sampler:
    """LCM: multistep consistency sampling. Song et al. 2023 (arXiv:2303.01469), algorithm 1; Luo et al. 2023
    (arXiv:2310.04378). Each step takes x0 for the image and covers it with wholly fresh noise.

    For engines that were distilled into a consistency model; from others the images come out soft.
    """
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas), 1):
        x0 = yield Query(step, x, sigma)
        x = _noised(x0, sigma_next, noise)
    return x


def _ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """The level down to which a step removes noise, and how much fresh noise then leads up to `sigma_next`.

    With eta 1 the step draws from the posterior of DDPM; eta is that of DDIM, equation 16.
    """
    up = eta * sigma_next * sqrt(1 - (sigma_next / sigma) ** 2)
    # down**2 + up**2 == sigma_next**2
    return sqrt(sigma_next**2 - up**2), up


def _diffused(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Which part of x - x0 a step keeps, and how much fresh noise it adds: the SDE with eta times the noise variance.

    Two steps by it are one of both lengths. With eta 1 it is `_ancestral`.
    """
    ratio = sigma_next / sigma
    # (keep * sigma)**2 + up**2 == sigma_next**2
    return ratio ** (1 + eta), sigma_next * sqrt(1 - ratio ** (2 * eta))


def _noised(x: Array, up: float, noise: Noise) -> Array:
    """[C, h, w] `x` with fresh noise of level `up`; for 0 none is drawn."""
    return x if up == 0 else x + up * noise()

"""Samplers that follow the probability flow. Without churn the start alone decides where they end."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import exp, expm1, log, sqrt
from typing import TYPE_CHECKING

import numpy as np

from sdserver.samplers.query import Query, slope

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdserver.samplers.query import Array, Noise, Sampler

LMS_ORDER = 4
# Two Gauss points, each of weight 1 on -1 to 1, integrate a polynomial of degree 3 exactly.
_GAUSS_POINTS = np.array([-1, 1]) / sqrt(3)


def euler(x: Array, sigmas: Sequence[float], noise: Noise, *, churn: float = 0.0) -> Sampler:
    """Euler: first order. Karras et al. 2022 (arXiv:2206.00364), algorithm 2 without its second evaluation."""
    for step, (level, sigma_next) in enumerate(pairwise(sigmas), 1):
        x, sigma = _churned(x, level, sigmas, churn, noise)
        x0 = yield Query(step, x, sigma)
        x = x0 + (sigma_next / sigma) * (x - x0)
    return x


def heun(x: Array, sigmas: Sequence[float], noise: Noise, *, churn: float = 0.0) -> Sampler:
    """Heun: second order, two evaluations a step but for the last. Karras et al. 2022, algorithm 2."""
    for step, (level, sigma_next) in enumerate(pairwise(sigmas), 1):
        x, sigma = _churned(x, level, sigmas, churn, noise)
        x0 = yield Query(step, x, sigma)
        if sigma_next == 0:
            return x0
        d = (x - x0) / sigma
        x_next = x0 + sigma_next * d
        x0_next = yield Query(step, x_next, sigma_next)
        d_next = (x_next - x0_next) / sigma_next
        x = x + ((sigma_next - sigma) / 2) * (d + d_next)
    return x


def dpm2(x: Array, sigmas: Sequence[float], noise: Noise, *, churn: float = 0.0) -> Sampler:
    """DPM2: second order, two evaluations a step but for the last; the second one halfway in log(sigma).

    After DPM-Solver-2, Lu et al. 2022 (arXiv:2206.00927), with the midpoint rule in sigma, as in k-diffusion.
    """
    for step, (level, sigma_next) in enumerate(pairwise(sigmas), 1):
        x, sigma = _churned(x, level, sigmas, churn, noise)
        x0 = yield Query(step, x, sigma)
        if sigma_next == 0:
            return x0
        middle = sqrt(sigma * sigma_next)
        x_middle = x0 + (middle / sigma) * (x - x0)
        x0_middle = yield Query(step, x_middle, middle)
        x = x + ((sigma_next - sigma) / middle) * (x_middle - x0_middle)
    return x


def lms(x: Array, sigmas: Sequence[float], noise: Noise) -> Sampler:
    """LMS: linear multistep, fourth order: Adams-Bashforth on uneven steps in sigma, as in k-diffusion."""
    slopes: list[Array] = []
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas), 1):
        x0 = yield Query(step, x, sigma)
        # The newest first, beside the levels that they belong to.
        slopes = [(x - x0) / sigma, *slopes[: LMS_ORDER - 1]]
        levels = list(reversed(sigmas[step - len(slopes) : step]))
        for weight, d in zip(_lms_weights(levels, sigma_next), slopes, strict=True):
            x = x + weight * d
    return x


def dpmpp_2m(x: Array, sigmas: Sequence[float], noise: Noise) -> Sampler:
    """DPM-Solver++(2M): second order, multistep. Lu et al. 2022 (arXiv:2211.01095), algorithm 2."""
    last: tuple[Array, float] | None = None
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas), 1):
        x0 = yield Query(step, x, sigma)
        if sigma_next == 0:
            return x0
        h = log(sigma / sigma_next)
        middle = x0 if last is None else x0 + (h / 2) * slope(x0, *last)
        x = middle + (sigma_next / sigma) * (x - middle)
        last = x0, h
    return x


def unipc(x: Array, sigmas: Sequence[float], noise: Noise) -> Sampler:
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
            last = _UniStep(last.corrected(x0), x0, h, last.h, slope(x0, last.x0, last.h))
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


def _churned(x: Array, sigma: float, sigmas: Sequence[float], churn: float, noise: Noise) -> tuple[Array, float]:
    """`x` with the noise that a step of Karras et al. 2022, algorithm 2, adds first, and its noise level then.

    It never exceeds that of the start: the model has seen no more noise than that.
    """
    gamma = min(churn / (len(sigmas) - 1), sqrt(2) - 1)
    raised = min(sigma * (1 + gamma), sigmas[0])
    if raised == sigma:
        return x, sigma
    return x + sqrt(raised**2 - sigma**2) * noise(), raised


def _lms_weights(levels: Sequence[float], sigma_next: float) -> list[float]:
    """What each slope, known at these noise levels, adds to the latents on the way from levels[0] to `sigma_next`.

    The integral of the polynomial through the slopes, summed up by slope.
    """
    half = (sigma_next - levels[0]) / 2
    at = levels[0] + half * (1 + _GAUSS_POINTS)
    weights = []
    for level in levels:
        basis = np.ones(2)
        for other in levels:
            if other != level:
                basis = basis * (at - other) / (level - other)
        weights.append(half * float(basis.sum()))
    return weights

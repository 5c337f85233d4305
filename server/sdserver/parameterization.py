"""Parameterization: what a UNet is given and what it means by its prediction.

Notation of Karras et al. 2022 (arXiv:2206.00364), equation 7: D = c_skip * x + c_out * F(c_in * x)
for the UNet F and x = x0 + sigma * noise.
"""

from __future__ import annotations

import math
from typing import Literal, assert_never

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
PredictionType = Literal["epsilon", "v_prediction", "sample"]


def c_in(sigma: float) -> float:
    """Factor that takes `x` to the UNet's input: unit variance, if the latents themselves have unit variance."""
    return 1.0 / math.sqrt(sigma**2 + 1.0)


def initial_latents(noise: Array, sigma: float) -> Array:
    """[C, h, w] where text to image starts, from standard normal `noise`.

    The UNet's first input is then `noise` itself. sigma * noise would lack the variance of the latents, which the UNet
    has always seen together with the noise.
    """
    return noise / c_in(sigma)


def denoised(prediction: Array, x: Array, sigma: float, prediction_type: PredictionType) -> Array:
    """[C, h, w] the latents x0 that a UNet's `prediction` for `x` at `sigma` means."""
    c_skip, c_out = denoised_by(sigma, prediction_type)
    return c_skip * x + c_out * prediction


def denoised_by(sigma: float, prediction_type: PredictionType) -> tuple[float, float]:
    """c_skip and c_out: how much of `x` and of a UNet's prediction for it make x0."""
    match prediction_type:
        case "epsilon":
            return 1.0, -sigma
        case "v_prediction":
            # Salimans and Ho 2022 (arXiv:2202.00512): v = sqrt(abar) * noise - sqrt(1 - abar) * x0.
            return 1.0 / (sigma**2 + 1.0), -sigma / math.sqrt(sigma**2 + 1.0)
        case "sample":
            return 0.0, 1.0
    assert_never(prediction_type)

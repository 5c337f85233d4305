"""Parameterization: a UNet's prediction, whatever its type, means the same latents."""

from __future__ import annotations

from math import hypot
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sdserver.parameterization import PredictionType, c_in, denoised, initial_latents

Array = NDArray[np.float32]

sigmas = st.floats(0.01, 100)


def normal(seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((4, 8, 8), dtype=np.float32)


def truth(x0: Array, noise: Array, sigma: float, prediction_type: PredictionType) -> Array:
    """What a perfect model predicts for x0 + sigma * noise, from the definition of its type."""
    root_abar, root_rest = 1 / hypot(sigma, 1), sigma / hypot(sigma, 1)
    match prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            return root_abar * noise - root_rest * x0
        case "sample":
            return x0


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
@given(sigma=sigmas)
def test_a_perfect_prediction_gives_back_the_latents(prediction_type: PredictionType, sigma: float) -> None:
    x0, noise = normal(1), normal(2)
    x = x0 + sigma * noise
    result = denoised(truth(x0, noise, sigma, prediction_type), x, sigma, prediction_type)
    # x holds x0 to a float32 rounding of sigma * noise.
    np.testing.assert_allclose(result, x0, rtol=0, atol=2e-6 * (1 + sigma))


@given(sigma=sigmas)
def test_the_input_has_unit_variance_where_the_latents_have(sigma: float) -> None:
    assert c_in(sigma) * hypot(1, sigma) == pytest.approx(1)


@given(sigma=sigmas)
def test_text_to_image_shows_the_model_the_noise_itself(sigma: float) -> None:
    noise = normal(3)
    np.testing.assert_allclose(c_in(sigma) * initial_latents(noise, sigma), noise, rtol=1e-6)


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_float32_stays_float32(prediction_type: PredictionType) -> None:
    x = initial_latents(normal(4), 4096.0)
    assert x.dtype == np.float32
    assert denoised(normal(5), x, 4096.0, prediction_type).dtype == np.float32

"""Guidance rescale: how far the contrast of guided predictions is drawn back to that of the conditional ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sdserver.guidance import Guidance, blend, rescale_factor
from sdserver.request import BLENDINGS, Blending, GuidanceInterval

Array = NDArray[np.float32]

ALL = GuidanceInterval(0.0, 1.0)


def normal(seed: int, spread: float = 1.0) -> Array:
    return np.float32(spread) * np.random.default_rng(seed).standard_normal((4, 8, 8), dtype=np.float32)


def states(value: float) -> Array:
    return np.full((77, 8), value, np.float32)


@given(share=st.floats(0, 1), spread=st.floats(0.1, 30))
def test_the_spread_moves_by_the_share_to_that_of_the_conditional_prediction(share: float, spread: float) -> None:
    guided, conditional = normal(1, spread), normal(2)
    result = guided * rescale_factor(guided, conditional, share)
    expected = (1 - share) * guided.std() + share * conditional.std()
    assert result.std() == pytest.approx(expected, rel=1e-4)
    # Nothing but the scale changes.
    assert np.corrcoef(result.ravel(), guided.ravel())[0, 1] == pytest.approx(1)


def test_without_rescale_the_prediction_is_the_same() -> None:
    guided = normal(1, 7.0)
    assert rescale_factor(guided, normal(2), 0.0) == 1


def test_a_prediction_without_contrast_has_none_to_take_back() -> None:
    flat = np.full((4, 8, 8), 0.5, np.float32)
    assert rescale_factor(flat, normal(2), 1.0) == 1


def guidance(blending: Blending, scale: float, *weights: float) -> Guidance:
    prompt_states = [states(index + 1) for index in range(len(weights))]
    return blend(prompt_states, weights, states(0), blending, scale, ALL)


@pytest.mark.parametrize("weights", [(1.0,), (2.0, -0.5), (0.75, 0.25, -1.0)])
@pytest.mark.parametrize("blending", BLENDINGS)
def test_the_conditional_prediction_is_the_guided_one_at_scale_1(
    blending: Blending, weights: tuple[float, ...]
) -> None:
    at_one, at_seven = (guidance(blending, scale, *weights) for scale in (1.0, 7.0))
    assert at_seven.conditional == at_one.conditional == at_one.coefficients(1, 4)
    assert sum(at_seven.conditional) == pytest.approx(1)
    assert at_seven.conditional != at_seven.coefficients(1, 4)


def test_the_conditional_prediction_of_composed_prompts_is_their_sum() -> None:
    assert guidance("composable", 7.0, 0.75, 0.5, -0.25).conditional == (0.0, 0.75, 0.5, -0.25)
    assert guidance("text_encoder", 7.0, 0.75, 0.5, -0.25).conditional == (0.0, 1.0)

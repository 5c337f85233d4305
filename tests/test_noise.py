"""Noise: an image's random numbers follow from its seed and from nothing else."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sdserver.noise import MAX_SEED, ImageNoise

SHAPE = (4, 16, 16)

seeds = st.integers(0, MAX_SEED)


@settings(deadline=None)
@given(seed=seeds, others=st.lists(st.integers(0, 50), max_size=5), number=st.integers(0, 50))
def test_a_draw_depends_on_seed_and_number_alone(seed: int, others: list[int], number: int) -> None:
    noise = ImageNoise(seed)
    for other in others:
        noise.draw(other, (3,))
    np.testing.assert_array_equal(noise.draw(number, SHAPE), ImageNoise(seed).draw(number, SHAPE))


@settings(deadline=None)
@given(seed=seeds)
def test_the_start_is_draw_0_and_the_steps_are_the_draws_after_it(seed: int) -> None:
    noise = ImageNoise(seed)
    step = noise.steps(SHAPE)
    np.testing.assert_array_equal(noise.initial(SHAPE), noise.draw(0, SHAPE))
    for number in (1, 2, 3):
        np.testing.assert_array_equal(step(), noise.draw(number, SHAPE))


def test_draws_are_standard_normal() -> None:
    values = ImageNoise(0).initial((4, 256, 256)).astype(np.float64)
    moments = [values.mean(), (values**2).mean(), (values**3).mean(), (values**4).mean()]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.05)


def test_neighbouring_seeds_and_draws_are_independent() -> None:
    shape = (4, 64, 64)
    draws = [ImageNoise(seed).draw(number, shape).ravel() for seed in (0, 1, 2, MAX_SEED) for number in (0, 1, 2)]
    for one, other in combinations(draws, 2):
        # 5 standard errors of the correlation of 16,384 pairs.
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / 128


def test_noise_is_float32() -> None:
    noise = ImageNoise(0)
    assert noise.initial(SHAPE).dtype == noise.steps(SHAPE)().dtype == np.float32


def test_the_numbers_of_a_seed_never_change() -> None:
    # numpy keeps Philox's bits for ever, but not what it makes of them. If this fails, every image has changed.
    first = [0.059911035001277924, 0.015559634193778038, -1.1644384860992432, -0.13264712691307068]
    assert ImageNoise(0).initial((4,)).tolist() == first
    last = [-0.66801518201828, 1.2283048629760742, -1.5255484580993652, -0.5196007490158081]
    assert ImageNoise(MAX_SEED).draw(1, (4,)).tolist() == last


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_seeds_outside_the_contract_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed={seed}: 0 to {MAX_SEED}"):
        ImageNoise(seed)

"""Noise: an image's random numbers follow from its seed and from nothing else."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sdserver.noise import MAX_SEED, ImageNoise, VariedNoise, slerp

SHAPE = (4, 16, 16)

seeds = st.integers(0, MAX_SEED)


@given(seed=seeds, others=st.lists(st.integers(0, 50), max_size=5), number=st.integers(0, 50))
def test_a_draw_depends_on_seed_and_number_alone(seed: int, others: list[int], number: int) -> None:
    noise = ImageNoise(seed)
    for other in others:
        noise.draw(other, (3,))
    np.testing.assert_array_equal(noise.draw(number, SHAPE), ImageNoise(seed).draw(number, SHAPE))


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


def test_the_passes_of_an_image_draw_different_noise() -> None:
    noise = ImageNoise(5)
    drawn = [noise.initial(SHAPE, number) for number in (0, 1)]
    for number in (0, 1):
        step = noise.steps(SHAPE, number)
        drawn += [step(), step()]
    for one, other in combinations(drawn, 2):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.15


def test_a_variation_of_strength_0_is_the_image_and_of_strength_1_the_other_in_every_draw() -> None:
    one, other = ImageNoise(3), ImageNoise(4)
    for strength, same in ((0.0, one), (1.0, other)):
        varied = VariedNoise(3, other, strength)
        for number in (0, 1):
            assert varied.initial(SHAPE, number).tobytes() == same.initial(SHAPE, number).tobytes()
            assert varied.steps(SHAPE, number)().tobytes() == same.steps(SHAPE, number)().tobytes()


def test_a_variation_moves_steadily_and_stays_noise() -> None:
    one, other = ImageNoise(3).initial(SHAPE), ImageNoise(4).initial(SHAPE)
    shares = np.linspace(0, 1, 11)
    way = [slerp(one, other, float(share)) for share in shares]
    distances = [float(np.linalg.norm(step - one)) for step in way]
    assert all(np.diff(distances) > 0)
    assert [step.dtype for step in way] == [np.float32] * 11
    assert [float(step.std()) for step in way] == pytest.approx([1] * 11, abs=0.05)


def test_noise_on_the_way_to_itself_stays_where_it_is() -> None:
    noise = ImageNoise(3).initial(SHAPE)
    np.testing.assert_allclose(slerp(noise, noise, 0.3), noise, rtol=1e-6)

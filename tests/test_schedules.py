"""Noise schedules: what every one of them keeps to. That they are those of diffusers is tested beside the samplers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sdserver.schedules import NoiseSchedule

if TYPE_CHECKING:
    from sdserver.schedules import TimestepSpacing

STABLE_DIFFUSION = NoiseSchedule(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    train_timesteps=1000,
    timestep_spacing="leading",
    steps_offset=1,
)
SCHEDULES = [
    STABLE_DIFFUSION,
    replace(STABLE_DIFFUSION, timestep_spacing="trailing"),
    replace(STABLE_DIFFUSION, timestep_spacing="linspace"),
    replace(STABLE_DIFFUSION, timestep_spacing="trailing", rescale_zero_terminal_snr=True),
    replace(STABLE_DIFFUSION, beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    replace(STABLE_DIFFUSION, beta_schedule="squaredcos_cap_v2"),
    replace(STABLE_DIFFUSION, train_timesteps=7, steps_offset=0),
]

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


@each_schedule
def test_the_noise_of_training_grows_with_the_timestep(schedule: NoiseSchedule) -> None:
    assert schedule.sigmas.shape == (schedule.train_timesteps,)
    assert schedule.sigmas.dtype == np.float64
    assert np.isfinite(schedule.sigmas).all()
    assert schedule.sigmas[0] > 0
    assert (np.diff(schedule.sigmas) > 0).all()


def test_stable_diffusion_was_trained_from_sigma_0_03_to_14_6() -> None:
    assert STABLE_DIFFUSION.sigmas[[0, -1]].tolist() == pytest.approx([0.0292, 14.6146], abs=1e-4)


def test_zero_terminal_snr_makes_only_the_last_level_pure_noise() -> None:
    plain, rescaled = STABLE_DIFFUSION.sigmas, replace(STABLE_DIFFUSION, rescale_zero_terminal_snr=True).sigmas
    assert rescaled[0] == pytest.approx(plain[0], rel=1e-12)
    assert rescaled[-1] == pytest.approx(4096, rel=1e-6)
    # Lin et al. 2023, algorithm 1: the roots of abar move by a shift and a scale.
    roots, moved = 1 / np.sqrt(1 + plain**2), 1 / np.sqrt(1 + rescaled**2)
    np.testing.assert_allclose(moved[:-1], (roots[:-1] - roots[-1]) * roots[0] / (roots[0] - roots[-1]), rtol=1e-9)


@each_schedule
def test_levels_of_training_have_their_own_timestep_exactly(schedule: NoiseSchedule) -> None:
    timesteps = range(schedule.train_timesteps)
    assert [schedule.timestep(sigma) for sigma in schedule.sigmas.tolist()] == list(timesteps)
    assert [schedule.sigma_at(timestep) for timestep in timesteps] == schedule.sigmas.tolist()


@given(timestep=st.floats(0, 999), zero_terminal_snr=st.booleans())
def test_timestep_and_level_are_inverse(timestep: float, zero_terminal_snr: bool) -> None:
    schedule = replace(STABLE_DIFFUSION, rescale_zero_terminal_snr=zero_terminal_snr)
    assert schedule.timestep(schedule.sigma_at(timestep)) == pytest.approx(timestep, abs=1e-9)


def test_between_two_levels_the_timestep_is_linear_in_log_sigma() -> None:
    low, high = STABLE_DIFFUSION.sigmas[500:502].tolist()
    assert STABLE_DIFFUSION.timestep((low * high) ** 0.5) == pytest.approx(500.5, abs=1e-9)


@each_schedule
def test_levels_outside_training_have_the_nearest_timestep(schedule: NoiseSchedule) -> None:
    last = schedule.train_timesteps - 1
    assert schedule.timestep(schedule.sigmas[0] / 2) == 0
    assert schedule.timestep(schedule.sigmas[-1] * 2) == last
    assert schedule.sigma_at(-1) == schedule.sigmas[0]
    assert schedule.sigma_at(last + 1) == schedule.sigmas[-1]


@each_schedule
@pytest.mark.parametrize("name", ["native", "karras", "exponential"])
def test_a_generation_goes_down_to_zero_within_the_levels_of_training(schedule: NoiseSchedule, name: str) -> None:
    for steps in {1, 2, 3, 7, 20, 61, 150} & set(range(schedule.train_timesteps + 1)):
        sigmas = getattr(schedule, name)(steps)
        assert len(sigmas) == steps + 1
        assert sigmas[-1] == 0
        assert all(sigma > sigma_next for sigma, sigma_next in pairwise(sigmas))
        assert sigmas[0] <= schedule.sigmas[-1] * (1 + 1e-12)
        assert sigmas[-2] >= schedule.sigmas[0] * (1 - 1e-12)
        assert {type(sigma) for sigma in sigmas} == {float}


@pytest.mark.parametrize(
    ("spacing", "timesteps"),
    [
        ("leading", [801, 601, 401, 201, 1]),
        ("trailing", [999, 799, 599, 399, 199]),
        ("linspace", [999, 749, 500, 250, 0]),
    ],
)
def test_native_levels_lie_at_evenly_spaced_timesteps(spacing: TimestepSpacing, timesteps: list[int]) -> None:
    schedule = replace(STABLE_DIFFUSION, timestep_spacing=spacing)
    assert [schedule.timestep(sigma) for sigma in schedule.native(5)[:-1]] == timesteps


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_native_levels_never_repeat_however_many_the_steps(spacing: TimestepSpacing) -> None:
    schedule = replace(STABLE_DIFFUSION, timestep_spacing=spacing, steps_offset=0)
    for steps in range(1, 1001):
        assert (np.diff(schedule.native(steps)) < 0).all()


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_a_single_step_starts_at_the_noisiest_level(spacing: TimestepSpacing) -> None:
    schedule = replace(STABLE_DIFFUSION, timestep_spacing=spacing)
    assert schedule.native(1) == (schedule.sigmas[-1], 0.0)
    assert schedule.karras(1) == pytest.approx((schedule.sigmas[-1], 0.0))
    assert schedule.exponential(1) == pytest.approx((schedule.sigmas[-1], 0.0))


@given(steps=st.integers(2, 200), rho=st.floats(1, 10))
def test_karras_levels_are_even_in_the_root_of_sigma(steps: int, rho: float) -> None:
    sigmas = np.array(STABLE_DIFFUSION.karras(steps, rho)[:-1])
    roots = sigmas ** (1 / rho)
    np.testing.assert_allclose(roots, np.linspace(roots[0], roots[-1], steps), rtol=1e-9)
    np.testing.assert_allclose(sigmas[[0, -1]], STABLE_DIFFUSION.sigmas[[-1, 0]], rtol=1e-9)


@given(steps=st.integers(2, 200))
def test_exponential_levels_are_even_in_the_logarithm_of_sigma(steps: int) -> None:
    sigmas = np.array(STABLE_DIFFUSION.exponential(steps)[:-1])
    logs = np.log(sigmas)
    np.testing.assert_allclose(logs, np.linspace(logs[0], logs[-1], steps), rtol=0, atol=1e-9)
    np.testing.assert_allclose(sigmas[[0, -1]], STABLE_DIFFUSION.sigmas[[-1, 0]], rtol=1e-9)


@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_steps_that_native_cannot_space_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps={steps}: 1 to 1000"):
        STABLE_DIFFUSION.native(steps)


def test_an_offset_past_the_last_timestep_is_refused() -> None:
    with pytest.raises(ValueError, match=r"steps=1000: .*steps_offset=1"):
        STABLE_DIFFUSION.native(1000)


@pytest.mark.parametrize("steps", [-1, 0])
def test_levels_between_timesteps_need_a_step(steps: int) -> None:
    for levels in (STABLE_DIFFUSION.karras, STABLE_DIFFUSION.exponential):
        with pytest.raises(ValueError, match=f"steps={steps}: at least 1"):
            levels(steps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_start": 0.0}, "beta_start=0.0"),
        ({"beta_end": 1.0}, "beta_end=1.0"),
        ({"beta_start": 0.02}, "beta_start=0.02"),
        ({"beta_end": float("nan")}, "beta_end=nan"),
        ({"train_timesteps": 1}, "train_timesteps=1"),
        ({"steps_offset": -1}, "steps_offset=-1"),
    ],
)
def test_a_schedule_without_growing_noise_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(STABLE_DIFFUSION, **change)


def test_the_levels_of_training_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        STABLE_DIFFUSION.sigmas[0] = 1.0

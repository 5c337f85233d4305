"""Samplers on data whose ideal denoiser is a formula, so that the exact answer is known."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import hypot, log2, sqrt
from typing import TYPE_CHECKING

import numpy as np
import pytest
from denoising import drive
from numpy.typing import NDArray
from sdserver.noise import ImageNoise
from sdserver.samplers import SAMPLERS, evaluations, noise_options
from test_schedules import STABLE_DIFFUSION

if TYPE_CHECKING:
    from sdserver.samplers import Query

Array = NDArray[np.float32]

# Of the method without noise, in which any sampler that has eta ends with eta 0.
ORDERS = {
    **{"ddim": 1, "euler": 1, "euler_ancestral": 1, "ddpm": 1},
    **{"heun": 2, "dpm2": 2, "dpm2_ancestral": 2},
    **{"dpmpp_2m": 2, "dpmpp_2m_sde": 2, "dpmpp_2s_ancestral": 2, "dpmpp_sde": 2},
    **{"unipc": 3, "dpmpp_3m_sde": 3, "lms": 4},
}
WITHOUT_NOISE = {name: {"eta": 0.0} if "eta" in noise_options(name) else {} for name in ORDERS}
WITH_NOISE = [
    *((name, {"eta": eta}) for name in SAMPLERS if "eta" in noise_options(name) for eta in (0.5, 1.0)),
    *((name, {"churn": 5.0}) for name in SAMPLERS if "churn" in noise_options(name)),
]

# Gaussian data.
MEAN = 0.4
SPREAD = 0.8
SIGMAS = (14.6, 9.2, 5.0, 2.1, 1.3, 0.7, 0.2, 0.05, 0.0)

each_sampler = pytest.mark.parametrize("name", SAMPLERS)
each_without_noise = pytest.mark.parametrize(("name", "options"), WITHOUT_NOISE.items())
each_with_noise = pytest.mark.parametrize(("name", "options"), WITH_NOISE)


def ideal(query: Query) -> Array:
    """x0 as expected from x by whoever knows the data."""
    return MEAN + (SPREAD**2 / (SPREAD**2 + query.sigma**2)) * (query.x - MEAN)


def point(query: Query) -> Array:
    """x0 when all data are the same point."""
    return np.full_like(query.x, MEAN)


def silence() -> Array:
    raise AssertionError("a deterministic sampler asked for noise")


def latents_at(sigma: float, shape: tuple[int, ...] = (4, 6, 8)) -> Array:
    return np.float32(MEAN) + ImageNoise(7).initial(shape) * np.float32(hypot(SPREAD, sigma))


def error(name: str, sigmas: list[float], x: Array) -> float:
    """Greatest distance from the exact solution, which keeps its place in the spread of the noisy data."""
    exact = MEAN + (x - MEAN) * (hypot(SPREAD, sigmas[-1]) / hypot(SPREAD, sigmas[0]))
    _, end = drive(SAMPLERS[name](x, sigmas, silence, **WITHOUT_NOISE[name]), ideal)
    return float(np.abs(end - exact).max())


def test_only_lcm_makes_noise_that_cannot_be_turned_off() -> None:
    assert SAMPLERS.keys() - ORDERS.keys() == {"lcm"}


@pytest.mark.parametrize("name", ORDERS)
def test_halving_the_step_divides_the_error_by_two_to_the_order(name: str) -> None:
    # Multistep methods start at a lower order: from far out, where x0 hardly changes and that costs nothing. float64,
    # because the errors of order 4 drown in the rounding of float32.
    coarse, fine = (
        error(name, np.geomspace(100, 0.2, steps + 1).tolist(), latents_at(100).astype(np.float64))
        for steps in (128, 256)
    )
    assert log2(coarse / fine) == pytest.approx(ORDERS[name], abs=0.15)


@pytest.mark.parametrize("name", ORDERS)
def test_small_steps_arrive_at_the_exact_latents(name: str) -> None:
    sigmas = [*np.geomspace(14.6, 0.02, 200).tolist(), 0.0]
    # About the error of the last step, sigma**2 / 2, and of first-order steps of 1 part in 30.
    assert error(name, sigmas, latents_at(sigmas[0])) < (1e-3 if ORDERS[name] > 1 else 0.03)


@pytest.mark.parametrize("steps", [25, 100])
@pytest.mark.parametrize("name", ORDERS)
def test_starting_from_pure_noise_costs_no_accuracy(name: str, steps: int) -> None:
    # With zero terminal SNR the first level stands for infinity, and the first step is one of four thousand levels.
    usual = replace(STABLE_DIFFUSION, timestep_spacing="trailing")
    from_pure_noise = replace(usual, rescale_zero_terminal_snr=True)
    expected, found = (
        error(name, list(sigmas), latents_at(sigmas[0]))
        for sigmas in (usual.native(steps), from_pure_noise.native(steps))
    )
    assert found < 1.1 * expected + 2e-3


@each_with_noise
def test_samples_have_the_mean_and_the_spread_of_the_data(name: str, options: dict[str, float]) -> None:
    sigmas = [*np.geomspace(14.6, 0.02, 400).tolist(), 0.0]
    shape = (4, 128, 128)
    sampler = SAMPLERS[name](latents_at(sigmas[0], shape), sigmas, ImageNoise(8).steps(shape), **options)
    _, samples = drive(sampler, ideal)
    assert samples.mean() == pytest.approx(MEAN, abs=0.01)
    assert samples.std() == pytest.approx(SPREAD, abs=0.01)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_lcm_samples_a_consistency_model_in_any_number_of_steps(steps: int) -> None:
    def consistent(query: Query) -> Array:
        """Where the probability flow through x ends."""
        return MEAN + (SPREAD / hypot(SPREAD, query.sigma)) * (query.x - MEAN)

    sigmas = [*np.geomspace(14.6, 0.5, steps).tolist(), 0.0]
    shape = (4, 128, 128)
    _, samples = drive(SAMPLERS["lcm"](latents_at(14.6, shape), sigmas, ImageNoise(8).steps(shape)), consistent)
    assert samples.mean() == pytest.approx(MEAN, abs=0.02)
    assert samples.std() == pytest.approx(SPREAD, abs=0.01)


@pytest.mark.parametrize(("name", "options"), [*WITH_NOISE, ("lcm", {})])
def test_fresh_noise_brings_the_latents_to_the_level_of_each_evaluation(name: str, options: dict[str, float]) -> None:
    shape = (4, 128, 128)
    sampler = SAMPLERS[name](latents_at(SIGMAS[0], shape), SIGMAS, ImageNoise(8).steps(shape), **options)
    queries, _ = drive(sampler, point)
    after_the_start = [query for query in queries if query.sigma < SIGMAS[0]]
    assert len(after_the_start) == len(queries) - 1
    for query in after_the_start:
        assert (query.x - MEAN).std() == pytest.approx(query.sigma, rel=0.01)


@pytest.mark.parametrize(("name", "options"), [*WITH_NOISE, ("lcm", {})])
def test_every_step_but_one_takes_fresh_noise(name: str, options: dict[str, float]) -> None:
    # With eta the last step ends without noise; with churn the first one starts with all that there is.
    noise = ImageNoise(8).steps((4, 6, 8))
    drawn: list[Array] = []

    def recorded() -> Array:
        drawn.append(noise())
        return drawn[-1]

    drive(SAMPLERS[name](latents_at(SIGMAS[0]), SIGMAS, recorded, **options), ideal)
    assert len(drawn) == (len(SIGMAS) - 2) * (2 if name == "dpmpp_sde" else 1)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if "eta" in noise_options(name)])
def test_the_larger_eta_the_less_is_left_of_the_start(name: str) -> None:
    shape = (4, 64, 64)
    start = latents_at(SIGMAS[0], shape)
    left = []
    for eta in (0.0, 0.3, 0.7, 1.0):
        queries, _ = drive(SAMPLERS[name](start, SIGMAS[:4], ImageNoise(8).steps(shape), eta=eta), point)
        left.append(float(np.corrcoef(start.ravel(), queries[-1].x.ravel())[0, 1]))
    assert left[0] == pytest.approx(1)
    assert all(more > less + 0.01 for more, less in pairwise(left))


@pytest.mark.parametrize("name", [name for name in SAMPLERS if "churn" in noise_options(name)])
@pytest.mark.parametrize("churn", [1.0, 100.0])
def test_churn_raises_each_level_by_its_share_but_never_above_the_first(name: str, churn: float) -> None:
    queries, _ = drive(SAMPLERS[name](latents_at(14.6), SIGMAS, ImageNoise(8).steps((4, 6, 8)), churn=churn), ideal)
    first = {query.step: query.sigma for query in reversed(queries)}
    factor = 1 + min(churn / 8, sqrt(2) - 1)
    assert list(first.values()) == pytest.approx([min(sigma * factor, SIGMAS[0]) for sigma in SIGMAS[-2::-1]])


@pytest.mark.parametrize(
    ("stochastic", "deterministic"),
    [
        ("ddim", "euler"),
        ("euler_ancestral", "euler"),
        ("ddpm", "euler"),
        ("dpm2_ancestral", "dpm2"),
        ("dpmpp_2m_sde", "dpmpp_2m"),
    ],
)
def test_without_eta_a_sampler_is_its_deterministic_form(stochastic: str, deterministic: str) -> None:
    x = latents_at(SIGMAS[0])
    _, one = drive(SAMPLERS[stochastic](x, SIGMAS, silence, eta=0.0), ideal)
    _, other = drive(SAMPLERS[deterministic](x, SIGMAS, silence), ideal)
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_lms_on_even_levels_is_adams_bashforth() -> None:
    def one_slope_a_step(query: Query) -> Array:
        slope = np.zeros_like(query.x)
        slope[(query.step - 1) % 4] = 1
        return query.x - query.sigma * slope

    queries, _ = drive(SAMPLERS["lms"](latents_at(9.0), range(9, 0, -1), silence), one_slope_a_step)
    for before, after in pairwise(queries[3:]):
        weights = np.roll([55 / 24, -59 / 24, 37 / 24, -9 / 24][::-1], before.step % 4)
        np.testing.assert_allclose((before.x - after.x)[:, 0, 0], weights, rtol=1e-4, atol=1e-5)


def test_both_evaluations_of_dpmpp_sde_see_one_path_of_noise() -> None:
    noise = ImageNoise(8).steps((4, 6, 8))
    drawn: list[Array] = []

    def recorded() -> Array:
        drawn.append(noise())
        return drawn[-1]

    queries, _ = drive(SAMPLERS["dpmpp_sde"](latents_at(SIGMAS[0]), SIGMAS, recorded), point)
    for middle, after, fresh in zip(queries[1::2], queries[2::2], drawn[1::2], strict=True):
        # From halfway on it is a step of DDPM: where x0 does not change, two halves are one whole.
        ratio = after.sigma / middle.sigma
        expected = MEAN + ratio**2 * (middle.x - MEAN) + after.sigma * sqrt(1 - ratio**2) * fresh
        np.testing.assert_allclose(after.x, expected, rtol=1e-4, atol=1e-5)


@each_without_noise
def test_a_point_is_approached_on_a_straight_line(name: str, options: dict[str, float]) -> None:
    x = latents_at(SIGMAS[0])
    queries, end = drive(SAMPLERS[name](x, SIGMAS, silence, **options), point)
    for query in queries:
        np.testing.assert_allclose(query.x, MEAN + (x - MEAN) * (query.sigma / SIGMAS[0]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(end, np.float32(MEAN), rtol=0, atol=2e-6)


# LMS goes on to sigma 0 along its polynomial.
@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - {"lms"}))
def test_the_last_denoised_latents_are_the_result(name: str) -> None:
    for sigmas in (SIGMAS, SIGMAS[-2:]):
        answers: list[Array] = []

        def denoise(query: Query, answers: list[Array] = answers) -> Array:
            answers.append(ideal(query))
            return answers[-1]

        _, end = drive(SAMPLERS[name](latents_at(sigmas[0]), sigmas, ImageNoise(8).steps((4, 6, 8))), denoise)
        np.testing.assert_array_equal(end, answers[-1])


@each_sampler
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_queries_visit_every_step_in_order_at_its_level(name: str, steps: int) -> None:
    sigmas = [*np.geomspace(14.6, 0.03, steps).tolist(), 0.0]
    queries, _ = drive(SAMPLERS[name](latents_at(sigmas[0]), sigmas, ImageNoise(8).steps((4, 6, 8))), ideal)
    visited = [query.step for query in queries]
    assert visited == sorted(visited)
    assert {query.step: query.sigma for query in reversed(queries)} == dict(enumerate(sigmas[:-1], 1))
    # The last step needs one evaluation, all others the same number.
    counts = [visited.count(step) for step in range(1, steps + 1)]
    assert counts[-1] == 1
    assert len(set(counts[:-1])) <= 1


@each_sampler
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_as_many_evaluations_are_made_as_announced(name: str, steps: int) -> None:
    sigmas = [*np.geomspace(14.6, 0.03, steps).tolist(), 0.0]
    queries, _ = drive(SAMPLERS[name](latents_at(sigmas[0]), sigmas, ImageNoise(8).steps((4, 6, 8))), ideal)
    assert len(queries) == evaluations(name, steps)


@each_sampler
def test_latents_are_never_written_to(name: str) -> None:
    def read_only(array: Array) -> Array:
        array.flags.writeable = False
        return array

    noise = ImageNoise(8).steps((4, 6, 8))
    seen: list[Array] = []

    def denoise(query: Query) -> Array:
        seen.append(query.x.copy())
        return read_only(ideal(query))

    sampler = SAMPLERS[name](read_only(latents_at(SIGMAS[0])), SIGMAS, lambda: read_only(noise()))
    queries, _ = drive(sampler, denoise)
    for query, x in zip(queries, seen, strict=True):
        np.testing.assert_array_equal(query.x, x)


@each_sampler
def test_float32_stays_float32(name: str) -> None:
    queries, end = drive(SAMPLERS[name](latents_at(SIGMAS[0]), SIGMAS, ImageNoise(8).steps((4, 6, 8))), ideal)
    assert {array.dtype for array in [end, *(query.x for query in queries)]} == {np.dtype(np.float32)}


@each_sampler
def test_the_same_noise_gives_the_same_bytes(name: str) -> None:
    x = latents_at(SIGMAS[0])
    first, second = (drive(SAMPLERS[name](x, SIGMAS, ImageNoise(8).steps(x.shape)), ideal)[1] for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_an_unknown_sampler_has_neither_evaluations_nor_options() -> None:
    with pytest.raises(KeyError):
        evaluations("nonesuch", 20)
    with pytest.raises(KeyError):
        noise_options("nonesuch")

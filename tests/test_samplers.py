"""Samplers on data whose ideal denoiser is a formula, so that the exact answer is known."""

from __future__ import annotations

from math import hypot, log2
from typing import TYPE_CHECKING

import numpy as np
import pytest
from denoising import drive
from numpy.typing import NDArray
from sdserver.noise import ImageNoise
from sdserver.samplers import SAMPLERS, evaluations

if TYPE_CHECKING:
    from sdserver.samplers import Query

Array = NDArray[np.float32]

ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2, "unipc": 3}
STOCHASTIC = ["euler_ancestral", "dpmpp_2m_sde"]

# Gaussian data.
MEAN = 0.4
SPREAD = 0.8
SIGMAS = (14.6, 9.2, 5.0, 2.1, 1.3, 0.7, 0.2, 0.05, 0.0)

each_sampler = pytest.mark.parametrize("name", SAMPLERS)
each_deterministic = pytest.mark.parametrize("name", ORDERS)
each_stochastic = pytest.mark.parametrize("name", STOCHASTIC)


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


def error(name: str, sigmas: list[float]) -> float:
    """Greatest distance from the exact solution, which keeps its place in the spread of the noisy data."""
    x = latents_at(sigmas[0])
    exact = MEAN + (x - MEAN) * (hypot(SPREAD, sigmas[-1]) / hypot(SPREAD, sigmas[0]))
    _, end = drive(SAMPLERS[name](x, sigmas, silence), ideal)
    return float(np.abs(end - exact).max())


def test_every_sampler_is_deterministic_or_stochastic() -> None:
    assert sorted(SAMPLERS) == sorted([*ORDERS, *STOCHASTIC])


@each_deterministic
def test_halving_the_step_divides_the_error_by_two_to_the_order(name: str) -> None:
    coarse, fine = (error(name, np.geomspace(10, 0.1, steps + 1).tolist()) for steps in (32, 64))
    assert log2(coarse / fine) == pytest.approx(ORDERS[name], abs=0.1)


@each_deterministic
def test_small_steps_arrive_at_the_exact_latents(name: str) -> None:
    sigmas = [*np.geomspace(14.6, 0.02, 200).tolist(), 0.0]
    # About the error of the last step, sigma**2 / 2, and of first-order steps of 1 part in 30.
    assert error(name, sigmas) < (1e-3 if ORDERS[name] > 1 else 0.03)


@each_stochastic
def test_samples_have_the_mean_and_the_spread_of_the_data(name: str) -> None:
    sigmas = [*np.geomspace(14.6, 0.02, 400).tolist(), 0.0]
    shape = (4, 128, 128)
    _, samples = drive(SAMPLERS[name](latents_at(sigmas[0], shape), sigmas, ImageNoise(8).steps(shape)), ideal)
    assert samples.mean() == pytest.approx(MEAN, abs=0.01)
    assert samples.std() == pytest.approx(SPREAD, abs=0.01)


@each_stochastic
def test_fresh_noise_brings_the_latents_to_the_level_of_each_step(name: str) -> None:
    shape = (4, 128, 128)
    queries, _ = drive(SAMPLERS[name](latents_at(SIGMAS[0], shape), SIGMAS, ImageNoise(8).steps(shape)), point)
    for query in queries[1:]:
        assert (query.x - MEAN).std() == pytest.approx(query.sigma, rel=0.01)


@each_stochastic
def test_every_step_but_the_last_takes_fresh_noise(name: str) -> None:
    noise = ImageNoise(8).steps((4, 6, 8))
    drawn: list[Array] = []

    def recorded() -> Array:
        drawn.append(noise())
        return drawn[-1]

    drive(SAMPLERS[name](latents_at(SIGMAS[0]), SIGMAS, recorded), ideal)
    assert len(drawn) == len(SIGMAS) - 2


@each_deterministic
def test_a_point_is_approached_on_a_straight_line(name: str) -> None:
    x = latents_at(SIGMAS[0])
    queries, end = drive(SAMPLERS[name](x, SIGMAS, silence), point)
    for query in queries:
        np.testing.assert_allclose(query.x, MEAN + (x - MEAN) * (query.sigma / SIGMAS[0]), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(end, np.float32(MEAN))


@each_sampler
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


def test_an_unknown_sampler_has_no_number_of_evaluations() -> None:
    with pytest.raises(KeyError):
        evaluations("nonesuch", 20)

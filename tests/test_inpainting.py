"""What is kept of an image follows its own way through every sampler; what is repainted follows the model."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sdserver.inpainting import ImageLatents
from sdserver.noise import ImageNoise
from sdserver.parameterization import initial_latents
from sdserver.samplers import SAMPLERS, Query

Array = NDArray[np.float32]

SHAPE = (4, 2, 6)
SIGMAS = (14.6, 6.0, 2.5, 1.0, 0.3, 0.0)
NOISE = ImageNoise(1)

latents = np.random.default_rng(2).standard_normal(SHAPE).astype(np.float32)
# Columns: kept, kept, kept for half of the steps, almost repainted, repainted, repainted.
repaint = np.array([[0, 0, 0.5, 0.8, 1, 1]] * 2, np.float32)
image = ImageLatents(latents, repaint)


async def model(query: Query) -> Array:
    """A picture that no kept place has."""
    return np.full_like(query.x, 9.0)


async def run(name: str, whole_schedule: bool) -> tuple[list[Query], list[Array], Array]:
    denoise = image.keeping(model, len(SIGMAS) - 1)
    start = image.start(NOISE.initial(SHAPE), SIGMAS[0], whole_schedule)
    sampler = SAMPLERS[name](start, SIGMAS, NOISE.steps(SHAPE))
    queries, answers = [], []
    try:
        query = next(sampler)
        while True:
            queries.append(query)
            answers.append(await denoise(query))
            query = sampler.send(answers[-1])
    except StopIteration as end:
        return queries, answers, end.value


@pytest.mark.parametrize("whole_schedule", [True, False])
@pytest.mark.parametrize("name", SAMPLERS)
async def test_what_is_kept_ends_as_it_was_with_every_sampler(name: str, whole_schedule: bool) -> None:
    _, _, end = await run(name, whole_schedule)
    np.testing.assert_allclose(end[..., :2], latents[..., :2], atol=1e-4)
    np.testing.assert_allclose(end[..., 4:], 9.0, atol=1e-4)


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpmpp_2m", "unipc", "lms"])
async def test_what_is_kept_is_the_image_under_its_own_noise_on_the_whole_way(name: str) -> None:
    queries, _, _ = await run(name, whole_schedule=True)
    for query in queries:
        expected = latents + query.sigma * NOISE.initial(SHAPE)
        np.testing.assert_allclose(query.x[..., :2], expected[..., :2], rtol=1e-4, atol=1e-4)


async def test_a_place_between_is_kept_for_the_part_of_the_steps_that_it_is_not_repainted_for() -> None:
    _, answers, _ = await run("ddim", whole_schedule=False)
    free = [[bool((answer[:, 0, place] == 9).all()) for answer in answers] for place in (2, 3)]
    assert free == [[False, False, False, True, True], [False, True, True, True, True]]


def test_over_the_whole_schedule_nothing_is_left_of_what_is_repainted() -> None:
    noise = NOISE.initial(SHAPE)
    start = image.start(noise, 14.6, whole_schedule=True)
    np.testing.assert_allclose(start[..., 4:], initial_latents(noise, 14.6)[..., 4:], rtol=1e-6)
    part = image.start(noise, 2.5, whole_schedule=False)
    np.testing.assert_array_equal(part, latents + np.float32(2.5) * noise)
    plain = ImageLatents(latents).start(noise, 14.6, whole_schedule=True)
    np.testing.assert_array_equal(plain, initial_latents(noise, 14.6))


def test_without_anything_to_keep_the_model_is_left_alone() -> None:
    assert ImageLatents(latents).keeping(model, 5) is model

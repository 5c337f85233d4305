"""What a request says about sampling reaches the pixels: eta, churn, guidance rescale, seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from calls import a_request, events_of, image_of, images_of
from fakes import FakeBackend
from sdserver.samplers import SAMPLERS, noise_options

if TYPE_CHECKING:
    from sdapi.v1.generation_pb2_grpc import GenerationServiceAsyncStub
    from sdserver.backends import Floats
    from sdserver.engines import Engine

SPREAD = 0.3


class GaussianBackend(FakeBackend):
    """An ideal denoiser of Gaussian data: a prompt's have spread SPREAD, those of the empty prompt are all 0."""

    async def predict(self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats) -> Floats:
        schedule = engine.noise_schedule
        sigmas = np.array([schedule.sigma_at(float(timestep)) for timestep in timesteps])[:, None, None, None]
        root = np.sqrt(sigmas**2 + 1)
        variances = np.where(text_states.mean(axis=(1, 2)) == 0, 0, SPREAD**2)[:, None, None, None]
        # x0 as expected from x = latents * root, and v = (latents - x0) * root / sigma.
        x0 = variances / (variances + sigmas**2) * latents * root
        return np.asarray((latents - x0) * root / sigmas, np.float32)


@pytest.fixture
def backend() -> FakeBackend:
    return GaussianBackend()


async def pixels(stub: GenerationServiceAsyncStub, **fields: Any) -> Floats:
    image = await image_of(stub, a_request(**{"seed": 3, "steps": 10, "guidance_scale": 1.0, **fields}))
    return np.asarray(image, np.float32)


OPTIONS = [(sampler, option) for sampler in SAMPLERS for option in noise_options(sampler)]


@pytest.mark.parametrize(("sampler", "option"), OPTIONS)
async def test_eta_and_churn_change_the_image(stub: GenerationServiceAsyncStub, sampler: str, option: str) -> None:
    less, more = [await pixels(stub, sampler=f"SAMPLER_{sampler.upper()}", **{option: value}) for value in (0.0, 1.0)]
    assert np.abs(less - more).mean() > 1


async def test_without_noise_the_ancestral_sampler_is_the_deterministic_one(stub: GenerationServiceAsyncStub) -> None:
    ancestral = await pixels(stub, sampler="SAMPLER_EULER_ANCESTRAL", eta=0.0)
    np.testing.assert_array_equal(ancestral, await pixels(stub, sampler="SAMPLER_EULER"))


@pytest.mark.parametrize("blending", ["BLENDING_TEXT_ENCODER", "BLENDING_COMPOSABLE"])
async def test_rescale_takes_back_the_contrast_that_guidance_adds(
    stub: GenerationServiceAsyncStub, blending: str
) -> None:
    plain = (await pixels(stub)).std()
    spreads = [
        float((await pixels(stub, guidance_scale=3.0, guidance_rescale=rescale, blending=blending)).std())
        for rescale in (0.0, 0.5, 1.0)
    ]
    assert spreads[0] > spreads[1] > spreads[2]
    assert spreads[0] > 1.2 * plain


async def test_rescale_without_guidance_changes_nothing(stub: GenerationServiceAsyncStub) -> None:
    np.testing.assert_array_equal(await pixels(stub, guidance_rescale=1.0), await pixels(stub))


async def test_an_image_depends_on_its_own_seed_alone(stub: GenerationServiceAsyncStub) -> None:
    images = images_of(await events_of(stub, a_request(seeds=[8, 0, 2**63 - 1, 8])))
    assert [image.seed for image in images] == [8, 0, 2**63 - 1, 8]
    assert images[0].data == images[3].data
    assert len({image.data for image in images}) == 3
    for image in images[:3]:
        assert images_of(await events_of(stub, a_request(seed=image.seed)))[0].data == image.data

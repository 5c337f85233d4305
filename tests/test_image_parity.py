"""Image to image against diffusers' own, with the shipped engine's UNet: the same noise and image, the same latents."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from denoising import drive
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import StableDiffusionImg2ImgPipeline
from sdmodels.text_encoder import TextEncoder
from sdmodels.unet import UNet
from sdserver.inpainting import ImageLatents
from sdserver.parameterization import c_in, denoised
from sdserver.passes import steps_of
from sdserver.samplers import SAMPLERS

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sdserver.engines import Catalog, Engine
    from sdserver.samplers import Query

ENGINE = Path(__file__).parents[1] / "model_repository/engines/tiny-landscape"
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True}),
    "euler": (EulerDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
}
STEPS = 10

rng = np.random.default_rng(0)
image, noise = (rng.standard_normal((4, 16, 16)).astype(np.float32) for _ in range(2))


@pytest.fixture(scope="module")
def unet() -> UNet:
    return UNet(ENGINE)


@pytest.fixture(scope="module")
def text_states() -> NDArray[np.float32]:
    return TextEncoder(ENGINE)("a lake at sunset")[0][None]


def scheduler_of(engine: Engine, name: str) -> Any:
    kind, options = SCHEDULERS[name]
    schedule = engine.noise_schedule
    scheduler = kind(
        num_train_timesteps=schedule.train_timesteps,
        beta_schedule=schedule.beta_schedule,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        prediction_type=engine.prediction_type,
        timestep_spacing=schedule.timestep_spacing,
        steps_offset=schedule.steps_offset,
        **options,
    )
    scheduler.set_timesteps(STEPS)
    return scheduler


def timesteps_of(scheduler: Any, strength: float) -> torch.Tensor:
    """The timesteps that diffusers' pipeline runs."""
    timesteps: torch.Tensor = StableDiffusionImg2ImgPipeline.get_timesteps(
        SimpleNamespace(scheduler=scheduler), STEPS, strength, "cpu"
    )[0]
    return timesteps


@pytest.mark.parametrize("strength", [0.3, 0.75, 0.9])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_image_to_image_is_that_of_diffusers(
    catalog: Catalog, unet: UNet, text_states: NDArray[np.float32], name: str, strength: float
) -> None:
    engine = catalog.default
    scheduler = scheduler_of(engine, name)
    timesteps = timesteps_of(scheduler, strength)
    # The pipeline's own steps, without its guidance: prepare_latents, then the loop.
    x = scheduler.add_noise(torch.from_numpy(image[None]), torch.from_numpy(noise[None]), timesteps[:1])
    for timestep in timesteps:
        model_input = scheduler.scale_model_input(x, timestep).numpy().astype(np.float32)
        prediction = unet(model_input, np.array([float(timestep)], np.float32), text_states)
        x = scheduler.step(torch.from_numpy(prediction), timestep, x).prev_sample
    expected = x[0].numpy()

    def x0(query: Query) -> NDArray[np.float32]:
        timestep = np.array([engine.noise_schedule.timestep(query.sigma)], np.float32)
        prediction = unet((query.x * c_in(query.sigma))[None], timestep, text_states)[0]
        return denoised(prediction, query.x, query.sigma, engine.prediction_type)

    sigmas = engine.sigmas("native", STEPS)[STEPS - steps_of(strength, STEPS) :]
    start = ImageLatents(image).start(noise, sigmas[0], whole_schedule=False)
    _, latents = drive(SAMPLERS[name](start, sigmas, lambda: noise), x0)
    np.testing.assert_allclose(latents, expected, atol=1e-4)


@pytest.mark.parametrize("hundredth", range(0, 101, 5))
def test_a_strength_runs_as_many_steps_as_in_diffusers(catalog: Catalog, hundredth: int) -> None:
    strength = hundredth / 100
    theirs = len(timesteps_of(scheduler_of(catalog.default, "ddim"), strength))
    # diffusers refuses a strength that runs no step; here one above 0 runs one.
    assert steps_of(float(np.float32(strength)), STEPS) == (max(theirs, 1) if strength else 0)

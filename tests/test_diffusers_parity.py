"""Our samplers against diffusers' schedulers of the same name: the same noise and the same model, the same latents.

Both sides integrate one smooth, nonlinear model from one start, each over its own noise levels. Where diffusers departs
from the mathematics, a comment says how, and how it is configured or avoided here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch
from denoising import drive
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from numpy.typing import NDArray
from sdserver.parameterization import c_in, denoised, initial_latents
from sdserver.samplers import SAMPLERS
from sdserver.schedules import NoiseSchedule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdserver.parameterization import PredictionType
    from sdserver.samplers import Query
    from sdserver.schedules import BetaSchedule, TimestepSpacing

Array = NDArray[np.float32]

SHAPE = (4, 8, 8)
SEED = 20

SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "dpmpp_2m_sde": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
# Their schedulers work on x, as we do; the others on x * c_in, the variance-preserving convention.
VARIANCE_EXPLODING = {"euler", "euler_ancestral", "heun"}
MULTISTEP = {"dpmpp_2m", "dpmpp_2m_sde", "unipc"}
STOCHASTIC = {"euler_ancestral", "dpmpp_2m_sde"}
OPTIONS: dict[str, dict[str, Any]] = {
    # By default diffusers clips x0 to [-1, 1], as for pixels. set_alpha_to_one ends at sigma 0, as all others do; the
    # configuration of Stable Diffusion has False, which ends at the level of timestep 0, sigma 0.03.
    "ddim": {"clip_sample": False, "set_alpha_to_one": True},
    "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
}

Levels = Literal["trailing", "leading", "linspace", "karras"]


@dataclass(frozen=True)
class Case:
    sampler: str
    levels: Levels
    prediction_type: PredictionType = "epsilon"
    zero_terminal_snr: bool = False

    def __str__(self) -> str:
        return "-".join(
            [
                self.sampler,
                self.levels,
                self.prediction_type,
                *(["zero_terminal_snr"] if self.zero_terminal_snr else []),
            ]
        )

    @property
    def supported(self) -> bool:
        """Whether diffusers has a scheduler for it that does what its name says."""
        if self.levels == "karras" and self.sampler in {"ddim", "euler_ancestral"}:
            return False
        if self.levels == "linspace" and self.sampler == "ddim":
            # DDIMScheduler steps down by train_timesteps // steps, whatever the spacing: not to the next timestep.
            return False
        if self.zero_terminal_snr and self.sampler == "heun":
            return False
        # DDIMScheduler keeps abar = 0 for zero terminal SNR and divides by it, unless the model predicts v.
        return not (self.zero_terminal_snr and self.sampler == "ddim" and self.prediction_type == "epsilon")

    @property
    def steps(self) -> tuple[int, ...]:
        if self.levels == "linspace" and self.sampler in VARIANCE_EXPLODING:
            # These schedulers leave the timesteps of linspace fractional; for these counts they are whole.
            return (4, 10, 28)
        # Divisors of 1000: for others DDIMScheduler with trailing spacing lands beside the next timestep.
        return (5, 8, 20, 25)

    def noise_schedule(self) -> NoiseSchedule:
        return NoiseSchedule(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            train_timesteps=1000,
            timestep_spacing="linspace" if self.levels == "karras" else self.levels,
            steps_offset=1,
            rescale_zero_terminal_snr=self.zero_terminal_snr,
        )

    def sigmas(self, steps: int) -> tuple[float, ...]:
        schedule = self.noise_schedule()
        if self.levels == "karras":
            return schedule.karras(steps)
        if self.levels != "trailing" and self.sampler in MULTISTEP:
            # Here these schedulers space one step more, and leap over its level to sigma 0.
            return (*schedule.native(steps + 1)[:-2], 0.0)
        return schedule.native(steps)

    def scheduler(self, steps: int) -> Any:
        options: dict[str, Any] = {
            "num_train_timesteps": 1000,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": self.prediction_type,
            # The Karras levels of the Euler and Heun schedulers reach from the first to the last level of this spacing:
            # with linspace over all of training, as they do in the multistep schedulers, k-diffusion and here.
            "timestep_spacing": "linspace" if self.levels == "karras" else self.levels,
            "steps_offset": 1,
            **OPTIONS.get(self.sampler, {}),
        }
        if self.levels == "karras":
            options["use_karras_sigmas"] = True
        if self.zero_terminal_snr:
            options["rescale_betas_zero_snr"] = True
        scheduler = SCHEDULERS[self.sampler](**options)
        if self.sampler == "ddim" and self.zero_terminal_snr:
            # The floor that all their other schedulers put there.
            scheduler.alphas_cumprod[-1] = 2**-24
        scheduler.set_timesteps(steps)
        if self.sampler != "ddim":
            # Without it a scheduler looks its first timestep up, and starts at the second of two that are equal, as the
            # rounded timesteps of Karras levels can be.
            scheduler.set_begin_index(0)
        return scheduler


CASES = [
    case
    for sampler, levels, prediction_type, zero in product(
        SCHEDULERS, ("trailing", "leading", "linspace", "karras"), ("epsilon", "v_prediction"), (False, True)
    )
    if (case := Case(sampler, levels, prediction_type, zero)).supported
]


def predict(model_input: Array, sigma: float, prediction_type: PredictionType) -> Array:
    """The ideal prediction for data that are two Gaussians of spread 0.5, at -0.4 and at 1.2."""
    x = model_input.astype(np.float64) * math.sqrt(sigma**2 + 1)
    variance = 0.5**2 + sigma**2
    centre = 0.4 + 0.8 * np.tanh(0.8 * (x - 0.4) / variance)
    x0 = (0.5**2 * x + sigma**2 * centre) / variance
    epsilon = (x - x0) / sigma
    prediction = epsilon if prediction_type == "epsilon" else (epsilon - sigma * x0) / math.sqrt(sigma**2 + 1)
    return np.asarray(prediction, np.float32)


def step_noises() -> Iterator[Array]:
    """What the schedulers draw from a generator with SEED."""
    generator = torch.Generator().manual_seed(SEED)
    while True:
        yield torch.randn((1, *SHAPE), generator=generator)[0].numpy()


def their_sigmas(scheduler: Any) -> list[float]:
    """The noise level of each call of the model."""
    if not isinstance(scheduler, DDIMScheduler):
        return list(scheduler.sigmas[:-1].tolist())
    abar = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    return list(((1 - abar) / abar).sqrt().tolist())


def their_latents(case: Case, scheduler: Any, sigmas: list[float], x: Array) -> Array:
    latents = torch.from_numpy(x)[None] * (1.0 if case.sampler in VARIANCE_EXPLODING else c_in(sigmas[0]))
    noise = {"generator": torch.Generator().manual_seed(SEED)} if case.sampler in STOCHASTIC else {}
    for timestep, sigma in zip(scheduler.timesteps, sigmas, strict=True):
        model_input = scheduler.scale_model_input(latents, timestep)
        prediction = torch.from_numpy(predict(model_input.numpy(), sigma, case.prediction_type))
        latents = scheduler.step(prediction, timestep, latents, **noise).prev_sample
    return np.asarray(latents[0].numpy())


def our_latents(case: Case, x: Array, steps: int) -> Array:
    noises = step_noises()

    def denoise(query: Query) -> Array:
        prediction = predict(c_in(query.sigma) * query.x, query.sigma, case.prediction_type)
        return denoised(prediction, query.x, query.sigma, case.prediction_type)

    return drive(SAMPLERS[case.sampler](x, case.sigmas(steps), lambda: next(noises)), denoise)[1]


def start(case: Case, steps: int) -> Array:
    noise = np.random.default_rng(3).standard_normal(SHAPE, dtype=np.float32)
    return initial_latents(noise, case.sigmas(steps)[0])


def distance(ours: Array, theirs: Array) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_latents_are_those_of_diffusers(case: Case) -> None:
    # At sigma 4096, the first level of zero terminal SNR, the rounding of a float32 prediction counts 4096 times in x0.
    tolerance = 1e-4 if case.zero_terminal_snr else 1e-5
    for steps in case.steps:
        x = start(case, steps)
        scheduler = case.scheduler(steps)
        theirs = their_latents(case, scheduler, their_sigmas(scheduler), x)
        assert distance(our_latents(case, x, steps), theirs) <= tolerance, f"{steps} steps"


@pytest.mark.parametrize("case", [case for case in CASES if case.prediction_type == "v_prediction"], ids=str)
def test_the_levels_and_timesteps_are_those_of_diffusers(case: Case) -> None:
    schedule = case.noise_schedule()
    for steps in case.steps:
        scheduler = case.scheduler(steps)
        sigmas, timesteps = their_sigmas(scheduler), scheduler.timesteps.tolist()
        if case.sampler == "heun":
            # Two evaluations for each level after the first.
            sigmas, timesteps = [sigmas[0], *sigmas[1::2]], [timesteps[0], *timesteps[1::2]]
        ours = case.sigmas(steps)[:-1]
        # diffusers has 1 - beta in float32: where beta is 0.00085, rounding moves sigma by up to 1.8e-5 of itself.
        np.testing.assert_allclose(ours, sigmas, rtol=1.8e-5)
        # The multistep schedulers round the timesteps of Karras levels; ours stay at their levels.
        rounding = 0.5 if case.levels == "karras" and case.sampler in MULTISTEP else 0.0
        ours_at = [schedule.timestep(sigma) for sigma in ours]
        np.testing.assert_allclose(ours_at, timesteps, rtol=0, atol=rounding + 2e-3)


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_the_levels_of_training_are_those_of_diffusers(beta_schedule: BetaSchedule, zero_terminal_snr: bool) -> None:
    schedule = NoiseSchedule(
        beta_schedule=beta_schedule,
        beta_start=0.00085,
        beta_end=0.012,
        train_timesteps=1000,
        timestep_spacing="trailing",
        rescale_zero_terminal_snr=zero_terminal_snr,
    )
    scheduler = EulerDiscreteScheduler(
        beta_schedule=beta_schedule, beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=zero_terminal_snr
    )
    # Compared as abar, which diffusers accumulates in float32.
    np.testing.assert_allclose(1 / (1 + schedule.sigmas**2), scheduler.alphas_cumprod.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_the_spacing_is_that_of_diffusers_for_any_number_of_steps(spacing: TimestepSpacing) -> None:
    schedule = Case("ddim", spacing).noise_schedule()
    scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    # A single step of linspace starts at timestep 0, the clean end, in diffusers, and at the noisy end here.
    for steps in range(2, 500):
        scheduler.set_timesteps(steps)
        # Cut, because for some counts rounding makes diffusers' trailing range one timestep longer.
        timesteps = scheduler.timesteps.numpy()[:steps]
        np.testing.assert_array_equal(schedule.native(steps)[:-1], schedule.sigmas[timesteps], f"{steps} steps")


def test_the_stand_in_for_zero_terminal_snr_costs_less_than_one_part_in_4096() -> None:
    case = Case("ddim", "trailing", "v_prediction", zero_terminal_snr=True)
    for steps in case.steps:
        x = start(case, steps)
        scheduler = case.scheduler(steps)
        sigmas = their_sigmas(scheduler)
        scheduler.alphas_cumprod[-1] = 0.0
        theirs = their_latents(case, scheduler, sigmas, x)
        assert distance(our_latents(case, x, steps), theirs) < 1 / 4096

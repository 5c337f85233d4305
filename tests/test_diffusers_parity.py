"""Our samplers against diffusers' schedulers of the same name: the same noise and the same model, the same latents.

Both sides integrate one smooth, nonlinear model from one start, each over its own noise levels. Where diffusers departs
from the mathematics, a comment says how, and how it is configured or avoided here.

Not here, because diffusers needs further packages for them: LMS (scipy) and DPM++ SDE (torchsde).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pytest
import torch
from denoising import drive
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
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
    "ddpm": DDPMScheduler,
    "dpm2": KDPM2DiscreteScheduler,
    "dpm2_ancestral": KDPM2AncestralDiscreteScheduler,
    "lcm": LCMScheduler,
}
# Their schedulers work on x, as we do; the others on x * c_in, the variance-preserving convention.
VARIANCE_EXPLODING = {"euler", "euler_ancestral", "heun", "dpm2", "dpm2_ancestral"}
MULTISTEP = {"dpmpp_2m", "dpmpp_2m_sde", "unipc"}
STOCHASTIC = {"euler_ancestral", "dpmpp_2m_sde", "ddpm", "dpm2_ancestral", "lcm"}
# Their schedulers know timesteps, and no noise levels.
TIMESTEPS_ONLY = {"ddim", "ddpm", "lcm"}
OPTIONS: dict[str, dict[str, Any]] = {
    # By default diffusers clips x0 to [-1, 1], as for pixels. set_alpha_to_one ends at sigma 0, as all others do; the
    # configuration of Stable Diffusion has False, which ends at the level of timestep 0, sigma 0.03.
    "ddim": {"clip_sample": False, "set_alpha_to_one": True},
    "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
    "ddpm": {"clip_sample": False},
    # Spaces its timesteps evenly over all of training.
    "lcm": {"original_inference_steps": 1000},
}

Levels = Literal["trailing", "leading", "linspace", "karras", "exponential"]


@dataclass(frozen=True)
class Case:
    sampler: str
    levels: Levels
    prediction_type: PredictionType = "epsilon"
    zero_terminal_snr: bool = False
    eta: float | None = None

    def __str__(self) -> str:
        return "-".join(
            [
                self.sampler,
                self.levels,
                self.prediction_type,
                *(["zero_terminal_snr"] if self.zero_terminal_snr else []),
                *([f"eta_{self.eta:g}"] if self.eta is not None else []),
            ]
        )

    @property
    def supported(self) -> bool:
        """Whether diffusers has a scheduler for it that does what its name says."""
        if self.between_timesteps and self.sampler in TIMESTEPS_ONLY | {"euler_ancestral"}:
            return False
        if self.levels == "linspace" and self.sampler == "ddim":
            # DDIMScheduler steps down by train_timesteps // steps, whatever the spacing: not to the next timestep.
            return False
        if self.sampler == "lcm" and self.levels != "trailing":
            return False
        if self.zero_terminal_snr and self.sampler in {"heun", "dpm2", "dpm2_ancestral", "lcm"}:
            return False
        # Those that keep abar = 0 for zero terminal SNR divide by it, unless the model predicts v.
        return not (self.zero_terminal_snr and self.sampler in TIMESTEPS_ONLY and self.prediction_type == "epsilon")

    @property
    def between_timesteps(self) -> bool:
        """Whether the levels are spaced by themselves, and not as those of training timesteps."""
        return self.levels in {"karras", "exponential"}

    @property
    def rounded(self) -> bool:
        """Whether the scheduler rounds timesteps that are not whole."""
        return self.sampler in MULTISTEP or (self.levels == "karras" and self.sampler in {"dpm2", "dpm2_ancestral"})

    @property
    def steps(self) -> tuple[int, ...]:
        if self.levels == "linspace" and self.sampler in VARIANCE_EXPLODING:
            # These schedulers leave the timesteps of linspace fractional; for these counts they are whole.
            return (4, 10, 28)
        # Divisors of 1000: for others DDIMScheduler with trailing spacing lands beside the next timestep.
        return (5, 8, 20, 25)

    @property
    def spacing(self) -> TimestepSpacing:
        # Levels spaced by themselves reach from the first to the last of this spacing in most of their schedulers: with
        # linspace over all of training, as they do in the multistep schedulers, k-diffusion and here.
        return "linspace" if self.levels == "karras" or self.levels == "exponential" else self.levels

    def noise_schedule(self) -> NoiseSchedule:
        return NoiseSchedule(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            train_timesteps=1000,
            timestep_spacing=self.spacing,
            steps_offset=1,
            rescale_zero_terminal_snr=self.zero_terminal_snr,
        )

    def sigmas(self, steps: int) -> tuple[float, ...]:
        schedule = self.noise_schedule()
        if self.levels == "karras":
            return schedule.karras(steps)
        if self.levels == "exponential":
            return schedule.exponential(steps)
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
            "timestep_spacing": self.spacing,
            "steps_offset": 1,
            **OPTIONS.get(self.sampler, {}),
        }
        if self.between_timesteps:
            options[f"use_{self.levels}_sigmas"] = True
        if self.zero_terminal_snr:
            options["rescale_betas_zero_snr"] = True
        scheduler = SCHEDULERS[self.sampler](**options)
        if self.sampler in TIMESTEPS_ONLY and self.zero_terminal_snr:
            # The floor that all their other schedulers put there.
            scheduler.alphas_cumprod[-1] = 2**-24
        scheduler.set_timesteps(steps)
        if self.sampler not in TIMESTEPS_ONLY:
            # Without it a scheduler looks its first timestep up, and starts at the second of two that are equal, as the
            # rounded timesteps of Karras levels can be.
            scheduler.set_begin_index(0)
        return scheduler


CASES = [
    *(
        case
        for sampler, levels, prediction_type, zero in product(
            SCHEDULERS, get_args(Levels), ("epsilon", "v_prediction"), (False, True)
        )
        if (case := Case(sampler, levels, prediction_type, zero)).supported
    ),
    *(Case("ddim", "trailing", "v_prediction", eta=eta) for eta in (0.3, 1.0)),
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
    if isinstance(scheduler, KDPM2DiscreteScheduler | KDPM2AncestralDiscreteScheduler):
        halfway = scheduler.sigmas_interpol[1 if isinstance(scheduler, KDPM2DiscreteScheduler) else 0 :]
        calls = range(len(scheduler.timesteps))
        return [float(halfway[call - 1] if call % 2 else scheduler.sigmas[call]) for call in calls]
    if not isinstance(scheduler, DDIMScheduler | DDPMScheduler | LCMScheduler):
        return list(scheduler.sigmas[:-1].tolist())
    abar = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    return list(((1 - abar) / abar).sqrt().tolist())


def their_latents(case: Case, scheduler: Any, sigmas: list[float], x: Array) -> Array:
    latents = torch.from_numpy(x)[None] * (1.0 if case.sampler in VARIANCE_EXPLODING else c_in(sigmas[0]))
    noise: dict[str, Any] = {}
    if case.sampler in STOCHASTIC or case.eta is not None:
        noise["generator"] = torch.Generator().manual_seed(SEED)
    if case.eta is not None:
        noise["eta"] = case.eta
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

    options = {} if case.eta is None else {"eta": case.eta}
    return drive(SAMPLERS[case.sampler](x, case.sigmas(steps), lambda: next(noises), **options), denoise)[1]


def start(case: Case, steps: int) -> Array:
    noise = np.random.default_rng(3).standard_normal(SHAPE, dtype=np.float32)
    return initial_latents(noise, case.sigmas(steps)[0])


def silence() -> Array:
    raise AssertionError("without noise, and yet a sampler asked for some")


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
        if case.sampler in {"dpm2", "dpm2_ancestral"}:
            # A second evaluation halfway to the next level.
            sigmas, timesteps = sigmas[::2], timesteps[::2]
        ours = case.sigmas(steps)[:-1]
        # diffusers has 1 - beta in float32: where beta is 0.00085, rounding moves sigma by up to 1.8e-5 of itself.
        np.testing.assert_allclose(ours, sigmas, rtol=1.8e-5)
        # Some of their schedulers round the timesteps of such levels; ours stay at their levels.
        rounding = {"karras": 0.5, "exponential": 1.0}.get(case.levels, 0.0) if case.rounded else 0.0
        ours_at = [schedule.timestep(sigma) for sigma in ours]
        # Levels of training keep their timesteps; between them, the rounding of sigma moves them, too.
        off = 3e-3 if case.between_timesteps else 2e-3
        np.testing.assert_allclose(ours_at, timesteps, rtol=0, atol=rounding + off)


def test_dpmpp_2s_without_noise_is_their_single_step_solver() -> None:
    # Theirs takes the levels of the schedule in turns for its steps and for the middle of them, so that the middles are
    # ours where the levels are even in log(sigma). It has no ancestral noise.
    case = Case("dpmpp_2s_ancestral", "exponential", "v_prediction", eta=0.0)
    schedule = case.noise_schedule()
    for calls in (5, 9, 21):
        sigmas = (*schedule.exponential(calls)[:-1:2], 0.0)
        x = start(case, calls)
        scheduler = DPMSolverSinglestepScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            solver_order=2,
            lower_order_final=True,
            use_exponential_sigmas=True,
        )
        scheduler.set_timesteps(calls)
        scheduler.set_begin_index(0)
        theirs = their_latents(Case("unipc", "exponential", "v_prediction"), scheduler, their_sigmas(scheduler), x)

        def denoise(query: Query) -> Array:
            prediction = predict(c_in(query.sigma) * query.x, query.sigma, "v_prediction")
            return denoised(prediction, query.x, query.sigma, "v_prediction")

        _, ours = drive(SAMPLERS["dpmpp_2s_ancestral"](x, sigmas, silence, eta=0.0), denoise)
        assert distance(ours, theirs) <= 1e-5, f"{calls} calls"


@pytest.mark.parametrize("bend", [0.0, 0.02])
def test_dpmpp_3m_sde_is_theirs_but_for_a_sign_in_the_weight_of_the_curvature(bend: float) -> None:
    # A model whose x0 depends on the noise level alone, straight or bent in log(1 / sigma).
    steps = 20
    case = Case("dpmpp_3m_sde", "exponential", "v_prediction")
    sigmas = case.sigmas(steps)
    x = start(case, steps)

    def x0_at(sigma: float) -> float:
        position = -math.log(sigma)
        return 0.1 + 0.2 * position + bend * position**2

    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="sample",
        solver_order=3,
        # Their second step, of order 2, is then integrated exactly, like ours.
        solver_type="heun",
        algorithm_type="sde-dpmsolver++",
        use_exponential_sigmas=True,
    )
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    generator = torch.Generator().manual_seed(SEED)
    latents = torch.from_numpy(x)[None] * c_in(sigmas[0])
    for timestep, sigma in zip(scheduler.timesteps, sigmas[:-2], strict=False):
        latents = scheduler.step(torch.full_like(latents, x0_at(sigma)), timestep, latents, generator).prev_sample
    theirs = latents[0].numpy() / c_in(sigmas[-2])

    noises = step_noises()
    sampler = SAMPLERS["dpmpp_3m_sde"](x, sigmas[:-1], lambda: next(noises))
    _, ours = drive(sampler, lambda query: np.full_like(query.x, x0_at(query.sigma)))
    # The weight of the curvature over a step, and theirs: its last term should be added.
    rate = 2 * math.log(sigmas[0] / sigmas[1])
    kept = math.exp(-rate)
    weight = 1 - 2 * (1 - (1 - kept) / rate) / rate
    their_weight = (1 - kept - rate) / rate**2 - 0.5
    # A step adds the difference, and keeps a part of what the steps before it added.
    missing = bend * (rate / 2) ** 2 * (weight - their_weight) * (1 - kept ** (steps - 3)) / (1 - kept)
    np.testing.assert_allclose(ours - theirs, missing, rtol=0, atol=1e-5)


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

"""Noise schedules: which noise levels a model was trained on, and which of them a generation visits.

Noise levels are sigmas in the variance-exploding convention of Karras et al. 2022 (arXiv:2206.00364): noisy latents are
x = x0 + sigma * noise, where sigma = sqrt((1 - abar) / abar) and abar is the cumulative product of 1 - beta. All of it
is float64; a generation gets its levels as Python floats, which leave float32 latents float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, assert_never

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BetaSchedule = Literal["scaled_linear", "linear", "squaredcos_cap_v2"]
TimestepSpacing = Literal["trailing", "leading", "linspace"]

# Stands for the last abar of a schedule with zero terminal SNR, which is 0 and would make sigma infinite. With it sigma
# is 4096: the UNet's input is 1 part of latents to 4096 of noise. The value, the least positive float16, is that of
# diffusers, so that equal requests give equal images.
ZERO_ABAR = 2.0**-24


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """The noise levels of an engine, fixed by its training. Raises ValueError if they would not increase.

    The fields are named as in diffusers' scheduler configurations, except `train_timesteps`, theirs with `num_`, and
    `rescale_zero_terminal_snr`, their `rescale_betas_zero_snr`.
    """

    beta_schedule: BetaSchedule
    """How the noise variance of the training steps grows. The cosine one needs no `beta_start` and `beta_end`."""
    beta_start: float
    """Noise variance of the first training step."""
    beta_end: float
    """Noise variance of the last training step."""
    train_timesteps: int
    """Training timesteps, 0 to `train_timesteps` - 1."""
    timestep_spacing: TimestepSpacing
    """How `native` spreads a generation over them: Lin et al. 2023 (arXiv:2305.08891), table 2."""
    steps_offset: int = 0
    """Added to the timesteps of the leading spacing; 1 in Stable Diffusion."""
    rescale_zero_terminal_snr: bool = False
    """Whether the last timestep is pure noise: Lin et al. 2023, algorithm 1."""

    def __post_init__(self) -> None:
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_start={self.beta_start}, beta_end={self.beta_end}: 0 < beta_start <= beta_end < 1")
        if self.train_timesteps < 2:
            raise ValueError(f"train_timesteps={self.train_timesteps}: at least 2")
        if self.steps_offset < 0:
            raise ValueError(f"steps_offset={self.steps_offset}: at least 0")

    @cached_property
    def sigmas(self) -> NDArray[np.float64]:
        """[train_timesteps] noise levels of the training timesteps, strictly increasing; read-only."""
        abar = np.cumprod(1 - self._betas())
        if self.rescale_zero_terminal_snr:
            root = np.sqrt(abar)
            abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
            abar[-1] = ZERO_ABAR
        sigmas: NDArray[np.float64] = np.sqrt((1 - abar) / abar)
        sigmas.flags.writeable = False
        return sigmas

    def timestep(self, sigma: float) -> float:
        """The training timestep whose noise level is `sigma`, linear in log(sigma) between training timesteps.

        Exact for a level of training, clamped to 0 and `train_timesteps` - 1 outside them.
        """
        last = self.train_timesteps - 1
        below = min(max(int(np.searchsorted(self.sigmas, sigma, side="right")) - 1, 0), last - 1)
        low, high = self.sigmas[below : below + 2].tolist()
        # Ratios inside the logarithms, so that a level of training gives 0 or 1 without rounding.
        return below + math.log(min(max(sigma, low), high) / low) / math.log(high / low)

    def sigma_at(self, timestep: float) -> float:
        """The noise level at a training timestep, whole or not; the inverse of `timestep`, clamped likewise."""
        last = self.train_timesteps - 1
        timestep = min(max(timestep, 0.0), float(last))
        below = min(int(timestep), last - 1)
        low, high = self.sigmas[below : below + 2].tolist()
        # As a product of powers, so that a whole timestep gives `low` or `high` without rounding.
        return float(low ** (below + 1 - timestep) * high ** (timestep - below))

    def native(self, steps: int) -> tuple[float, ...]:
        """[steps + 1] noise levels at evenly spaced training timesteps, decreasing, then 0. Lin et al. 2023, table 2.

        Raises ValueError unless there are 1 to `train_timesteps` steps and `steps_offset` leaves them in that range.
        """
        return (*self.sigmas[self._spaced(steps)].tolist(), 0.0)

    def karras(self, steps: int, rho: float = 7.0) -> tuple[float, ...]:
        """[steps + 1] noise levels from the greatest to the least of training, even in sigma**(1 / rho), then 0.

        Karras et al. 2022, equation 5. Raises ValueError if `steps` is below 1.
        """
        if steps < 1:
            raise ValueError(f"steps={steps}: at least 1")
        greatest, least = self.sigmas[[-1, 0]] ** (1 / rho)
        return (*(np.linspace(greatest, least, steps) ** rho).tolist(), 0.0)

    def exponential(self, steps: int) -> tuple[float, ...]:
        """[steps + 1] noise levels from the greatest to the least of training, even in log(sigma), then 0.

        Raises ValueError if `steps` is below 1.
        """
        if steps < 1:
            raise ValueError(f"steps={steps}: at least 1")
        return (*np.geomspace(self.sigmas[-1], self.sigmas[0], steps).tolist(), 0.0)

    def _betas(self) -> NDArray[np.float64]:
        """[train_timesteps] noise variances of the training steps."""
        steps = self.train_timesteps
        betas: NDArray[np.float64]
        match self.beta_schedule:
            case "linear":
                betas = np.linspace(self.beta_start, self.beta_end, steps)
            case "scaled_linear":
                # Linear in the standard deviation: latent diffusion's own schedule.
                betas = np.linspace(math.sqrt(self.beta_start), math.sqrt(self.beta_end), steps) ** 2
            case "squaredcos_cap_v2":
                # Nichol and Dhariwal 2021 (arXiv:2102.09672), equation 17 and the cap below it.
                abar = np.cos((np.linspace(0, 1, steps + 1) + 0.008) / 1.008 * (math.pi / 2)) ** 2
                betas = np.minimum(1 - abar[1:] / abar[:-1], 0.999)
            case _:
                assert_never(self.beta_schedule)
        return betas

    def _spaced(self, steps: int) -> NDArray[np.int64]:
        """[steps] training timesteps, strictly decreasing."""
        train = self.train_timesteps
        if not 1 <= steps <= train:
            raise ValueError(f"steps={steps}: 1 to {train}")
        timesteps: NDArray[np.float64]
        match self.timestep_spacing:
            case "trailing":
                # Cut, because rounding can make the range one longer.
                timesteps = np.arange(train, 0, -train / steps)[:steps].round() - 1
            case "leading":
                timesteps = np.arange(steps - 1.0, -1.0, -1.0) * (train // steps) + self.steps_offset
            case "linspace":
                # Cut, so that a single step starts at the noisy end.
                timesteps = np.linspace(0, train - 1, max(steps, 2)).round()[::-1][:steps]
            case _:
                assert_never(self.timestep_spacing)
        if timesteps[0] >= train:
            raise ValueError(f"steps={steps}: too many to move by steps_offset={self.steps_offset}; ask for fewer")
        return timesteps.astype(np.int64)

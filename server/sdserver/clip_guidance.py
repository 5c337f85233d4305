"""CLIP guidance: each step moves the image towards what CLIP takes for the text.

Guidance by a likelihood p(text | x0) adds `sigma^2 grad_x log p` to the denoised latents x0 of a noisy x (Dhariwal and
Nichol 2021, arXiv:2105.05233, in the variance-exploding convention). Since dx0/dx = Cov(x0 | x) / sigma^2, that is
`Cov(x0 | x) grad_x0 log p`. Here the likelihood falls with CLIP's loss, and the step is

    x0' = x0 - scale * C g / rms(g)        g  the loss's gradient by x0
                                           C  Cov(x0 | x): r^2, or sigma^2 times the transposed Jacobian of x0 by x

    r^2 = sigma^2 / (sigma^2 + 1)   the covariance of latents of unit variance (Song et al. 2023, "Pseudoinverse-guided
                                    diffusion models", ICLR): no gradient goes through the UNet. An approximation.
    the Jacobian                    the exact mode: the gradient goes through the UNet. What whole regions have in
                                    common varies far more than a unit, so the step is no longer than that of r^2.

Only the gradient's direction counts, so that `scale` means the same for each engine, size and number of cutouts: it is
the shift of the latents, in their standard deviations, where there is only noise. The shift vanishes with sigma^2 as
the image is finished, and because a sampler integrates x0 over log sigma, its sum does not depend on the number of
steps. What is moved is x0 and not the UNet's prediction, so that nothing depends on whether that is noise or velocity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sdserver.request import ClipGuidance
    from sdserver.step_scheduler import StepScheduler

Array = NDArray[np.float32]


class ClipRow(NamedTuple):
    """What CLIP is asked of one image: denoised latents [C, h, w], text features [E] of unit length, cutouts."""

    latents: Array
    target: Array
    seed: int
    cutouts: int


class GradientRow(NamedTuple):
    """A row of the UNet, as `step_scheduler.Row`, and a gradient [C, h, w] by its prediction."""

    latents: Array
    timestep: float
    text_states: Array
    gradient: Array


class ClipGuide:
    """Steers one image."""

    def __init__(
        self,
        options: ClipGuidance,
        target: Array,
        gradients: StepScheduler,
        unet_gradients: StepScheduler | None,
        tenant: str,
        cutout_seed: Callable[[], int],
    ) -> None:
        self.options = options
        self.unet_gradients = unet_gradients
        """Takes `GradientRow`s; None: no gradient goes through the UNet."""
        self._target = target
        self._gradients = gradients
        self._tenant = tenant
        self._cutout_seed = cutout_seed
        self.gradients = 0
        """Gradients computed so far."""
        self._latest: tuple[int, Array] | None = None

    def acts_in(self, step: int, steps: int) -> bool:
        """Whether it steers in a step, counted from 1."""
        options = self.options
        # Shares are 32-bit floats on the wire: 0.6 is a little more there.
        position = float(np.float32((step - 1) / steps))
        return options.scale != 0 and options.start <= position < options.end

    async def gradient(self, step: int, x0: Array) -> Array:
        """[C, h, w] gradient of CLIP's loss by the denoised latents [C, h, w] of a step, counted from 1.

        Each has cutouts of its own. It changes little from step to step, so that one may serve several.
        """
        serves = self.options.steps_per_gradient
        if serves > 1 and self._latest is not None and step < self._latest[0] + serves:
            return self._latest[1]
        row = ClipRow(x0, self._target, self._cutout_seed(), self.options.cutouts)
        gradients = await self._gradients.predict([row], self._tenant)
        self.gradients += 1
        gradient: Array = gradients[0]
        self._latest = step, gradient
        return gradient


def steered(x0: Array, gradient: Array, shift: Array, sigma: float, scale: float) -> Array:
    """[C, h, w] the denoised latents, moved by `shift`, C g above, over the gradient g's root mean square.

    No further than latents of unit variance would be moved, and not at all where the gradient is 0.
    """
    length, shifted = _root_mean_square(gradient), _root_mean_square(shift)
    if length == 0 or shifted == 0:
        return x0
    # In double precision: of a gradient too small to have all its digits, 1 / length is beyond single precision.
    moved: Array = (x0 - scale * min(1 / length, variance(sigma) / shifted) * shift.astype(np.float64)).astype(
        np.float32
    )
    return moved


def _root_mean_square(array: Array) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))


def variance(sigma: float) -> float:
    """r^2: how far latents of unit variance are from known, once they are seen with noise of level `sigma`."""
    return sigma**2 / (sigma**2 + 1)


def blended_features(features: Sequence[tuple[Array, float]]) -> Array:
    """[E] the mean of text features, each [E] of unit length, by their weights above 0, of unit length again."""
    mean = sum(weight * array for array, weight in features)
    return np.asarray(mean / np.linalg.norm(mean), np.float32)

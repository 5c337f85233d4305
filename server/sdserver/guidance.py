"""Weighted prompts and classifier-free guidance as one linear form.

For every noisy latent x the UNet predicts one x0 for each row of text states, and the guided prediction is
`sum_r (base_r + guidance_scale * direction_r) x0_r`. A row whose coefficient is 0 is not computed: without guidance
an image costs one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdserver.request import Blending, GuidanceInterval

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Guidance:
    """Rows of text states, [R, tokens, width], and how their predictions add up."""

    text_states: Array
    base: tuple[float, ...]
    direction: tuple[float, ...]
    scale: float
    interval: GuidanceInterval

    def coefficients(self, step: int, steps: int) -> tuple[float, ...]:
        """[R] weights of the rows' predictions in a step, counted from 1.

        Outside the guidance interval the scale is 1: the plain conditional prediction (arXiv:2404.07724).
        """
        position = (step - 1) / steps
        scale = self.scale if self.interval.start <= position < self.interval.end else 1.0
        return tuple(base + scale * direction for base, direction in zip(self.base, self.direction, strict=True))


def blend(
    prompt_states: Array,
    weights: Sequence[float],
    empty_states: Array,
    blending: Blending,
    scale: float,
    interval: GuidanceInterval,
) -> Guidance:
    """Turns the prompts' text states, [P, tokens, width], their weights and the empty prompt's states into guidance.

    `text_encoder` averages text states within each sign. The unconditional branch moves from the empty prompt towards
    the negatives by min(1, sum of |negative| / sum of positive), so that "2 | -2" is a full negative prompt and a
    small negative weight is a weak one. Never normalised over the signed sum, which may be 0.

    `composable` sums predictions: x0 = u + scale * sum_i w_i (x0_i - u) (Liu et al. 2022, arXiv:2206.01714).
    """
    if blending == "composable":
        return Guidance(
            text_states=np.concatenate([empty_states[None], prompt_states]),
            base=(1.0, *(0.0 for _ in weights)),
            direction=(-sum(weights), *weights),
            scale=scale,
            interval=interval,
        )
    positives = [max(weight, 0.0) for weight in weights]
    negatives = [max(-weight, 0.0) for weight in weights]
    condition = _mean(prompt_states, positives) if any(positives) else empty_states
    unconditional = empty_states
    if any(negatives):
        share = min(1.0, sum(negatives) / sum(positives)) if any(positives) else 1.0
        unconditional = (1.0 - share) * empty_states + share * _mean(prompt_states, negatives)
    return Guidance(
        text_states=np.stack([unconditional, condition]).astype(np.float32),
        base=(1.0, 0.0),
        direction=(-1.0, 1.0),
        scale=scale,
        interval=interval,
    )


def _mean(states: Array, weights: Sequence[float]) -> NDArray[np.float64]:
    mean: NDArray[np.float64] = np.average(states, axis=0, weights=weights)
    return mean

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

    @property
    def conditional(self) -> tuple[float, ...]:
        """[R] weights of the rows' predictions that make the conditional one, which scale 1 gives."""
        return tuple(base + direction for base, direction in zip(self.base, self.direction, strict=True))

    def coefficients(self, step: int, steps: int) -> tuple[float, ...]:
        """[R] weights of the rows' predictions in a step, counted from 1.

        Outside the guidance interval the scale is 1: the plain conditional prediction (arXiv:2404.07724).
        """
        position = (step - 1) / steps
        scale = self.scale if self.interval.start <= position < self.interval.end else 1.0
        return tuple(base + scale * direction for base, direction in zip(self.base, self.direction, strict=True))


def blend(
    prompt_states: Sequence[Array],
    weights: Sequence[float],
    empty_states: Array,
    blending: Blending,
    scale: float,
    interval: GuidanceInterval,
) -> Guidance:
    """Turns the prompts' text states, each [tokens, width], their weights and the empty prompt's into guidance.

    All rows are as long as the longest prompt: shorter ones are padded with the empty prompt's states, as A1111's
    web UI does (modules/sd_hijack_clip.py).

    `text_encoder` averages text states within each sign. The unconditional branch moves from the empty prompt towards
    the negatives by min(1, sum of |negative| / sum of positive), so that "2 | -2" is a full negative prompt and a
    small negative weight is a weak one. Without positives the empty prompt is the condition, with weight 1. Never
    normalised over the signed sum, which may be 0.

    `composable` sums predictions: x0 = u + scale * sum_i w_i (x0_i - u) (Liu et al. 2022, arXiv:2206.01714).
    """
    empty, *prompts = _equally_long([empty_states, *prompt_states], empty_states)
    if blending == "composable":
        return Guidance(
            text_states=np.stack([empty, *prompts]),
            base=(1.0, *(0.0 for _ in weights)),
            direction=(-sum(weights), *weights),
            scale=scale,
            interval=interval,
        )
    positives = [max(weight, 0.0) for weight in weights]
    negatives = [max(-weight, 0.0) for weight in weights]
    condition = _mean(prompts, positives) if any(positives) else empty
    unconditional = empty
    if any(negatives):
        share = min(1.0, sum(negatives) / (sum(positives) if any(positives) else 1.0))
        unconditional = (1.0 - share) * empty + share * _mean(prompts, negatives)
    return Guidance(
        text_states=np.stack([unconditional, condition]).astype(np.float32),
        base=(1.0, 0.0),
        direction=(-1.0, 1.0),
        scale=scale,
        interval=interval,
    )


def _equally_long(states: Sequence[Array], padding: Array) -> list[Array]:
    """Each [tokens, width], followed by as much padding [chunk, width] as makes all as long as the longest."""
    length = max(len(array) for array in states)
    return [np.concatenate([array, *[padding] * ((length - len(array)) // len(padding))]) for array in states]


def rescale_factor(guided: Array, conditional: Array, guidance_rescale: float) -> float:
    """What draws the contrast of the guided prediction [C, h, w] towards that of the conditional one, wholly for 1.

    Large scales spread predictions and so overexpose images: Lin et al. 2023 (arXiv:2305.08891), equations 14 to 16.
    """
    spread = float(guided.std())
    if spread == 0:
        return 1.0
    return 1 + guidance_rescale * (float(conditional.std()) / spread - 1)


def _mean(states: Sequence[Array], weights: Sequence[float]) -> NDArray[np.float64]:
    mean: NDArray[np.float64] = np.average(states, axis=0, weights=weights)
    return mean

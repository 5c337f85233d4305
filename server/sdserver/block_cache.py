"""Block caching: most steps run only the UNet's outermost blocks, on what the inner ones made of an earlier step.

DeepCache (Ma et al. 2023, arXiv:2312.00858): the features that come up to the last up block change little from step to
step, and cost most of a row's time. Here they travel with the rows, so that no model has a state, and rows of different
images and steps share calls as all others do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from sdserver.step_scheduler import Row, StepScheduler

Array = NDArray[np.float32]


class CachedRow(NamedTuple):
    """A row of the UNet, as `step_scheduler.Row`, and the features [F, h, w] of the same row in an earlier step."""

    latents: Array
    timestep: float
    text_states: Array
    features: Array


class BlockCache:
    """The features of one pass of an image.

    The first evaluation of every `interval`-th step, from the pass's first on, runs the whole UNet; so does a row that
    has no features of that step, because it was not asked for then.
    """

    def __init__(
        self, interval: int, whole: StepScheduler, outermost: StepScheduler, tenant: str, channels: int
    ) -> None:
        """`whole` takes `Row`s and gives predictions [C, h, w] with features [F, h, w] below them; `outermost` takes
        `CachedRow`s. `channels` is C."""
        self._interval = interval
        self._channels = channels
        self._whole = whole
        self._outermost = outermost
        self._tenant = tenant
        self._first: int | None = None
        self._round = -1
        self._features: dict[Hashable, Array] = {}
        self.rows = 0
        """Rows so far of which the inner blocks were left out."""

    async def predict(self, step: int, rows: Sequence[Row], keys: Sequence[Hashable]) -> Array:
        """[R, C, h, w] predictions in a step, counted from 1; a row's key is the same in all steps."""
        if self._first is None:
            self._first = step
        if (now := (step - self._first) // self._interval) != self._round:
            self._round = now
            self._features.clear()
        features = [self._features.get(key) for key in keys]
        missing = [index for index, known in enumerate(features) if known is None]
        channels = self._channels
        predictions = np.empty((len(rows), channels, *rows[0].latents.shape[1:]), np.float32)
        if missing:
            made = await self._whole.predict([rows[index] for index in missing], self._tenant)
            predictions[missing] = made[:, :channels]
            self._features.update((keys[index], row[channels:]) for index, row in zip(missing, made, strict=True))
        cached = {
            index: CachedRow(*row, known)
            for index, (row, known) in enumerate(zip(rows, features, strict=True))
            if known is not None
        }
        if cached:
            predictions[list(cached)] = await self._outermost.predict(list(cached.values()), self._tenant)
            self.rows += len(cached)
        return predictions

"""UNet rows with LoRAs. Each row carries its own, so that requests with different ones share calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdserver.engines import MAX_LORAS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdserver.request import Lora
    from sdserver.step_scheduler import Row, StepScheduler

Array = NDArray[np.float32]

DIGEST_BYTES = 32


class LoraRow(NamedTuple):
    """A row as `step_scheduler.Row`, with the SHA-256 [K, 32] of its LoRAs and their weights [K], 0 for none."""

    latents: Array
    timestep: float
    text_states: Array
    digests: NDArray[np.uint8]
    weights: Array


class LoraRows:
    """Asks for a request's rows with its LoRAs, as one asks `StepScheduler` for rows without."""

    def __init__(self, scheduler: StepScheduler, loras: Sequence[Lora]) -> None:
        """`scheduler` takes `LoraRow`s."""
        self._scheduler = scheduler
        self._digests, self._weights = lora_arrays(loras, MAX_LORAS)

    async def predict(self, rows: Sequence[Row], tenant: str) -> Array:
        """[R, C, h, w] predictions of rows of the same shapes."""
        with_loras = [LoraRow(*row, self._digests, self._weights) for row in rows]
        return await self._scheduler.predict(with_loras, tenant)


def lora_arrays(loras: Sequence[Lora], places: int) -> tuple[NDArray[np.uint8], Array]:
    """SHA-256 digests [places, 32] and weights [places] of LoRAs, the rest 0."""
    digests, weights = np.zeros((places, DIGEST_BYTES), np.uint8), np.zeros(places, np.float32)
    for place, lora in enumerate(loras):
        digests[place] = np.frombuffer(bytes.fromhex(lora.info.sha256), np.uint8)
        weights[place] = lora.weight
    return digests, weights

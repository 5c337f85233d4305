"""Drives a sampler with a denoiser that is a formula."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdserver.samplers import Query, Sampler

Array = NDArray[np.float32]


def drive(sampler: Sampler, denoise: Callable[[Query], Array]) -> tuple[list[Query], Array]:
    """Its queries and the latents that it returns."""
    queries = []
    try:
        query = next(sampler)
        while True:
            queries.append(query)
            query = sampler.send(denoise(query))
    except StopIteration as end:
        return queries, end.value

"""Starting from an image instead of noise, and keeping what is not to be repainted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdserver.parameterization import initial_latents

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sdserver.samplers import Query

    Denoise = Callable[[Query], Awaitable[NDArray[np.float32]]]

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class ImageLatents:
    """The latents of an image to start from, and how much of each place is repainted."""

    latents: Array
    """[C, h, w]."""
    repaint: Array | None = None
    """[h, w], 0 (kept) to 1 (repainted); None: nothing is kept."""

    def start(self, noise: Array, sigma: float, whole_schedule: bool) -> Array:
        """[C, h, w] where a sampler starts at `sigma`, from standard normal `noise`.

        Over the whole schedule nothing is left of what is repainted: it starts as text to image does.
        """
        noised: Array = self.latents + sigma * noise
        if not whole_schedule:
            return noised
        pure = initial_latents(noise, sigma)
        if self.repaint is None:
            return pure
        start: Array = noised + self.repaint * (pure - noised)
        return start

    def keeping(self, denoise: Denoise, steps: int) -> Denoise:
        """`denoise` with x0 replaced by the image's own latents where they are kept.

        The sampler then keeps them on their way from `latents + sigma * noise` to `latents`, whichever it is. Between
        kept and repainted a place is kept for that part of the `steps` that it is not repainted for, and then let go,
        so that it joins what has come up beside it: differential diffusion (Levin and Fried 2023,
        arXiv:2306.00950).
        """
        if self.repaint is None:
            return denoise
        repaint, latents = self.repaint, self.latents

        async def kept(query: Query) -> Array:
            x0 = await denoise(query)
            free = repaint >= 1 - (query.step - 1) / steps
            held: Array = np.where(free, x0, latents)
            return held

        return kept

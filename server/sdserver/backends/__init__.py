"""Where the models run: behind a Triton Inference Server, or in this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sdserver.engines import Engine
    from sdserver.request import Emphasis

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class EncodedText:
    """[chunks * context_length, width] text states, and how many tokens, without start and end, and chunks they are of.

    A text with more chunks than the engine takes has states that must not be used.
    """

    states: Floats
    tokens: int
    chunks: int


class Backend(Protocol):
    """The models of all engines.

    Every call raises `errors.Unavailable` when the models cannot be reached and `errors.GenerationFailed` when one of
    them fails; cancelling a call withdraws it where it runs.
    """

    async def encode_text(self, engine: Engine, text: str, emphasis: tuple[Emphasis, ...]) -> EncodedText:
        """Text states from the penultimate layer of the text tower, emphasis applied."""
        ...

    async def predict(self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats) -> Floats:
        """[B, C, h, w] UNet predictions for latents [B, C, h, w], timesteps [B], text states [B, tokens, width]."""
        ...

    async def decode(self, engine: Engine, latents: Floats) -> Pixels:
        """[B, H, W, 3] pixels of latents [B, C, h, w] in the UNet's scale."""
        ...

    async def is_ready(self, engine: Engine) -> bool:
        """Whether all models of the engine are loaded. Never raises."""
        ...

    async def close(self) -> None:
        """Lets go of connections and threads."""
        ...

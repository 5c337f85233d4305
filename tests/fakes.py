"""A backend without weights: every law of the server that needs no trained model is tested on it."""

from __future__ import annotations

import asyncio
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from sdserver.backends import EncodedText

if TYPE_CHECKING:
    from sdserver.backends import Floats, Pixels
    from sdserver.engines import Engine
    from sdserver.request import Emphasis

WORDS_A_CHUNK = 75


@dataclass
class FakeBackend:
    """An ideal denoiser of single points: a text means one latent value, `mean_of(text)`, and x0 is always that.

    Text states hold that value, times the mean factor of the text's characters, so that blended states mean blended
    values. Words are tokens. `delay` seconds pass in each UNet call, `encode_delay` in each of the text encoder.
    `error` is raised by every call while it is set.
    """

    delay: float = 0.0
    encode_delay: float = 0.0
    error: Exception | None = None
    ready: bool = True
    not_finite: bool = False
    texts: list[str] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    decoded: int = 0
    running: int = 0
    closed: bool = False

    @staticmethod
    def mean_of(text: str) -> float:
        """The latent value that a text means, -1 to 1; the empty text means 0."""
        return zlib.crc32(text.encode()) / 2**31 - 1 if text else 0.0

    @property
    def calls(self) -> int:
        return len(self.texts) + len(self.batches) + self.decoded

    async def encode_text(self, engine: Engine, text: str, emphasis: tuple[Emphasis, ...]) -> EncodedText:
        self._fail()
        self.texts.append(text)
        await asyncio.sleep(self.encode_delay)
        tokens = len(text.split())
        chunks = max(1, -(-tokens // WORDS_A_CHUNK))
        factors = np.ones(max(len(text), 1))
        for part in emphasis:
            factors[part.start : part.end] = part.factor
        shape = chunks * engine.text_encoder.context_length, engine.text_encoder.width
        return EncodedText(np.full(shape, self.mean_of(text) * factors.mean(), np.float32), tokens, chunks)

    async def predict(self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats) -> Floats:
        self._fail()
        self.batches.append(len(latents))
        self.running += 1
        try:
            await asyncio.sleep(self.delay)
        finally:
            self.running -= 1
        # Parameters of v-prediction (Salimans and Ho 2022): x = alpha x0 + sigma eps, v = (alpha x - x0) / sigma.
        assert engine.prediction_type == "v_prediction"
        schedule = engine.noise_schedule
        sigmas = np.array([schedule.sigma_at(float(timestep)) for timestep in timesteps])[:, None, None, None]
        alpha, sigma = 1 / np.sqrt(sigmas**2 + 1), sigmas / np.sqrt(sigmas**2 + 1)
        means = text_states.mean(axis=(1, 2))[:, None, None, None]
        prediction = (alpha * latents - means) / sigma
        return np.full_like(latents, np.nan) if self.not_finite else prediction.astype(np.float32)

    async def decode(self, engine: Engine, latents: Floats) -> Pixels:
        self._fail()
        self.decoded += len(latents)
        scale = engine.latents.downsampling
        grey = np.clip(latents[:, :3] * 127 + 128, 0, 255).round().astype(np.uint8)
        return grey.repeat(scale, axis=2).repeat(scale, axis=3).transpose(0, 2, 3, 1)

    async def is_ready(self, engine: Engine) -> bool:
        return self.ready

    async def close(self) -> None:
        self.closed = True

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error


def pixel_of(value: float) -> int:
    """The grey that FakeBackend draws for a latent value."""
    return round(min(max(value * 127 + 128, 0), 255))

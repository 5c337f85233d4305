"""A backend without weights: every law of the server that needs no trained model is tested on it."""

from __future__ import annotations

import asyncio
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from sdserver.backends import EncodedText

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdserver.backends import Bytes, Floats, Integers, Pixels
    from sdserver.engines import Engine
    from sdserver.request import Emphasis, Lora

WORDS_A_CHUNK = 75


@dataclass
class FakeBackend:
    """An ideal denoiser of single points: a text means one latent value, `mean_of(text)`, and x0 is always that.

    Text states hold that value, times the mean factor of the text's characters, so that blended states mean blended
    values, and text features are at the angle of that value. Words are tokens. `delay` seconds pass in each UNet call
    and CLIP gradient, `encode_delay` in each call of the text encoder.
    `error` is raised by every call while it is set, `safety_error` by those of the safety model, whose only class has
    the `score` of a picture: its brightness, unless the test has another.
    """

    delay: float = 0.0
    encode_delay: float = 0.0
    error: Exception | None = None
    ready: bool = True
    not_finite: bool = False
    texts: list[str] = field(default_factory=list)
    text_loras: list[tuple[Lora, ...]] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    conditionings: list[Floats] = field(default_factory=list)
    """The channels after the latents, of each row."""
    whole: list[float] = field(default_factory=list)
    """The timesteps of rows whose features were asked for."""
    cached: list[tuple[float, float]] = field(default_factory=list)
    """The timesteps of rows from features, and those of their features."""
    lora_batches: list[tuple[Bytes, Floats]] = field(default_factory=list)
    """The digests and weights of calls with LoRAs."""
    decoded: int = 0
    encoded: list[Pixels] = field(default_factory=list)
    depths_estimated: int = 0
    clip_seeds: list[int] = field(default_factory=list)
    clip_targets: list[Floats] = field(default_factory=list)
    clip_error: Exception | None = None
    unet_gradients: int = 0
    classified: list[Pixels] = field(default_factory=list)
    score: Callable[[Pixels], float] = field(default=lambda picture: float(picture.mean()) / 255)
    safety_error: Exception | None = None
    running: int = 0
    loaded: list[str] = field(default_factory=list)
    unloaded: list[str] = field(default_factory=list)
    closed: bool = False

    @staticmethod
    def mean_of(text: str) -> float:
        """The latent value that a text means, -1 to 1; the empty text means 0."""
        return zlib.crc32(text.encode()) / 2**31 - 1 if text else 0.0

    @property
    def calls(self) -> int:
        return (
            len(self.texts)
            + len(self.batches)
            + self.decoded
            + len(self.encoded)
            + len(self.classified)
            + len(self.clip_seeds)
        )

    async def encode_text(
        self, engine: Engine, text: str, emphasis: tuple[Emphasis, ...], loras: tuple[Lora, ...] = ()
    ) -> EncodedText:
        self._fail()
        self.texts.append(text)
        self.text_loras.append(loras)
        await asyncio.sleep(self.encode_delay)
        tokens = len(text.split())
        chunks = max(1, -(-tokens // WORDS_A_CHUNK))
        factors = np.ones(max(len(text), 1))
        for part in emphasis:
            factors[part.start : part.end] = part.factor
        shape = chunks * engine.text_encoder.context_length, engine.text_encoder.width
        mean = self.mean_of(text)
        features = np.array([np.cos(mean), np.sin(mean)], np.float32)
        return EncodedText(np.full(shape, mean * factors.mean(), np.float32), tokens, chunks, features)

    async def predict(self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats) -> Floats:
        self._fail()
        assert latents.shape[1] == engine.unet_channels
        self.batches.append(len(latents))
        latents, conditioning = np.split(latents, [engine.latents.channels], axis=1)
        self.conditionings += list(conditioning)
        self.running += 1
        try:
            await asyncio.sleep(self.delay)
        finally:
            self.running -= 1
        # v-prediction (Salimans and Ho 2022): x = alpha x0 + sigma eps, v = (alpha x - x0) / sigma.
        alpha, sigma = self._alpha_and_sigma(engine, timesteps)
        means = text_states.mean(axis=(1, 2))[:, None, None, None]
        prediction = (alpha * latents - means) / sigma
        return np.full_like(latents, np.nan) if self.not_finite else prediction.astype(np.float32)

    async def predict_with_features(
        self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats
    ) -> Floats:
        """The features say the timestep in their first channel, and in the others what the text means."""
        assert engine.block_cache is not None
        self.whole += timesteps.tolist()
        prediction = await self.predict(engine, latents, timesteps, text_states)
        means = text_states.mean(axis=(1, 2))[:, None, None, None]
        rows, _, height, width = latents.shape
        features = np.broadcast_to(means, (rows, engine.block_cache.channels, height, width)).astype(np.float32)
        features[:, 0] = timesteps[:, None, None]
        return np.concatenate([prediction, features], axis=1)

    async def predict_from_features(
        self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats, features: Floats
    ) -> Floats:
        """As `predict`, of what the text of the features means."""
        self.cached += zip(timesteps.tolist(), features[:, 0, 0, 0].tolist(), strict=True)
        return await self.predict(engine, latents, timesteps, features[:, 1:2].mean(axis=(2, 3)).reshape(-1, 1, 1))

    async def predict_with_loras(
        self,
        engine: Engine,
        latents: Floats,
        timesteps: Floats,
        text_states: Floats,
        digests: Bytes,
        weights: Floats,
    ) -> Floats:
        """As `predict`, of texts that mean so much more as the weights' sum."""
        self.lora_batches.append((digests, weights))
        return await self.predict(engine, latents, timesteps, text_states + weights.sum(axis=1)[:, None, None])

    def _alpha_and_sigma(self, engine: Engine, timesteps: Floats) -> tuple[Floats, Floats]:
        assert engine.prediction_type == "v_prediction"
        schedule = engine.noise_schedule
        sigmas = np.array([schedule.sigma_at(float(timestep)) for timestep in timesteps])[:, None, None, None]
        return 1 / np.sqrt(sigmas**2 + 1), sigmas / np.sqrt(sigmas**2 + 1)

    async def decode(self, engine: Engine, latents: Floats) -> Pixels:
        self._fail()
        self.decoded += len(latents)
        scale = engine.latents.downsampling
        grey = np.clip(latents[:, :3] * 127 + 128, 0, 255).round().astype(np.uint8)
        return grey.repeat(scale, axis=2).repeat(scale, axis=3).transpose(0, 2, 3, 1)

    async def encode_image(self, engine: Engine, pixels: Pixels) -> Floats:
        """The inverse of `decode`: the mean of the pixels that a place of the latents stands for."""
        self._fail()
        self.encoded += list(pixels)
        scale = engine.latents.downsampling
        count, height, width, _ = pixels.shape
        cells = pixels[..., :3].reshape(count, height // scale, scale, width // scale, scale, 3).mean(axis=(2, 4))
        colours = ((cells - 128) / 127).transpose(0, 3, 1, 2)
        rest = np.zeros((count, engine.latents.channels - 3, *colours.shape[2:]))
        return np.asarray(np.concatenate([colours, rest], axis=1), np.float32)

    async def estimate_depth(self, engine: Engine, pixels: Pixels) -> Floats:
        """What is red is near."""
        self._fail()
        self.depths_estimated += len(pixels)
        return pixels[..., 0].astype(np.float32)

    async def classify(self, pictures: Pixels) -> Floats:
        self._fail()
        if self.safety_error is not None:
            raise self.safety_error
        self.classified += list(pictures)
        return np.array([[self.score(picture)] for picture in pictures], np.float32)

    async def clip_gradient(
        self, engine: Engine, latents: Floats, targets: Floats, seeds: Integers, cutouts: Integers
    ) -> Floats:
        """By a loss of half the squared distance to the latent value that the text means."""
        self._fail()
        self.clip_seeds += seeds.tolist()
        self.clip_targets += list(targets)
        if self.clip_error is not None:
            raise self.clip_error
        await asyncio.sleep(self.delay)
        gradients: Floats = latents - np.arctan2(targets[:, 1], targets[:, 0])[:, None, None, None]
        return gradients

    async def unet_gradient(
        self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats, gradients: Floats
    ) -> Floats:
        self._fail()
        self.unet_gradients += len(latents)
        # `predict` is linear in its latents.
        alpha, sigma = self._alpha_and_sigma(engine, timesteps)
        assert latents.shape[1] == engine.unet_channels
        return np.asarray(alpha / sigma * gradients, np.float32)

    async def load(self, engine: Engine) -> None:
        self._fail()
        self.loaded.append(engine.id)

    async def unload(self, engine: Engine) -> None:
        self._fail()
        self.unloaded.append(engine.id)

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

"""A backend whose calls are observed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdserver.backends import Backend, Bytes, EncodedText, Floats, Integers, Pixels
    from sdserver.engines import Engine
    from sdserver.observation import Observer
    from sdserver.request import Emphasis, Lora


class ObservedBackend:
    """Tells `observer` of every call of a model of `backend`, by the model's role."""

    def __init__(self, backend: Backend, observer: Observer) -> None:
        self._backend = backend
        self._observer = observer

    async def encode_text(
        self, engine: Engine, text: str, emphasis: tuple[Emphasis, ...], loras: tuple[Lora, ...] = ()
    ) -> EncodedText:
        with self._observer.model(engine.id, "text_encoder", 1):
            return await self._backend.encode_text(engine, text, emphasis, loras)

    async def predict(self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats) -> Floats:
        with self._observer.model(engine.id, "unet", len(latents)):
            return await self._backend.predict(engine, latents, timesteps, text_states)

    async def predict_with_features(
        self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats
    ) -> Floats:
        with self._observer.model(engine.id, "unet_cache", len(latents)):
            return await self._backend.predict_with_features(engine, latents, timesteps, text_states)

    async def predict_from_features(
        self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats, features: Floats
    ) -> Floats:
        with self._observer.model(engine.id, "unet_cache", len(latents)):
            return await self._backend.predict_from_features(engine, latents, timesteps, text_states, features)

    async def predict_with_loras(
        self,
        engine: Engine,
        latents: Floats,
        timesteps: Floats,
        text_states: Floats,
        digests: Bytes,
        weights: Floats,
    ) -> Floats:
        with self._observer.model(engine.id, "unet_lora", len(latents)):
            return await self._backend.predict_with_loras(engine, latents, timesteps, text_states, digests, weights)

    async def decode(self, engine: Engine, latents: Floats) -> Pixels:
        with self._observer.model(engine.id, "vae_decoder", len(latents)):
            return await self._backend.decode(engine, latents)

    async def encode_image(self, engine: Engine, pixels: Pixels) -> Floats:
        with self._observer.model(engine.id, "vae_encoder", len(pixels)):
            return await self._backend.encode_image(engine, pixels)

    async def estimate_depth(self, engine: Engine, pixels: Pixels) -> Floats:
        with self._observer.model(engine.id, "depth_estimator", len(pixels)):
            return await self._backend.estimate_depth(engine, pixels)

    async def classify(self, pictures: Pixels) -> Floats:
        with self._observer.model("", "safety", len(pictures)):
            return await self._backend.classify(pictures)

    async def clip_gradient(
        self, engine: Engine, latents: Floats, targets: Floats, seeds: Integers, cutouts: Integers
    ) -> Floats:
        with self._observer.model(engine.id, "clip_guidance", len(latents)):
            return await self._backend.clip_gradient(engine, latents, targets, seeds, cutouts)

    async def unet_gradient(
        self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats, gradients: Floats
    ) -> Floats:
        with self._observer.model(engine.id, "unet_gradient", len(latents)):
            return await self._backend.unet_gradient(engine, latents, timesteps, text_states, gradients)

    async def load(self, engine: Engine) -> None:
        await self._backend.load(engine)

    async def unload(self, engine: Engine) -> None:
        await self._backend.unload(engine)

    async def is_ready(self, engine: Engine) -> bool:
        return await self._backend.is_ready(engine)

    async def close(self) -> None:
        await self._backend.close()

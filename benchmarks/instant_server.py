"""The real server over models that answer at once, in a process of its own: `python -m benchmarks.instant_server`.

It prints its port. With `--hang`, UNet calls never end, so that generations wait for ever. With `--gpus`, they take
CALL_SECONDS, that many at a time.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING

import numpy as np
from sdserver import logs
from sdserver.backends import EncodedText
from sdserver.server import Server
from sdserver.settings import ServeSettings

if TYPE_CHECKING:
    from sdserver.backends import Bytes, Floats, Integers, Pixels
    from sdserver.engines import Engine
    from sdserver.request import Emphasis, Lora


CALL_SECONDS = 0.05


class Instant:
    """A backend without models."""

    def __init__(self, *, hang: bool, gpus: int) -> None:
        self._hang = hang
        self._gpus = asyncio.Semaphore(gpus) if gpus else None

    async def encode_text(
        self, engine: Engine, text: str, emphasis: tuple[Emphasis, ...], loras: tuple[Lora, ...] = ()
    ) -> EncodedText:
        shape = engine.text_encoder.context_length, engine.text_encoder.width
        return EncodedText(np.ones(shape, np.float32), 1, 1, np.ones(1, np.float32))

    async def predict(self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats) -> Floats:
        if self._hang:
            await asyncio.Event().wait()
        if self._gpus is not None:
            async with self._gpus:
                await asyncio.sleep(CALL_SECONDS)
        return latents

    async def predict_with_features(
        self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats
    ) -> Floats:
        raise NotImplementedError

    async def predict_from_features(
        self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats, features: Floats
    ) -> Floats:
        raise NotImplementedError

    async def predict_with_loras(
        self,
        engine: Engine,
        latents: Floats,
        timesteps: Floats,
        text_states: Floats,
        digests: Bytes,
        weights: Floats,
    ) -> Floats:
        raise NotImplementedError

    async def decode(self, engine: Engine, latents: Floats) -> Pixels:
        rows, _, height, width = latents.shape
        scale = engine.latents.downsampling
        return np.zeros((rows, height * scale, width * scale, 3), np.uint8)

    async def encode_image(self, engine: Engine, pixels: Pixels) -> Floats:
        raise NotImplementedError

    async def estimate_depth(self, engine: Engine, pixels: Pixels) -> Floats:
        raise NotImplementedError

    async def classify(self, pictures: Pixels) -> Floats:
        raise NotImplementedError

    async def clip_gradient(
        self, engine: Engine, latents: Floats, targets: Floats, seeds: Integers, cutouts: Integers
    ) -> Floats:
        raise NotImplementedError

    async def unet_gradient(
        self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats, gradients: Floats
    ) -> Floats:
        raise NotImplementedError

    async def load(self, engine: Engine) -> None:
        """There is nothing to load."""

    async def unload(self, engine: Engine) -> None:
        """There is nothing to unload."""

    async def is_ready(self, engine: Engine) -> bool:
        return True

    async def close(self) -> None:
        """There is nothing to close."""


async def serve(max_active: int, *, hang: bool, gpus: int) -> None:
    settings = ServeSettings(
        port=0, max_active=max_active, max_queued=2000, send_timeout_seconds=600, parallel_calls=gpus or 1
    )
    async with Server(settings, Instant(hang=hang, gpus=gpus)) as server:
        print(server.port, flush=True)
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-active", type=int, default=8)
    parser.add_argument("--hang", action="store_true")
    parser.add_argument("--gpus", type=int, default=0)
    arguments = parser.parse_args()
    # The port is the only line of standard output.
    logs.configure("error", "console")
    asyncio.run(serve(arguments.max_active, hang=arguments.hang, gpus=arguments.gpus))


if __name__ == "__main__":
    main()

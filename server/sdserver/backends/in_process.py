"""Models in this process, for machines that no Triton serves. The one place of the server that brings in torch."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import structlog

from sdserver.backends import EncodedText
from sdserver.errors import GenerationFailed, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sdmodels.text_encoder import TextEncoder
    from sdmodels.unet import UNet
    from sdmodels.vae import VaeDecoder

    from sdserver.backends import Floats, Pixels
    from sdserver.engines import Catalog, Engine
    from sdserver.request import Emphasis

log = structlog.get_logger()

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Models:
    text_encoder: TextEncoder
    unet: UNet
    vae_decoder: VaeDecoder


class InProcessBackend:
    """The same model code that Triton runs, one call at a time in a thread of its own."""

    def __init__(self, catalog: Catalog, model_repository: Path) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="models")
        self._models: dict[str, _Models] = {}
        loop = asyncio.get_running_loop()
        self._loading = [
            loop.run_in_executor(self._executor, self._load, engine, model_repository / "engines" / engine.id)
            for engine in catalog
        ]

    async def encode_text(self, engine: Engine, text: str, emphasis: tuple[Emphasis, ...]) -> EncodedText:
        ranges = [(part.start, part.end, part.factor) for part in emphasis]
        return EncodedText(*await self._run(engine, "text_encoder", self._loaded(engine).text_encoder, text, ranges))

    async def predict(self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats) -> Floats:
        return await self._run(engine, "unet", self._loaded(engine).unet, latents, timesteps, text_states)

    async def decode(self, engine: Engine, latents: Floats) -> Pixels:
        return await self._run(engine, "vae_decoder", self._loaded(engine).vae_decoder, latents)

    async def is_ready(self, engine: Engine) -> bool:
        return engine.id in self._models

    async def close(self) -> None:
        await asyncio.to_thread(self._executor.shutdown, cancel_futures=True)

    def _load(self, engine: Engine, folder: Path) -> None:
        try:
            # Spinning threads would starve the event loop of its core. OpenMP reads this when torch loads it.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            # Imported here: only this backend may bring torch into the server.
            from sdmodels.text_encoder import TextEncoder
            from sdmodels.unet import UNet
            from sdmodels.vae import VaeDecoder

            self._models[engine.id] = _Models(TextEncoder(folder), UNet(folder), VaeDecoder(folder))
        except Exception:
            log.exception("engine could not be loaded", engine=engine.id)

    def _loaded(self, engine: Engine) -> _Models:
        try:
            return self._models[engine.id]
        except KeyError:
            raise Unavailable(
                f"engine {engine.id} is still loading; retry later", "ENGINE_NOT_READY", engine=engine.id
            ) from None

    async def _run(self, engine: Engine, role: str, model: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        model_name = engine.model(role)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: model(*args, **kwargs))
        except Exception as error:
            raise GenerationFailed(
                f"{model_name} failed; the server's log says why", "MODEL_ERROR", model=model_name
            ) from error

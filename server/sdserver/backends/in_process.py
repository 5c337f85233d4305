"""Models in this process, for machines that no Triton serves. The one place of the server that brings in torch."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import structlog

from sdserver.backends import EncodedText
from sdserver.engines import LORA_ROLE
from sdserver.errors import GenerationFailed, Unavailable
from sdserver.lora_rows import lora_arrays
from sdserver.triton_models import parameters

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sdmodels.clip_guidance import ClipGuidance
    from sdmodels.depth import DepthEstimator
    from sdmodels.runtimes import Predict, PredictCached
    from sdmodels.safety import SafetyClassifier
    from sdmodels.text_encoder import TextEncoder
    from sdmodels.unet_gradient import UNetGradient
    from sdmodels.unet_lora import UNetLora
    from sdmodels.vae import VaeDecoder, VaeEncoder

    from sdserver.backends import Bytes, Floats, Integers, Pixels
    from sdserver.engines import Catalog, Engine
    from sdserver.request import Emphasis, Lora
    from sdserver.safety_model import SafetyModel

log = structlog.get_logger()

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Models:
    text_encoder: TextEncoder
    unet: Predict
    vae_decoder: VaeDecoder
    vae_encoder: VaeEncoder | None
    clip_guidance: ClipGuidance | None
    unet_gradient: UNetGradient | None
    unet_cache: PredictCached | None
    depth_estimator: DepthEstimator | None
    unet_lora: UNetLora | None


class InProcessBackend:
    """The same model code that Triton runs, one call at a time in a thread of its own.

    Of what `config.pbtxt` says, the UNet's precision and runtime and the decoder's precision hold here, too.
    """

    def __init__(self, catalog: Catalog, model_repository: Path, safety_model: SafetyModel | None = None) -> None:
        # Spinning threads would starve the event loop of its core. OpenMP reads this when torch loads it.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="models")
        self._repository = model_repository
        self._engines = model_repository / "engines"
        self._models: dict[str, _Models] = {}
        self._safety_model = safety_model
        self._classifier: SafetyClassifier | None = None
        loop = asyncio.get_running_loop()
        if safety_model is not None:
            folder = model_repository / "safety" / safety_model.id
            self._loading_safety = loop.run_in_executor(self._executor, self._load_safety_model, safety_model, folder)
        self._loading = [
            loop.run_in_executor(self._executor, self._load, engine, self._engines / engine.id) for engine in catalog
        ]

    async def encode_text(
        self, engine: Engine, text: str, emphasis: tuple[Emphasis, ...], loras: tuple[Lora, ...] = ()
    ) -> EncodedText:
        ranges = [(part.start, part.end, part.factor) for part in emphasis]
        encode = self._loaded(engine).text_encoder
        arrays = lora_arrays(loras, len(loras))
        return EncodedText(*await self._run(engine, "text_encoder", encode, text, ranges, *arrays))

    async def predict(self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats) -> Floats:
        return await self._run(engine, "unet", self._loaded(engine).unet, latents, timesteps, text_states)

    async def predict_with_features(
        self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats
    ) -> Floats:
        unet_cache = self._unet_cache(engine)
        return await self._run(engine, "unet_cache", unet_cache, latents, timesteps, text_states, None)

    async def predict_from_features(
        self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats, features: Floats
    ) -> Floats:
        unet_cache = self._unet_cache(engine)
        return await self._run(engine, "unet_cache", unet_cache, latents, timesteps, text_states, features)

    def _unet_cache(self, engine: Engine) -> PredictCached:
        unet_cache = self._loaded(engine).unet_cache
        assert unet_cache is not None
        return unet_cache

    async def predict_with_loras(
        self,
        engine: Engine,
        latents: Floats,
        timesteps: Floats,
        text_states: Floats,
        digests: Bytes,
        weights: Floats,
    ) -> Floats:
        unet_lora = self._loaded(engine).unet_lora
        assert unet_lora is not None
        return await self._run(engine, LORA_ROLE, unet_lora, latents, timesteps, text_states, digests, weights)

    async def decode(self, engine: Engine, latents: Floats) -> Pixels:
        return await self._run(engine, "vae_decoder", self._loaded(engine).vae_decoder, latents)

    async def encode_image(self, engine: Engine, pixels: Pixels) -> Floats:
        vae_encoder = self._loaded(engine).vae_encoder
        assert vae_encoder is not None
        return await self._run(engine, "vae_encoder", vae_encoder, pixels)

    async def estimate_depth(self, engine: Engine, pixels: Pixels) -> Floats:
        depth_estimator = self._loaded(engine).depth_estimator
        assert depth_estimator is not None
        return await self._run(engine, "depth_estimator", depth_estimator, pixels)

    async def classify(self, pictures: Pixels) -> Floats:
        assert self._safety_model is not None
        if self._classifier is None:
            raise Unavailable("the safety model is still loading; retry later", "ENGINE_NOT_READY")
        return await self._call(self._safety_model.model, self._classifier, pictures)

    async def clip_gradient(
        self, engine: Engine, latents: Floats, targets: Floats, seeds: Integers, cutouts: Integers
    ) -> Floats:
        clip_guidance = self._loaded(engine).clip_guidance
        assert clip_guidance is not None
        gradients, _ = await self._run(engine, "clip_guidance", clip_guidance, latents, targets, seeds, cutouts)
        return gradients

    async def unet_gradient(
        self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats, gradients: Floats
    ) -> Floats:
        unet_gradient = self._loaded(engine).unet_gradient
        assert unet_gradient is not None
        return await self._run(engine, "unet_gradient", unet_gradient, latents, timesteps, text_states, gradients)

    async def load(self, engine: Engine) -> None:
        def load() -> None:
            # Calls wait in one line: a load that came before this one has ended.
            models = self._models.get(engine.id)
            if models is None:
                self._load(engine, self._engines / engine.id)
            elif models.unet_lora is None and LORA_ROLE in engine.roles:
                self._load_loras(engine, models)

        await asyncio.get_running_loop().run_in_executor(self._executor, load)

    async def unload(self, engine: Engine) -> None:
        self._models.pop(engine.id, None)

    async def is_ready(self, engine: Engine) -> bool:
        models = self._models.get(engine.id)
        if models is None or (models.unet_lora is None and LORA_ROLE in engine.roles):
            return False
        return self._safety_model is None or self._classifier is not None

    async def close(self) -> None:
        await asyncio.to_thread(self._executor.shutdown, cancel_futures=True)

    def _load_safety_model(self, safety_model: SafetyModel, folder: Path) -> None:
        try:
            from sdmodels.safety import SafetyClassifier

            self._classifier = SafetyClassifier(folder)
        except Exception:
            log.exception("safety model could not be loaded", safety_model=safety_model.id)

    def _load(self, engine: Engine, folder: Path) -> None:
        try:
            # Imported here: only this backend may bring torch into the server.
            from sdmodels.clip_guidance import ClipGuidance
            from sdmodels.cores import physical_cores
            from sdmodels.depth import DepthEstimator
            from sdmodels.precision import chosen, decoder_precision
            from sdmodels.runtimes import load_unet, load_unet_cache, load_unet_lora
            from sdmodels.text_encoder import TextEncoder
            from sdmodels.unet_gradient import UNetGradient
            from sdmodels.vae import VaeDecoder, VaeEncoder

            self._models[engine.id] = _Models(
                TextEncoder(folder),
                load_unet(folder, physical_cores(), *self._options(engine, "unet")),
                VaeDecoder(folder, precision=chosen(self._options(engine, "vae_decoder")[1], "cpu", decoder_precision)),
                VaeEncoder(folder) if "vae_encoder" in engine.optional_roles else None,
                ClipGuidance(folder) if "clip_guidance" in engine.optional_roles else None,
                UNetGradient(folder) if "unet_gradient" in engine.optional_roles else None,
                load_unet_cache(folder, physical_cores(), *self._options(engine, "unet_cache"))
                if "unet_cache" in engine.optional_roles
                else None,
                DepthEstimator(folder) if "depth_estimator" in engine.optional_roles else None,
                load_unet_lora(folder, physical_cores()) if LORA_ROLE in engine.roles else None,
            )
        except Exception:
            log.exception("engine could not be loaded", engine=engine.id)

    def _options(self, engine: Engine, role: str) -> tuple[str, str]:
        """Runtime and precision of a model."""
        path = self._repository / engine.model(role) / "config.pbtxt"
        said = parameters(path.read_text(encoding="utf-8")) if path.exists() else {}
        return said.get("runtime", ""), said.get("precision", "")

    def _load_loras(self, engine: Engine, models: _Models) -> None:
        """Adds to an engine's models what its first LoRA needs."""
        try:
            from sdmodels.cores import physical_cores
            from sdmodels.runtimes import load_unet_lora

            unet_lora = load_unet_lora(self._engines / engine.id, physical_cores())
            self._models[engine.id] = replace(models, unet_lora=unet_lora)
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
        return await self._call(engine.model(role), model, *args, **kwargs)

    async def _call(self, model_name: str, model: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: model(*args, **kwargs))
        except Exception as error:
            raise GenerationFailed(
                f"{model_name} failed; the server's log says why", "MODEL_ERROR", model=model_name
            ) from error

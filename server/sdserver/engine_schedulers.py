"""The step schedulers of one engine: one for each of its models whose rows can share a call."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdserver.block_cache import BlockCache
from sdserver.clip_guidance import ClipGuide
from sdserver.lora_rows import LoraRows
from sdserver.step_scheduler import StepScheduler

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType
    from typing import Self

    from sdserver.backends import Backend
    from sdserver.cost_model import CostModel
    from sdserver.engines import Engine
    from sdserver.observation import Observer, StepModel
    from sdserver.request import GenerationRequest

Array = NDArray[np.float32]

# Of one call. Where there is no shared memory, they and the rest of it have to fit into one message to Triton.
MOST_FEATURE_BYTES = 128 * 2**20


class EngineSchedulers:
    """Batches what generations ask of an engine; the models work at the same time, each on its own batch.

    Used as an async context manager, as `StepScheduler`.
    """

    def __init__(
        self,
        engine: Engine,
        backend: Backend,
        costs: CostModel | None,
        observer: Observer,
        parallel_calls: int = 1,
    ) -> None:
        self._engine = engine
        self._observer = observer
        self._parallel_calls = parallel_calls
        self._schedulers: list[StepScheduler] = []
        self.unet = self._scheduler("unet", backend.predict, partial(unet_rows, engine, costs))
        """Takes `step_scheduler.Row`s."""
        # Also where there are no LoRAs yet: they come while the engine runs.
        self._unet_lora = self._scheduler("unet_lora", backend.predict_with_loras, partial(unet_rows, engine, costs))
        self.vae_decoder = self._scheduler("vae_decoder", backend.decode, partial(decoder_rows, engine))
        """Takes latents [C, h, w], gives pixels [H, W, 3]."""
        self.vae_encoder: StepScheduler | None = None
        """Takes pixels [3 or 4, H, W], gives latents [C, h, w]."""
        self.depth_estimator: StepScheduler | None = None
        """Takes pixels [3, H, W], gives depths."""
        self._clip_gradient: StepScheduler | None = None
        self._unet_gradient: StepScheduler | None = None
        if "vae_encoder" in engine.optional_roles:
            self.vae_encoder = self._scheduler(
                "vae_encoder",
                lambda engine, pixels: backend.encode_image(engine, np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))),
                partial(most_rows, engine, engine.latents.downsampling**2),
            )
        if "depth_estimator" in engine.optional_roles:
            # One row a call: it costs less than a step of the UNet, and is wanted once a request.
            self.depth_estimator = self._scheduler(
                "depth_estimator",
                lambda engine, pixels: backend.estimate_depth(
                    engine, np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
                ),
                lambda places: 1,
            )
        if engine.clip_guidance is not None:
            clip_rows = partial(most_rows, engine, engine.clip_guidance.max_batch_rows)
            self._clip_gradient = self._scheduler("clip_guidance", backend.clip_gradient, clip_rows)
            if "unet_gradient" in engine.optional_roles:
                self._unet_gradient = self._scheduler("unet_gradient", backend.unet_gradient, clip_rows)
        self._with_features: StepScheduler | None = None
        self._from_features: StepScheduler | None = None
        if engine.block_cache is not None:
            rows = partial(cached_rows, engine, costs, engine.block_cache.channels)
            self._with_features = self._scheduler("unet_with_features", backend.predict_with_features, rows)
            self._from_features = self._scheduler("unet_from_features", backend.predict_from_features, rows)
        self._stack = AsyncExitStack()

    def _scheduler(
        self, role: StepModel, model: Callable[..., Awaitable[NDArray[Any]]], rows: Callable[[int], int]
    ) -> StepScheduler:
        scheduler = StepScheduler(
            partial(model, self._engine), rows, self._observer.steps(self._engine.id, role), self._parallel_calls
        )
        self._schedulers.append(scheduler)
        return scheduler

    async def __aenter__(self) -> Self:
        for scheduler in self._schedulers:
            await self._stack.enter_async_context(scheduler)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def unet_of(self, request: GenerationRequest) -> StepScheduler | LoraRows:
        """Who predicts a request's `step_scheduler.Row`s: the plain UNet, unless LoRAs change it."""
        loras = [lora for lora in request.loras if lora.weight != 0 and lora.info.unet_modules]
        return LoraRows(self._unet_lora, loras) if loras else self.unet

    def clip_guide(
        self, request: GenerationRequest, target: Array | None
    ) -> Callable[[Callable[[], int]], ClipGuide] | None:
        """Makes a `ClipGuide` towards text features [E] from cutout seeds; None without CLIP guidance."""
        options = request.clip_guidance
        if options is None or target is None or self._clip_gradient is None:
            return None
        unet_gradient = self._unet_gradient if options.exact else None
        return partial(ClipGuide, options, target, self._clip_gradient, unet_gradient, request.tenant)

    def block_cache(self, request: GenerationRequest) -> BlockCache | None:
        """A cache for one pass of an image; None without block caching."""
        if request.block_cache_interval == 1 or self._with_features is None or self._from_features is None:
            return None
        return BlockCache(
            *(request.block_cache_interval, self._with_features, self._from_features),
            *(request.tenant, self._engine.latents.channels),
        )


def cached_rows(engine: Engine, costs: CostModel | None, channels: int, places: int) -> int:
    """The most rows of so many places in a call of the UNet that gives or takes features of so many channels."""
    most = MOST_FEATURE_BYTES // (channels * places * np.dtype(np.float32).itemsize)
    return max(1, min(unet_rows(engine, costs, places), most))


def unet_rows(engine: Engine, costs: CostModel | None, places: int) -> int:
    """The most rows of so many places in a call of the UNet: as many as may be, and as pay where costs are known."""
    most = most_rows(engine, engine.max_batch_rows, places)
    return most if costs is None else min(most, costs.worthwhile_rows(places))


def decoder_rows(engine: Engine, places: int) -> int:
    """The most rows of so many places in a call of the VAE's decoder."""
    # Few: it computes them one by one, and who has his answer need not wait for others.
    return most_rows(engine, 1, places)


def most_rows(engine: Engine, native: int, places: int) -> int:
    """How many rows of so many places are no more work than `native` rows of the native size; at least 1."""
    scale = engine.latents.downsampling
    native_places = (engine.native_width // scale) * (engine.native_height // scale)
    return max(1, min(native * native_places // places, engine.max_batch_rows))

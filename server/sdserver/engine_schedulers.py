"""The step schedulers of one engine: one for each of its models that denoising asks."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdserver.clip_guidance import ClipGuide
from sdserver.step_scheduler import StepScheduler

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from sdserver.backends import Backend
    from sdserver.engines import Engine
    from sdserver.request import ClipGuidance

Array = NDArray[np.float32]


class EngineSchedulers:
    """Batches what generations ask of an engine; the models work at the same time, each on its own batch.

    Used as an async context manager, as `StepScheduler`.
    """

    def __init__(self, engine: Engine, backend: Backend) -> None:
        self.unet = StepScheduler(partial(backend.predict, engine), engine.max_batch_rows)
        """Takes `step_scheduler.Row`s."""
        self._clip_gradient: StepScheduler | None = None
        self._unet_gradient: StepScheduler | None = None
        if engine.clip_guidance is not None:
            rows = engine.clip_guidance.max_batch_rows
            self._clip_gradient = StepScheduler(partial(backend.clip_gradient, engine), rows)
            if "unet_gradient" in engine.optional_roles:
                self._unet_gradient = StepScheduler(partial(backend.unet_gradient, engine), rows)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for scheduler in (self.unet, self._clip_gradient, self._unet_gradient):
            if scheduler is not None:
                await self._stack.enter_async_context(scheduler)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def clip_guide(
        self, options: ClipGuidance | None, target: Array | None
    ) -> Callable[[Callable[[], int]], ClipGuide] | None:
        """Makes a `ClipGuide` towards text features [E] from cutout seeds; None without CLIP guidance."""
        if options is None or target is None or self._clip_gradient is None:
            return None
        return partial(ClipGuide, options, target, self._clip_gradient, self._unet_gradient if options.exact else None)

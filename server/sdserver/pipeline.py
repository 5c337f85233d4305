"""The life of a request: a place, text states, the work, its events in order."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdserver.errors import InvalidRequest, TimeLimit
from sdserver.generation import Generation
from sdserver.guidance import Guidance, blend
from sdserver.outbox import Outbox
from sdserver.request import Accepted, Event, GenerationRequest, PromptUsage
from sdserver.step_scheduler import StepScheduler
from sdserver.text_cache import TextCache

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterable
    from types import TracebackType
    from typing import Self

    from sdserver.admission import Admission
    from sdserver.backends import Backend
    from sdserver.engines import Engine

Array = NDArray[np.float32]


class Pipeline:
    """Runs generations on a backend, with one step scheduler for each engine.

    Used as an async context manager. A generation costs nothing any more once its iterator is closed.
    """

    def __init__(
        self,
        engines: Iterable[Engine],
        backend: Backend,
        admission: Admission,
        max_generation_seconds: float,
        text_cache_bytes: int,
    ) -> None:
        self._backend = backend
        self._texts = TextCache(backend, text_cache_bytes)
        self._admission = admission
        self._max_generation_seconds = max_generation_seconds
        self._schedulers = {engine.id: _scheduler(engine, backend) for engine in engines}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._stack.push_async_callback(self._texts.close)
        for scheduler in self._schedulers.values():
            await self._stack.enter_async_context(scheduler)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """The events of a generation. Raises a RequestError; closing the iterator stops the work within a step.

        The work goes on while a reader is slow; of the progress it then sees only the latest.
        """
        with self._admission.enter() as place:
            arrival = time.monotonic()
            async with self._time_limit():
                guidance, prompt_usage = await self._encode(request)
            encoded = time.monotonic()
            yield Accepted(request, place.position, prompt_usage)
            await place.started()
            outbox = Outbox()
            scheduler = self._schedulers[request.engine.id]
            generation = Generation(request, guidance, self._backend, scheduler, outbox, arrival, encoded)
            work = asyncio.create_task(self._run(generation, outbox), name=f"generation {request.request_id}")
            try:
                async with aclosing(outbox.events()) as events:
                    async for event in events:
                        yield event
                await work
            finally:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)

    async def _encode(self, request: GenerationRequest) -> tuple[Guidance, tuple[PromptUsage, ...]]:
        engine, prompts = request.engine, request.prompts
        empty, *encoded = await asyncio.gather(
            self._texts.encode_text(engine, "", ()),
            *(self._texts.encode_text(engine, prompt.text, prompt.emphasis) for prompt in prompts),
        )
        most = engine.limits.max_prompt_chunks
        too_long = {
            f"prompts[{index}].text": f"{text.tokens} tokens make {text.chunks} chunks; engine {engine.id} takes at "
            f"most {most} of {engine.text_encoder.context_length - 2} tokens, so shorten it or split it into several "
            "prompts"
            for index, text in enumerate(encoded)
            if text.chunks > most
        }
        if too_long:
            raise InvalidRequest(too_long)
        used = [
            (text.states, prompt.weight) for text, prompt in zip(encoded, prompts, strict=True) if prompt.weight != 0
        ]
        guidance = blend(
            [states for states, _ in used],
            [weight for _, weight in used],
            empty.states,
            request.blending,
            request.guidance_scale,
            request.guidance_interval,
        )
        return guidance, tuple(PromptUsage(text.tokens, text.chunks) for text in encoded)

    async def _run(self, generation: Generation, outbox: Outbox) -> None:
        try:
            async with self._time_limit():
                await generation.run()
        finally:
            outbox.close()

    @asynccontextmanager
    async def _time_limit(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._max_generation_seconds) as limit:
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise TimeLimit(
                f"the generation took longer than this server's limit of {self._max_generation_seconds:g} s; "
                "ask for fewer steps, fewer images or a smaller size"
            ) from error


def _scheduler(engine: Engine, backend: Backend) -> StepScheduler:
    async def unet(latents: Array, timesteps: Array, text_states: Array) -> Array:
        return await backend.predict(engine, latents, timesteps, text_states)

    return StepScheduler(unet, engine.max_batch_rows)

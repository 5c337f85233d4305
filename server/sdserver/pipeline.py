"""The life of a request: a place, text states, the work, its events in order."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdserver.clip_guidance import blended_features
from sdserver.engine_pool import EnginePool
from sdserver.errors import InvalidRequest, TimeLimit
from sdserver.generation import Generation
from sdserver.guidance import Guidance, blend
from sdserver.observation import CURRENT_WORK, Observer, Work
from sdserver.outbox import Outbox
from sdserver.request import Accepted, Event, GenerationRequest, PromptUsage
from sdserver.text_cache import TextCache

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
    from types import TracebackType
    from typing import Self

    from sdserver.admission import Admission
    from sdserver.backends import Backend, EncodedText
    from sdserver.cost_model import CostModel
    from sdserver.engines import Engine
    from sdserver.image_writer import ImageWriter
    from sdserver.safety import SafetyCheck

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
        writer: ImageWriter,
        safety: SafetyCheck | None = None,
        observer: Observer | None = None,
        costs: Callable[[Engine], CostModel | None] = lambda engine: None,
        parallel_calls: int = 1,
    ) -> None:
        self._observer = observer or Observer()
        self._writer = writer
        self._safety = safety
        self._texts = TextCache(backend, text_cache_bytes, self._observer)
        self._admission = admission
        self._max_generation_seconds = max_generation_seconds
        self._engines = tuple(engines)
        self.pool = EnginePool(backend, costs, self._observer, parallel_calls)
        """The engines that requests may use; it may change while they run."""
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._stack.push_async_callback(self._texts.close)
        await self._stack.enter_async_context(self.pool)
        for engine in self._engines:
            await self.pool.open(engine)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """The events of a generation. Raises a RequestError; closing the iterator stops the work within a step.

        The work goes on while a reader is slow; of the progress it then sees only the latest.
        """
        with self._admission.enter(request.tenant) as place, self.pool.use(request.engine) as schedulers:
            arrival = time.monotonic()
            async with self._time_limit():
                with self._observer.stage(request.engine.id, "encode"):
                    guidance, target, prompt_usage = await self._encode(request)
            encoded = time.monotonic()
            yield Accepted(request, place.position, prompt_usage)
            if place.position > 0:
                # A thousand that wait would hold hundreds of megabytes of text states.
                del guidance, target
            with self._observer.stage(request.engine.id, "queue"):
                await place.started()
            if place.position > 0:
                async with self._time_limit():
                    guidance, target, _ = await self._encode(request)
            outbox = Outbox()
            clip_guide = schedulers.clip_guide(request, target)
            generation = Generation(
                *(request, guidance, schedulers, clip_guide, self._writer, self._safety),
                *(outbox, arrival, encoded, self._observer),
            )
            work = asyncio.create_task(self._run(generation, outbox), name=f"generation {request.request_id}")
            try:
                async with aclosing(outbox.events()) as events:
                    async for event in events:
                        yield event
                await work
            finally:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)

    async def _encode(self, request: GenerationRequest) -> tuple[Guidance, Array | None, tuple[PromptUsage, ...]]:
        """Guidance, the text features of CLIP guidance, and how long each prompt is."""
        engine, prompts, clip = request.engine, request.prompts, request.clip_guidance
        texts = {f"prompts[{index}].text": (prompt.text, prompt.emphasis) for index, prompt in enumerate(prompts)}
        if clip is not None and clip.prompt:
            texts["clip_guidance.prompt"] = clip.prompt, ()
        empty, *encoded = await asyncio.gather(
            self._texts.encode_text(engine, "", (), request.loras),
            *(self._texts.encode_text(engine, text, emphasis, request.loras) for text, emphasis in texts.values()),
        )
        most = engine.limits.max_prompt_chunks
        too_long = {
            path: f"{text.tokens} tokens make {text.chunks} chunks; engine {engine.id} takes at "
            f"most {most} of {engine.text_encoder.context_length - 2} tokens, so shorten it or split it into several "
            "prompts"
            for path, text in zip(texts, encoded, strict=True)
            if text.chunks > most
        }
        if too_long:
            raise InvalidRequest(too_long)
        # Only the last one can be no prompt.
        of_prompts = list(zip(encoded, prompts, strict=False))
        used = [(text.states, prompt.weight) for text, prompt in of_prompts if prompt.weight != 0]
        guidance = blend(
            [states for states, _ in used],
            [weight for _, weight in used],
            empty.states,
            request.blending,
            request.guidance_scale,
            request.guidance_interval,
        )
        wanted = [] if clip is None else [(text, p.weight) for text, p in of_prompts if p.weight > 0]
        if clip is not None and clip.prompt:
            wanted = [(encoded[-1], 1.0)]
        target = blended_features([(_features(text), weight) for text, weight in wanted]) if wanted else None
        return guidance, target, tuple(PromptUsage(text.tokens, text.chunks) for text, _ in of_prompts)

    async def _run(self, generation: Generation, outbox: Outbox) -> None:
        CURRENT_WORK.set(Work())
        try:
            async with self._time_limit():
                await generation.run()
        finally:
            self._observer.spent(generation.request.tenant, generation.pixel_steps)
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


def _features(text: EncodedText) -> Array:
    """Its features, which every text of an engine with CLIP guidance has."""
    assert text.features is not None
    return text.features

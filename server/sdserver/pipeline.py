"""The life of a generation: a place, text states, noise, denoising steps, pixels, files."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdserver import images
from sdserver.errors import GenerationFailed, InvalidRequest, TimeLimit
from sdserver.guidance import Guidance, blend, rescaled
from sdserver.noise import ImageNoise
from sdserver.parameterization import c_in, denoised, initial_latents
from sdserver.request import (
    Accepted,
    Event,
    Finished,
    GenerationRequest,
    Image,
    Preview,
    Progress,
    PromptUsage,
    Timings,
    Usage,
)
from sdserver.samplers import SAMPLERS, noise_options
from sdserver.step_scheduler import Row, StepScheduler
from sdserver.text_cache import TextCache

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterable
    from types import TracebackType
    from typing import Self

    from sdserver.admission import Admission
    from sdserver.backends import Backend
    from sdserver.engines import Engine
    from sdserver.samplers import Query, Sampler

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
            outbox = _Outbox()
            scheduler = self._schedulers[request.engine.id]
            generation = _Generation(request, guidance, self._backend, scheduler, outbox, arrival, encoded)
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

    async def _run(self, generation: _Generation, outbox: _Outbox) -> None:
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


class _Outbox:
    """Events on their way to the caller. A new progress, or an image's new preview, replaces an unread one."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._changed = asyncio.Event()
        self._closed = False

    def put(self, event: Event) -> None:
        stale = next((other for other in self._events if _replaces(event, other)), None)
        if stale is not None:
            self._events.remove(stale)
        self._events.append(event)
        self._changed.set()

    def close(self) -> None:
        self._closed = True
        self._changed.set()

    async def events(self) -> AsyncGenerator[Event, None]:
        while True:
            while self._events:
                yield self._events.popleft()
            if self._closed:
                return
            self._changed.clear()
            await self._changed.wait()


def _replaces(event: Event, unread: Event) -> bool:
    match event, unread:
        case Progress(), Progress():
            return True
        case Preview(), Preview():
            return event.index == unread.index
    return False


@dataclass(slots=True, eq=False)
class _Generation:
    """The work of one request, from text states to files."""

    request: GenerationRequest
    guidance: Guidance
    backend: Backend
    scheduler: StepScheduler
    outbox: _Outbox
    arrival: float
    encoded: float
    unet_rows: int = 0
    completed: dict[int, int] = field(default_factory=dict)

    async def run(self) -> None:
        request = self.request
        started = time.monotonic()
        self.completed = dict.fromkeys(range(request.image_count), 0)
        self.outbox.put(Progress(0, request.steps))
        tasks: list[asyncio.Task[float]] = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._image(index)) for index in range(request.image_count)]
        except ExceptionGroup as failures:
            # One failure ends the request; its siblings were cancelled.
            raise failures.exceptions[0] from None
        denoised_at = max(task.result() for task in tasks)
        finished = time.monotonic()
        width, height = request.engine.padded_size(request.width, request.height)
        self.outbox.put(
            Finished(
                Usage(request.image_count, self.unet_rows, self.unet_rows * width * height),
                Timings(
                    queue=started - self.encoded,
                    encode=self.encoded - self.arrival,
                    denoise=denoised_at - started,
                    decode=finished - denoised_at,
                    total=finished - self.arrival,
                ),
            )
        )

    async def _image(self, index: int) -> float:
        """Makes one image; returns when its denoising ended, on the monotonic clock."""
        request, engine = self.request, self.request.engine
        width, height = engine.padded_size(request.width, request.height)
        scale = engine.latents.downsampling
        shape = engine.latents.channels, height // scale, width // scale
        noise = ImageNoise(request.seeds[index])
        sigmas = engine.sigmas(request.schedule, request.steps)
        start = initial_latents(noise.initial(shape), sigmas[0])
        options = {name: getattr(request, name) for name in noise_options(request.sampler)}
        sampler = SAMPLERS[request.sampler](start, sigmas, noise.steps(shape), **options)
        latents = await self._denoise(index, sampler)
        denoised_at = time.monotonic()
        if not np.isfinite(latents).all():
            raise GenerationFailed(
                f"image {index} is not finite: the model overflowed; try another sampler or a lower guidance_scale",
                "NOT_FINITE",
            )
        pixels = await self.backend.decode(engine, latents[None])
        cropped = images.crop(pixels[0], request.width, request.height)
        data = await asyncio.to_thread(images.encode, cropped, request.output)
        self.outbox.put(
            Image(index, request.seeds[index], data, request.output.media_type, request.width, request.height)
        )
        return denoised_at

    async def _denoise(self, index: int, sampler: Sampler) -> Array:
        """Drives a sampler to its end; cancelling it falls between evaluations."""
        try:
            query = next(sampler)
            while True:
                x0 = await self._guided(query)
                step = query.step
                query = sampler.send(x0)
                if query.step > step:
                    self._completed(index, step)
                    self._preview(index, step, x0)
        except StopIteration as end:
            self._completed(index, self.request.steps)
            latents: Array = end.value
            return latents

    async def _guided(self, query: Query) -> Array:
        """x0 as the sum of the rows' predictions; rows that add nothing are not computed."""
        request, guidance, engine = self.request, self.guidance, self.request.engine
        forms = [guidance.coefficients(query.step, request.steps)]
        if request.guidance_rescale != 0 and forms[0] != guidance.conditional:
            forms.append(guidance.conditional)
        weights = np.array(forms, np.float32)
        used = np.flatnonzero(weights.any(axis=0))
        timestep = engine.noise_schedule.timestep(query.sigma)
        latents = query.x * c_in(query.sigma)
        rows = [Row(latents, timestep, guidance.text_states[row]) for row in used]
        predictions = await self.scheduler.predict(rows)
        self.unet_rows += len(rows)
        # x0 is affine in the prediction and the weights sum to 1, so guiding the predictions is guiding x0.
        prediction, *conditional = np.tensordot(weights[:, used], predictions, axes=1)
        if conditional:
            prediction = rescaled(prediction, conditional[0], request.guidance_rescale)
        return denoised(prediction, query.x, query.sigma, engine.prediction_type)

    def _preview(self, index: int, step: int, x0: Array) -> None:
        request, preview_map = self.request, self.request.engine.preview_map
        if preview_map is None or request.preview_every_steps is None or step % request.preview_every_steps:
            return
        scale = request.engine.latents.downsampling
        width, height = -(-request.width // scale), -(-request.height // scale)
        pixels = images.crop(images.preview(x0, preview_map), width, height)
        data = images.encode(pixels, images.PREVIEW_OUTPUT)
        self.outbox.put(Preview(index, step, data, images.PREVIEW_OUTPUT.media_type, width, height))

    def _completed(self, index: int, step: int) -> None:
        before = min(self.completed.values())
        self.completed[index] = step
        if (now := min(self.completed.values())) > before:
            self.outbox.put(Progress(now, self.request.steps))

"""The life of a generation: a place, text states, noise, denoising steps, pixels, files."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdserver import images
from sdserver.errors import GenerationFailed, InvalidRequest, TimeLimit
from sdserver.guidance import Guidance, blend
from sdserver.noise import ImageNoise
from sdserver.parameterization import c_in, denoised, initial_latents
from sdserver.request import Accepted, Event, Finished, GenerationRequest, Image, Progress, Timings, Usage
from sdserver.samplers import SAMPLERS
from sdserver.step_scheduler import Row, StepScheduler

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable
    from types import TracebackType
    from typing import Self

    from sdserver.admission import Admission
    from sdserver.backends import Backend
    from sdserver.engines import Engine
    from sdserver.samplers import Sampler

Array = NDArray[np.float32]


class Pipeline:
    """Runs generations on a backend, with one step scheduler for each engine.

    Used as an async context manager. A generation costs nothing any more once its iterator is closed.
    """

    def __init__(
        self, engines: Iterable[Engine], backend: Backend, admission: Admission, max_generation_seconds: float
    ) -> None:
        self._backend = backend
        self._admission = admission
        self._max_generation_seconds = max_generation_seconds
        self._schedulers = {engine.id: _scheduler(engine, backend) for engine in engines}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
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
            yield Accepted(request, place.position)
            arrival = time.monotonic()
            await place.started()
            outbox = _Outbox()
            generation = _Generation(request, self._backend, self._schedulers[request.engine.id], outbox, arrival)
            work = asyncio.create_task(self._run(generation, outbox), name=f"generation {request.request_id}")
            try:
                async with aclosing(outbox.events()) as events:
                    async for event in events:
                        yield event
                await work
            finally:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)

    async def _run(self, generation: _Generation, outbox: _Outbox) -> None:
        try:
            async with asyncio.timeout(self._max_generation_seconds) as limit:
                await generation.run()
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise TimeLimit(
                f"the generation took longer than this server's limit of {self._max_generation_seconds:g} s; "
                "ask for fewer steps, fewer images or a smaller size"
            ) from error
        finally:
            outbox.close()


def _scheduler(engine: Engine, backend: Backend) -> StepScheduler:
    async def unet(latents: Array, timesteps: Array, text_states: Array) -> Array:
        return await backend.predict(engine, latents, timesteps, text_states)

    return StepScheduler(unet, engine.max_batch_rows)


class _Outbox:
    """Events on their way to the caller. A new progress replaces one that has not been read."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._changed = asyncio.Event()
        self._closed = False

    def put(self, event: Event) -> None:
        if isinstance(event, Progress) and self._events and isinstance(self._events[-1], Progress):
            self._events.pop()
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


@dataclass(slots=True, eq=False)
class _Generation:
    """The work of one request, from text to files."""

    request: GenerationRequest
    backend: Backend
    scheduler: StepScheduler
    outbox: _Outbox
    arrival: float
    unet_rows: int = 0
    completed: dict[int, int] = field(default_factory=dict)

    async def run(self) -> None:
        request = self.request
        started = time.monotonic()
        guidance = await self._encode()
        encoded = time.monotonic()
        self.completed = dict.fromkeys(range(request.image_count), 0)
        self.outbox.put(Progress(0, request.steps))
        tasks: list[asyncio.Task[float]] = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._image(index, guidance)) for index in range(request.image_count)]
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
                    queue=started - self.arrival,
                    encode=encoded - started,
                    denoise=denoised_at - encoded,
                    decode=finished - denoised_at,
                    total=finished - self.arrival,
                ),
            )
        )

    async def _encode(self) -> Guidance:
        request, engine = self.request, self.request.engine
        prompts = [prompt for prompt in request.prompts if prompt.weight != 0]
        text_states, token_counts = await self.backend.encode_text(engine, ["", *(prompt.text for prompt in prompts)])
        counts = dict(zip((prompt.text for prompt in prompts), token_counts[1:], strict=True))
        too_long = {
            f"prompts[{index}].text": f"{counts[prompt.text]} tokens; engine {engine.id} takes at most "
            f"{engine.max_prompt_tokens}, so shorten it or split it into several prompts"
            for index, prompt in enumerate(request.prompts)
            if prompt.weight != 0 and counts[prompt.text] > engine.max_prompt_tokens
        }
        if too_long:
            raise InvalidRequest(too_long)
        return blend(
            text_states[1:],
            [prompt.weight for prompt in prompts],
            text_states[0],
            request.blending,
            request.guidance_scale,
            request.guidance_interval,
        )

    async def _image(self, index: int, guidance: Guidance) -> float:
        """Makes one image; returns when its denoising ended, on the monotonic clock."""
        request, engine = self.request, self.request.engine
        width, height = engine.padded_size(request.width, request.height)
        scale = engine.latents.downsampling
        shape = engine.latents.channels, height // scale, width // scale
        noise = ImageNoise(request.seed + index)
        sigmas = engine.sigmas(request.schedule, request.steps)
        start = initial_latents(noise.initial(shape), sigmas[0])
        sampler = SAMPLERS[request.sampler](start, sigmas, noise.steps(shape))
        latents = await self._denoise(index, sampler, guidance)
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
            Image(index, request.seed + index, data, request.output.media_type, request.width, request.height)
        )
        return denoised_at

    async def _denoise(self, index: int, sampler: Sampler, guidance: Guidance) -> Array:
        """Drives a sampler to its end; cancelling it falls between evaluations."""
        try:
            query = next(sampler)
            while True:
                coefficients = guidance.coefficients(query.step, self.request.steps)
                x0 = await self._guided(query.x, query.sigma, coefficients, guidance.text_states)
                step = query.step
                query = sampler.send(x0)
                if query.step > step:
                    self._completed(index, step)
        except StopIteration as end:
            self._completed(index, self.request.steps)
            latents: Array = end.value
            return latents

    async def _guided(self, x: Array, sigma: float, coefficients: tuple[float, ...], text_states: Array) -> Array:
        """x0 as the sum of the rows' predictions; rows that add nothing are not computed."""
        engine = self.request.engine
        timestep = engine.noise_schedule.timestep(sigma)
        latents = x * c_in(sigma)
        used = [(weight, states) for weight, states in zip(coefficients, text_states, strict=True) if weight != 0]
        predictions = await self.scheduler.predict([Row(latents, timestep, states) for _, states in used])
        self.unet_rows += len(used)
        weights = np.array([weight for weight, _ in used], np.float32)
        # x0 is affine in the prediction and the weights sum to 1, so guiding the predictions is guiding x0.
        prediction = np.tensordot(weights, predictions, axes=1)
        return denoised(prediction, x, sigma, engine.prediction_type)

    def _completed(self, index: int, step: int) -> None:
        before = min(self.completed.values())
        self.completed[index] = step
        if (now := min(self.completed.values())) > before:
            self.outbox.put(Progress(now, self.request.steps))

"""The work of one request once it has its place: noise, denoising steps, pixels, files."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdserver import images
from sdserver.denoiser import Denoiser
from sdserver.errors import GenerationFailed
from sdserver.noise import ImageNoise
from sdserver.parameterization import initial_latents
from sdserver.request import Finished, Image, Preview, Progress, Timings, Usage
from sdserver.samplers import SAMPLERS, noise_options

if TYPE_CHECKING:
    from sdserver.backends import Backend
    from sdserver.guidance import Guidance
    from sdserver.outbox import Outbox
    from sdserver.request import GenerationRequest
    from sdserver.samplers import Sampler
    from sdserver.step_scheduler import StepScheduler

Array = NDArray[np.float32]


@dataclass(slots=True, eq=False)
class Generation:
    """The work of one request, from text states to files."""

    request: GenerationRequest
    guidance: Guidance
    backend: Backend
    scheduler: StepScheduler
    outbox: Outbox
    arrival: float
    encoded: float
    denoisers: list[Denoiser] = field(default_factory=list)
    completed: dict[int, int] = field(default_factory=dict)

    async def run(self) -> None:
        """Does the work and puts its events, but for Accepted. Raises a RequestError."""
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
        self.outbox.put(
            Finished(
                Usage(
                    request.image_count,
                    sum(denoiser.unet_rows for denoiser in self.denoisers),
                    sum(denoiser.pixel_steps for denoiser in self.denoisers),
                ),
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
        denoiser = Denoiser(self.request, self.guidance, self.scheduler)
        self.denoisers.append(denoiser)
        try:
            query = next(sampler)
            while True:
                x0 = await denoiser(query)
                step = query.step
                query = sampler.send(x0)
                if query.step > step:
                    self._completed(index, step)
                    self._preview(index, step, x0)
        except StopIteration as end:
            self._completed(index, self.request.steps)
            latents: Array = end.value
            return latents

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

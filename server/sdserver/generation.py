"""The work of one request once it has its place: noise, denoising steps, pixels, files."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sdserver import images
from sdserver.canvas import Canvas
from sdserver.conditioning import conditioning, with_noise
from sdserver.decoding import decode
from sdserver.denoiser import Denoiser
from sdserver.encoding import encode
from sdserver.errors import GenerationFailed
from sdserver.inpainting import ImageLatents
from sdserver.noise import ImageNoise, VariedNoise
from sdserver.parameterization import initial_latents
from sdserver.passes import Pass, passes_of
from sdserver.request import Finished, Image, Preview, Progress, Timings, Usage
from sdserver.samplers import SAMPLERS, noise_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdserver.clip_guidance import ClipGuide
    from sdserver.engine_schedulers import EngineSchedulers
    from sdserver.guidance import Guidance
    from sdserver.image_writer import ImageWriter
    from sdserver.inpainting import Denoise
    from sdserver.observation import Observer
    from sdserver.outbox import Outbox
    from sdserver.request import GenerationRequest
    from sdserver.safety import SafetyCheck
    from sdserver.samplers import Query, Sampler

Array = NDArray[np.float32]
Pixels = NDArray[np.uint8]


@dataclass(slots=True, eq=False)
class Generation:
    """The work of one request, from text states to files."""

    request: GenerationRequest
    guidance: Guidance
    schedulers: EngineSchedulers
    clip_guide: Callable[[Callable[[], int]], ClipGuide] | None
    """A new guide for a pass of an image, from its cutout seeds; None: no CLIP guidance."""
    writer: ImageWriter
    safety: SafetyCheck | None
    outbox: Outbox
    arrival: float
    encoded: float
    observer: Observer
    passes: tuple[Pass, ...] = field(init=False)
    conditionings: list[Array | None] = field(default_factory=list)
    """Of each pass, as far as all images have it in common."""
    denoisers: list[Denoiser] = field(default_factory=list)
    completed: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.passes = passes_of(self.request)

    @property
    def steps(self) -> int:
        """Denoising steps of each image, over all passes."""
        return sum(part.steps for part in self.passes)

    @property
    def pixel_steps(self) -> int:
        """Pixels that the UNet has seen so far, summed over its rows."""
        return sum(denoiser.pixel_steps for denoiser in self.denoisers)

    async def run(self) -> None:
        """Does the work and puts its events, but for Accepted. Raises a RequestError."""
        request = self.request
        started = time.monotonic()
        self.completed = dict.fromkeys(range(request.image_count), 0)
        self.outbox.put(Progress(0, self.steps))
        initial = None
        if request.init_image is not None:
            initial = await self._encode(request.init_image.canvas, self.passes[0])
        self.conditionings = [await conditioning(request, self.schedulers, part) for part in self.passes]
        tasks: list[asyncio.Task[float]] = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._image(index, initial)) for index in range(request.image_count)]
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
                    self.pixel_steps,
                    sum(denoiser.clip_gradients for denoiser in self.denoisers),
                    sum(denoiser.cached_rows for denoiser in self.denoisers),
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

    async def _image(self, index: int, initial: ImageLatents | None) -> float:
        """Makes one image; returns when its denoising ended, on the monotonic clock."""
        request, observer, engine_id = self.request, self.observer, self.request.engine.id
        first, *others = self.passes
        with observer.stage(engine_id, "denoise", index):
            latents = await self._denoise(index, first, initial)
            for part in others:
                small = await self._decode(latents, self.passes[part.number - 1])
                enlarged = await asyncio.to_thread(images.enlarge, small, part.width, part.height)
                latents = await self._denoise(index, part, await self._encode(Canvas(enlarged, None), part))
        denoised_at = time.monotonic()
        with observer.stage(engine_id, "decode", index):
            cropped = await self._decode(latents, self.passes[-1])
            if request.init_image is not None:
                cropped = await asyncio.to_thread(request.init_image.canvas.composite, cropped)
            sent, safety = (cropped, None) if self.safety is None else await self.safety(cropped)
        with observer.stage(engine_id, "write", index):
            data = b"" if sent is None else await self.writer.write(sent, request, index)
        observer.image_done(engine_id, request.width, request.height)
        self.outbox.put(
            Image(
                *(index, request.seeds[index], data, request.output.media_type, request.width, request.height),
                signed=self.writer.signs and bool(data),
                safety=safety,
            )
        )
        return denoised_at

    async def _denoise(self, index: int, part: Pass, image: ImageLatents | None) -> Array:
        """[C, h, w] finite latents of one pass of an image, from `image` or, if there is none, from pure noise."""
        request, engine = self.request, self.request.engine
        width, height = engine.padded_size(part.width, part.height)
        scale = engine.latents.downsampling
        shape = engine.latents.channels, height // scale, width // scale
        noise = self._noise(index)
        initial = noise.initial(shape, part.number)
        if image is None:
            start = initial_latents(initial, part.sigmas[0])
        else:
            start = image.start(initial, part.sigmas[0], part.whole_schedule)
        options = {name: getattr(request, name) for name in noise_options(request.sampler)}
        sampler = SAMPLERS[request.sampler](start, part.sigmas, noise.steps(shape, part.number), **options)
        latents = await self._drive(index, part, sampler, self._denoiser(part, image, noise))
        if not np.isfinite(latents).all():
            raise GenerationFailed(
                f"image {index} is not finite: the model overflowed; try another sampler or a lower guidance_scale",
                "NOT_FINITE",
            )
        return latents

    def _noise(self, index: int) -> ImageNoise:
        seed, variation = self.request.seeds[index], self.request.variation
        if variation is None:
            return ImageNoise(seed)
        return VariedNoise(seed, ImageNoise(variation.seed + index), variation.strength)

    def _denoiser(self, part: Pass, image: ImageLatents | None, noise: ImageNoise) -> Denoise:
        clip = None if self.clip_guide is None else self.clip_guide(noise.cutout_seeds(part.number))
        cache = self.schedulers.block_cache(self.request)
        unet, channels = self.schedulers.unet_of(self.request), self.conditionings[part.number]
        if channels is not None:
            channels = with_noise(self.request, channels, noise)
        denoiser = Denoiser(self.request, self.guidance, unet, clip, cache, channels)
        self.denoisers.append(denoiser)

        async def denoise(query: Query) -> Array:
            # What acts in a part of the schedule counts its steps, and not those of the pass.
            return await denoiser(replace(query, step=part.skipped + query.step))

        return denoise if image is None else image.keeping(denoise, part.steps)

    async def _drive(self, index: int, part: Pass, sampler: Sampler, denoise: Denoise) -> Array:
        """Drives a sampler to its end; cancelling it falls between evaluations."""
        try:
            query = next(sampler)
            while True:
                x0 = await denoise(query)
                step = query.step
                query = sampler.send(x0)
                if query.step > step:
                    self._completed(index, part.before + step)
                    self._preview(index, part, part.before + step, x0)
        except StopIteration as end:
            self._completed(index, part.before + part.steps)
            latents: Array = end.value
            return latents

    async def _encode(self, canvas: Canvas, part: Pass) -> ImageLatents | None:
        """The latents of an image of a pass's size; None: the pass needs none."""
        engine = self.request.engine
        # An inpainting UNet is shown what to keep, and was not trained with latents that are kept by others; an
        # upscaling UNet is shown the whole image.
        shown = engine.conditioning in ("inpainting", "upscaling")
        if shown and part.whole_schedule:
            return None
        width, height = engine.padded_size(part.width, part.height)
        # Requests with initial images are refused for engines without it.
        assert self.schedulers.vae_encoder is not None
        latents = await encode(self.schedulers.vae_encoder, self.request, canvas.padded(width, height))
        repaint = None if shown else canvas.repaint_in_latents(width, height, engine.latents.downsampling)
        return ImageLatents(latents, repaint)

    async def _decode(self, latents: Array, part: Pass) -> Pixels:
        """[H, W, 3] pixels of a pass's latents."""
        engine = self.request.engine
        pixels = await decode(self.schedulers.vae_decoder, self.request, latents)
        # An upscaler's image lies in the middle by whole pixels of its own.
        step = engine.latents.downsampling if engine.conditioning == "upscaling" else 1
        return images.crop(pixels, part.width, part.height, step)

    def _preview(self, index: int, part: Pass, step: int, x0: Array) -> None:
        request, preview_map = self.request, self.request.engine.preview_map
        if preview_map is None or request.preview_every_steps is None or step % request.preview_every_steps:
            return
        scale = request.engine.latents.downsampling
        width, height = -(-part.width // scale), -(-part.height // scale)
        pixels = images.crop(images.preview(x0, preview_map), width, height)
        shown = pixels if self.safety is None else self.safety.withheld(pixels)
        if shown is None:
            return
        data = images.encode(shown, images.PREVIEW_OUTPUT)
        self.outbox.put(Preview(index, step, data, images.PREVIEW_OUTPUT.media_type, width, height))

    def _completed(self, index: int, step: int) -> None:
        before = min(self.completed.values())
        self.completed[index] = step
        if (now := min(self.completed.values())) > before:
            self.outbox.put(Progress(now, self.steps))

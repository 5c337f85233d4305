"""Messages in: a request with everything resolved, or everything that is wrong with it."""

from __future__ import annotations

import secrets
import uuid
from typing import TYPE_CHECKING

from sdserver.errors import InvalidRequest, NotSupported, PromptBlocked, UnknownEngine
from sdserver.images import DEFAULT_QUALITY, MEDIA_TYPES
from sdserver.noise import MAX_SEED
from sdserver.request import BLENDINGS, Emphasis, GenerationRequest, GuidanceInterval, Output, Prompt
from sdserver.samplers import noise_options, samplers_with
from sdserver.wire.names import BLENDING_NAMES, SAMPLER_NAMES, SCHEDULE_NAMES, Names
from sdserver.wire.reading_clip_guidance import read_clip_guidance
from sdserver.wire.reading_images import MAX_CHOSEN_SEED, ImageFields
from sdserver.wire.reading_loras import read_loras
from sdserver.wire.reading_windows import check_tiling, read_windows

if TYPE_CHECKING:
    from sdapi.v1 import generation_pb2

    from sdserver.block_list import BlockList
    from sdserver.engines import Catalog, Engine

MAX_PROMPTS = 64
MAX_PROMPT_CHARACTERS = 10_000
MAX_REQUEST_ID_CHARACTERS = 128
MAX_WEIGHT = 10.0
MAX_EMPHASIS_RANGES = 256
MAX_EMPHASIS_FACTOR = 10.0
MAX_GUIDANCE_SCALE = 100.0
MAX_CHURN = 100.0

DEFAULT_PREVIEW_STEPS = 5
DEFAULT_BLOCK_CACHE_INTERVAL = 2
# That of diffusers' pipeline.
DEFAULT_NOISE_LEVEL = 20

# What needs an engine's `vae_encoder`.
IMAGE_TO_IMAGE = ("init_image", "mask", "outpaint", "two_pass")


def request_id(message: generation_pb2.GenerateRequest) -> str:
    """The caller's request id, or a new one where that is absent or not fit to be logged."""
    return message.request_id if _is_printable(message.request_id) else str(uuid.uuid4())


def to_request(
    message: generation_pb2.GenerateRequest, request_id: str, catalog: Catalog, block_list: BlockList | None = None
) -> GenerationRequest:
    """The request under this id with everything resolved.

    Raises InvalidRequest with all violations at once (PromptBlocked if the block list is among them), UnknownEngine, or
    NotSupported.
    """
    engine = catalog.get(message.engine) if message.engine else catalog.default
    if engine is None:
        raise UnknownEngine(
            f"no engine {message.engine[:64]!r}; this server has {', '.join(engine.id for engine in catalog)}"
        )
    for field in IMAGE_TO_IMAGE if "vae_encoder" not in engine.optional_roles else ():
        # An upscaler is shown its image as it is.
        if message.HasField(field) and (field != "init_image" or engine.upscaling is None):
            raise NotSupported(f"engine {engine.id} does not repaint images; leave {field} out", field=field)
    if message.HasField("upscale") and engine.upscaling is None:
        raise NotSupported(f"engine {engine.id} does not enlarge images; leave upscale out", field="upscale")
    if message.HasField("depth_map") and engine.conditioning != "depth":
        raise NotSupported(f"engine {engine.id} takes no depth maps; leave depth_map out", field="depth_map")
    request = _Reader(message, request_id, engine, block_list).read()
    if request.preview_every_steps is not None and engine.preview_map is None:
        raise NotSupported(f"engine {engine.id} has no previews; leave preview out", field="preview")
    if message.HasField("windows") and engine.windows is None:
        raise NotSupported(f"engine {engine.id} has no windows; leave them out", field="windows")
    if message.HasField("clip_guidance") and engine.clip_guidance is None:
        raise NotSupported(f"engine {engine.id} has no CLIP guidance; leave it out", field="clip_guidance")
    if message.HasField("block_cache") and engine.block_cache is None:
        raise NotSupported(f"engine {engine.id} has no block caching; leave block_cache out", field="block_cache")
    if message.clip_guidance.exact and "unet_gradient" not in engine.optional_roles:
        raise NotSupported(
            f"engine {engine.id} has no exact CLIP guidance; leave exact out", field="clip_guidance.exact"
        )
    return request


class _Reader:
    """Reads one message and collects everything that is wrong with it."""

    def __init__(
        self, message: generation_pb2.GenerateRequest, request_id: str, engine: Engine, block_list: BlockList | None
    ) -> None:
        self._message = message
        self._block_list = block_list
        self._request_id = request_id
        self._engine = engine
        self._violations: dict[str, str] = {}

    def read(self) -> GenerationRequest:
        message, limits, defaults = self._message, self._engine.limits, self._engine.defaults
        image_fields = ImageFields(message, self._engine, self._violations)
        default_width, default_height = image_fields.default_size()
        width = self._integer("width", limits.min_size, limits.max_size, default_width)
        height = self._integer("height", limits.min_size, limits.max_size, default_height)
        if not {"width", "height"} & self._violations.keys() and width * height > limits.max_pixels:
            self._violations["width"] = (
                f"{width} x {height} is {width * height} pixels; engine {self._engine.id} makes at most "
                f"{limits.max_pixels}"
            )
        two_pass = image_fields.two_pass(width, height)
        check_tiling(message, self._engine, width, height, two_pass, self._violations)
        seeds = self._seeds()
        sampler = self._enum("sampler", SAMPLER_NAMES, defaults.sampler)
        prompts = self._prompts()
        request = GenerationRequest(
            request_id=self._request_id,
            engine=self._engine,
            prompts=prompts,
            blending=next(name for name in BLENDINGS if name == self._enum("blending", BLENDING_NAMES, BLENDINGS[0])),
            width=width,
            height=height,
            steps=self._integer("steps", 1, limits.max_steps, defaults.steps),
            sampler=sampler,
            schedule=self._enum("schedule", SCHEDULE_NAMES, defaults.schedule),
            eta=self._noise_option("eta", 1.0, sampler),
            churn=self._noise_option("churn", MAX_CHURN, sampler),
            seeds=seeds,
            guidance_scale=self._number("guidance_scale", 0.0, MAX_GUIDANCE_SCALE, defaults.guidance_scale),
            guidance_interval=self._guidance_interval(),
            guidance_rescale=self._number("guidance_rescale", 0.0, 1.0, 0.0),
            clip_guidance=read_clip_guidance(message, self._engine, prompts, self._violations),
            loras=read_loras(message, self._engine, self._violations),
            block_cache_interval=self._block_cache_interval(),
            output=self._output(),
            preview_every_steps=self._preview_every_steps(),
            outpaint=image_fields.outpaint,
            mask=image_fields.mask(),
            variation=image_fields.variation(len(seeds)),
            two_pass=two_pass,
            windows=read_windows(message, self._engine, self._violations),
            tile_x=message.tile_x,
            tile_y=message.tile_y,
            noise_level=self._noise_level(),
            depth_map=image_fields.depth_map(width, height),
            # The last: it fits pictures only if nothing is wrong so far.
            init_image=image_fields.init_image(width, height),
        )
        if message.request_id and not _is_printable(message.request_id):
            self._violations["request_id"] = f"at most {MAX_REQUEST_ID_CHARACTERS} printable ASCII characters"
        if blocked := self._blocked(request):
            problem = "is not allowed by this server; say it in other words"
            raise PromptBlocked({**dict.fromkeys(blocked, problem), **self._violations}, blocked)
        if self._violations:
            raise InvalidRequest(self._violations)
        return request

    def _blocked(self, request: GenerationRequest) -> dict[str, int]:
        """Field path -> line of the block list, for each text that the images could come to show."""
        if self._block_list is None:
            return {}
        # A negative prompt keeps out what it names, and who wants that has to be able to name it. With a guidance scale
        # below 1 it is drawn instead.
        texts = {
            f"prompts[{index}].text": prompt.text
            for index, prompt in enumerate(request.prompts)
            if not prompt.weight < 0 or request.guidance_scale < 1
        }
        texts["clip_guidance.prompt"] = self._message.clip_guidance.prompt
        found = {path: self._block_list.find(text) for path, text in texts.items() if path not in self._violations}
        return {path: line for path, line in found.items() if line is not None}

    def _integer(self, field: str, least: int, most: int, default: int) -> int:
        if not self._message.HasField(field):
            return default
        value: int = getattr(self._message, field)
        if value < least:
            self._violations[field] = f"{value} is too small; at least {least}"
        elif value > most:
            self._violations[field] = f"{value} is too large; at most {most}"
        return value

    def _number(self, field: str, least: float, most: float, default: float) -> float:
        if not self._message.HasField(field):
            return default
        return self._in_range(field, getattr(self._message, field), least, most)

    def _in_range(self, path: str, value: float, least: float, most: float) -> float:
        # The comparison is false for NaN, too.
        if not least <= value <= most:
            self._violations[path] = f"{value:g} is not a number from {least:g} to {most:g}"
        return value

    def _enum(self, field: str, names: Names, default: str) -> str:
        number: int = getattr(self._message, field)
        if number == 0:
            return default
        name = names.name(number)
        if name is None:
            self._violations[field] = f"{number} is not known to this server; choose one that ListEngines names"
            return default
        return name

    def _prompts(self) -> tuple[Prompt, ...]:
        prompts = self._message.prompts
        if not prompts:
            self._violations["prompts"] = "at least one prompt is required"
        elif len(prompts) > MAX_PROMPTS:
            self._violations["prompts"] = f"{len(prompts)} prompts are too many; at most {MAX_PROMPTS}"
            return ()
        read = []
        for index, prompt in enumerate(prompts):
            path = f"prompts[{index}]"
            if not prompt.text.strip():
                self._violations[f"{path}.text"] = "is empty; say what to show, or leave the prompt out"
            elif len(prompt.text) > MAX_PROMPT_CHARACTERS:
                self._violations[f"{path}.text"] = (
                    f"{len(prompt.text)} characters are too many; at most {MAX_PROMPT_CHARACTERS}"
                )
            weight = prompt.weight if prompt.HasField("weight") else 1.0
            weight = self._in_range(f"{path}.weight", weight, -MAX_WEIGHT, MAX_WEIGHT)
            read.append(Prompt(prompt.text, weight, self._emphasis(f"{path}.emphasis", prompt)))
        if read and all(prompt.weight == 0 for prompt in read):
            self._violations["prompts"] = "every weight is 0; at least one prompt needs another"
        return tuple(read)

    def _emphasis(self, path: str, prompt: generation_pb2.Prompt) -> tuple[Emphasis, ...]:
        if len(prompt.emphasis) > MAX_EMPHASIS_RANGES:
            self._violations[path] = f"{len(prompt.emphasis)} ranges are too many; at most {MAX_EMPHASIS_RANGES}"
            return ()
        read, position = [], 0
        for index, part in enumerate(prompt.emphasis):
            if part.start < position:
                self._violations[f"{path}[{index}].start"] = (
                    f"{part.start} is before {position}; ranges start at 0, are in order and do not overlap"
                )
            if not part.start < part.end <= len(prompt.text):
                self._violations[f"{path}[{index}].end"] = (
                    f"{part.end} is not from start + 1 to {len(prompt.text)}, the length of the text"
                )
            if not part.HasField("factor"):
                self._violations[f"{path}[{index}].factor"] = "is missing; 1 changes nothing"
            self._in_range(f"{path}[{index}].factor", part.factor, 0.0, MAX_EMPHASIS_FACTOR)
            read.append(Emphasis(part.start, part.end, part.factor))
            position = max(position, part.end)
        return tuple(read)

    def _noise_option(self, field: str, most: float, sampler: str) -> float | None:
        options = noise_options(sampler)
        if field in options:
            return self._number(field, 0.0, most, options[field])
        if self._message.HasField(field):
            having = ", ".join(samplers_with(field))
            self._violations[field] = f"sampler {sampler} has no {field}; leave it out or choose one of {having}"
        return None

    def _seeds(self) -> tuple[int, ...]:
        message, most = self._message, self._engine.limits.max_image_count
        if not message.seeds:
            image_count = self._integer("image_count", 1, most, 1)
            if "image_count" in self._violations:
                image_count = 1
            # Variations differ in the other seed.
            step = 0 if message.HasField("variation") else 1
            # The last image's seed has to be one, too.
            most_seed = MAX_SEED - step * (image_count - 1)
            seed = self._integer("seed", 0, most_seed, secrets.randbelow(MAX_CHOSEN_SEED))
            return tuple(seed + step * index for index in range(image_count))
        if message.HasField("seed"):
            self._violations["seed"] = "not together with seeds; leave one of them out"
        if message.HasField("image_count") and message.image_count != len(message.seeds):
            self._violations["image_count"] = f"{message.image_count} is not {len(message.seeds)}, the number of seeds"
        if len(message.seeds) > most:
            self._violations["seeds"] = f"{len(message.seeds)} images are too many; at most {most}"
            return ()
        for index, seed in enumerate(message.seeds):
            if seed < 0:
                self._violations[f"seeds[{index}]"] = f"{seed} is too small; at least 0"
        return tuple(message.seeds)

    def _guidance_interval(self) -> GuidanceInterval:
        interval = self._message.guidance_interval
        start = interval.start if interval.HasField("start") else 0.0
        end = interval.end if interval.HasField("end") else 1.0
        self._in_range("guidance_interval.start", start, 0.0, 1.0)
        self._in_range("guidance_interval.end", end, 0.0, 1.0)
        if start >= end:
            self._violations.setdefault("guidance_interval.end", f"{end:g} must be greater than start, {start:g}")
        return GuidanceInterval(start, end)

    def _preview_every_steps(self) -> int | None:
        message, most = self._message, self._engine.limits.max_steps
        if not message.HasField("preview"):
            return None
        every = message.preview.every_steps if message.preview.HasField("every_steps") else DEFAULT_PREVIEW_STEPS
        if not 1 <= every <= most:
            self._violations["preview.every_steps"] = f"{every} is not an integer from 1 to {most}"
        return every

    def _block_cache_interval(self) -> int:
        message, most = self._message, self._engine.limits.max_steps
        if not message.HasField("block_cache"):
            return 1
        given = message.block_cache
        interval = given.interval if given.HasField("interval") else DEFAULT_BLOCK_CACHE_INTERVAL
        if not 1 <= interval <= most:
            self._violations["block_cache.interval"] = f"{interval} is not an integer from 1 to {most}"
        if interval != 1 and message.clip_guidance.exact:
            self._violations["block_cache"] = (
                "not together with clip_guidance.exact, which needs the gradient of the whole UNet in each step; leave "
                "one of them out"
            )
        return interval

    def _noise_level(self) -> int | None:
        upscaling, given = self._engine.upscaling, self._message.upscale
        if upscaling is None:
            return None
        most = upscaling.max_noise_level
        level = given.noise_level if given.HasField("noise_level") else min(DEFAULT_NOISE_LEVEL, most)
        if not 0 <= level <= most:
            self._violations["upscale.noise_level"] = f"{level} is not an integer from 0 to {most}"
        return level

    def _output(self) -> Output:
        output = self._message.output
        media_type = output.media_type or "image/png"
        if media_type not in MEDIA_TYPES:
            self._violations["output.media_type"] = (
                f"{media_type[:64]!r} is not supported; one of {', '.join(MEDIA_TYPES)}"
            )
            return Output("image/png", None)
        metadata = output.metadata if output.HasField("metadata") else True
        _, lossy = MEDIA_TYPES[media_type]
        if not lossy:
            if output.HasField("quality"):
                self._violations["output.quality"] = f"{media_type} is lossless; leave quality out"
            return Output(media_type, None, metadata)
        quality = output.quality if output.HasField("quality") else DEFAULT_QUALITY
        if not 1 <= quality <= 100:
            self._violations["output.quality"] = f"{quality} is not an integer from 1 to 100"
        return Output(media_type, quality, metadata)


def _is_printable(text: str) -> bool:
    return 0 < len(text) <= MAX_REQUEST_ID_CHARACTERS and text.isascii() and text.isprintable()

"""Messages out: events, engines, and the resolved request."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from sdapi.v1 import engine_pb2, generation_pb2

from sdserver.engines import SCHEDULES, Engine, LoraInfo
from sdserver.images import MEDIA_TYPES
from sdserver.request import Accepted, Finished, Image, Preview, Progress
from sdserver.samplers import SAMPLERS, samplers_with
from sdserver.wire.names import (
    BLENDING_NAMES,
    CONDITIONING_NAMES,
    FIT_NAMES,
    SAFETY_MODE_NAMES,
    SAFETY_OUTCOME_NAMES,
    SAMPLER_NAMES,
    SCHEDULE_NAMES,
)

if TYPE_CHECKING:
    from sdserver.request import Event, GenerationRequest, InitImage, Safety
    from sdserver.safety import SafetyMode


def from_request(request: GenerationRequest) -> generation_pb2.GenerateRequest:
    """The resolved request as a message: sending it again gives the same images."""
    first, count = request.seeds[0], request.image_count
    # One seed says it all, if the others count up from it, or are the same in variations.
    step = 1 if request.variation is None else 0
    one_seed = request.seeds == tuple(first + step * index for index in range(count))
    return generation_pb2.GenerateRequest(
        request_id=request.request_id,
        engine=request.engine.id,
        prompts=[
            generation_pb2.Prompt(
                text=prompt.text,
                weight=prompt.weight,
                emphasis=[
                    generation_pb2.Emphasis(start=part.start, end=part.end, factor=part.factor)
                    for part in prompt.emphasis
                ],
            )
            for prompt in request.prompts
        ],
        blending=BLENDING_NAMES.number(request.blending),  # type: ignore[arg-type]
        width=request.width,
        height=request.height,
        steps=request.steps,
        sampler=SAMPLER_NAMES.number(request.sampler),  # type: ignore[arg-type]
        schedule=SCHEDULE_NAMES.number(request.schedule),  # type: ignore[arg-type]
        seed=first if one_seed else None,
        seeds=() if one_seed else request.seeds,
        image_count=count,
        eta=request.eta,
        churn=request.churn,
        guidance_scale=request.guidance_scale,
        guidance_interval=generation_pb2.GuidanceInterval(
            start=request.guidance_interval.start, end=request.guidance_interval.end
        ),
        guidance_rescale=request.guidance_rescale,
        clip_guidance=None
        if request.clip_guidance is None
        else generation_pb2.ClipGuidance(**asdict(request.clip_guidance)),
        output=generation_pb2.Output(
            media_type=request.output.media_type, quality=request.output.quality, metadata=request.output.metadata
        ),
        init_image=None if request.init_image is None else _init_image(request.init_image),
        mask=None
        if request.mask is None
        else generation_pb2.Mask(sha256=request.mask.sha256, feather=request.mask.feather),
        outpaint=None if request.outpaint is None else generation_pb2.Outpaint(**asdict(request.outpaint)),
        upscale=None if request.noise_level is None else generation_pb2.Upscale(noise_level=request.noise_level),
        depth_map=None
        if request.depth_map is None
        else generation_pb2.DepthMap(
            sha256=request.depth_map.sha256,
            fit=FIT_NAMES.number(request.depth_map.fit),  # type: ignore[arg-type]
        ),
        variation=None if request.variation is None else generation_pb2.Variation(**asdict(request.variation)),
        two_pass=None if request.two_pass is None else generation_pb2.TwoPass(**asdict(request.two_pass)),
        loras=[
            generation_pb2.Lora(name=lora.info.name, weight=lora.weight, sha256=lora.info.sha256)
            for lora in request.loras
        ],
        block_cache=None
        if request.block_cache_interval == 1
        else generation_pb2.BlockCache(interval=request.block_cache_interval),
        windows=_windows(request),
        tile_x=request.tile_x,
        tile_y=request.tile_y,
        preview=None
        if request.preview_every_steps is None
        else generation_pb2.PreviewOptions(every_steps=request.preview_every_steps),
    )


def to_json(request: GenerationRequest) -> str:
    """All that makes the images of a request what they are, as canonical protobuf JSON in ASCII."""
    message = from_request(request)
    # They say who asked, and what was seen on the way.
    message.ClearField("request_id")
    message.ClearField("preview")
    return json_format.MessageToJson(message, indent=None)


def from_event(event: Event) -> generation_pb2.GenerateResponse:
    """An event as a message of the stream."""
    match event:
        case Accepted():
            return generation_pb2.GenerateResponse(
                accepted=generation_pb2.Accepted(
                    request=from_request(event.request),
                    queue_position=event.queue_position,
                    prompt_usage=[
                        generation_pb2.PromptUsage(tokens=usage.tokens, chunks=usage.chunks)
                        for usage in event.prompt_usage
                    ],
                )
            )
        case Progress():
            return generation_pb2.GenerateResponse(progress=generation_pb2.Progress(step=event.step, steps=event.steps))
        case Preview():
            return generation_pb2.GenerateResponse(
                preview=generation_pb2.Preview(
                    index=event.index,
                    step=event.step,
                    data=event.data,
                    media_type=event.media_type,
                    width=event.width,
                    height=event.height,
                )
            )
        case Image():
            return generation_pb2.GenerateResponse(
                image=generation_pb2.Image(
                    index=event.index,
                    seed=event.seed,
                    data=event.data,
                    media_type=event.media_type,
                    width=event.width,
                    height=event.height,
                    signed=event.signed,
                    safety=None if event.safety is None else _safety(event.safety),
                )
            )
        case Finished():
            return generation_pb2.GenerateResponse(
                finished=generation_pb2.Finished(
                    usage=generation_pb2.Usage(
                        image_count=event.usage.image_count,
                        unet_rows=event.usage.unet_rows,
                        pixel_steps=event.usage.pixel_steps,
                        clip_gradients=event.usage.clip_gradients,
                        cached_rows=event.usage.cached_rows,
                    ),
                    timings=generation_pb2.Timings(
                        queue=_duration(event.timings.queue),
                        encode=_duration(event.timings.encode),
                        denoise=_duration(event.timings.denoise),
                        decode=_duration(event.timings.decode),
                        total=_duration(event.timings.total),
                    ),
                )
            )


def _safety(safety: Safety) -> generation_pb2.Safety:
    return generation_pb2.Safety(
        outcome=SAFETY_OUTCOME_NAMES.number(safety.outcome),  # type: ignore[arg-type]
        scores=[generation_pb2.SafetyScore(**asdict(score)) for score in safety.scores],
    )


def _windows(request: GenerationRequest) -> generation_pb2.Windows | None:
    if request.engine.windows is None:
        return None
    if request.windows is None:
        return generation_pb2.Windows(size=0)
    return generation_pb2.Windows(**request.windows.model_dump())


def _init_image(init_image: InitImage) -> generation_pb2.InitImage:
    return generation_pb2.InitImage(
        strength=init_image.strength,
        fit=FIT_NAMES.number(init_image.fit),  # type: ignore[arg-type]
        sha256=init_image.sha256,
    )


def from_engine(engine: Engine, ready: bool, safety_mode: SafetyMode | None) -> engine_pb2.Engine:
    """An engine as ListEngines tells it; without a `safety_mode` there is no safety check."""
    limits, defaults = engine.limits, engine.defaults
    return engine_pb2.Engine(
        id=engine.id,
        name=engine.name,
        description=engine.description,
        ready=ready,
        digest=engine.digest,
        native_width=engine.native_width,
        native_height=engine.native_height,
        limits=engine_pb2.EngineLimits(**limits.model_dump()),
        defaults=engine_pb2.EngineDefaults(
            width=defaults.width,
            height=defaults.height,
            steps=defaults.steps,
            guidance_scale=defaults.guidance_scale,
            sampler=SAMPLER_NAMES.number(defaults.sampler),  # type: ignore[arg-type]
            schedule=SCHEDULE_NAMES.number(defaults.schedule),  # type: ignore[arg-type]
        ),
        samplers=[SAMPLER_NAMES.number(name) for name in SAMPLERS],  # type: ignore[misc]
        schedules=[SCHEDULE_NAMES.number(name) for name in SCHEDULES],  # type: ignore[misc]
        media_types=list(MEDIA_TYPES),
        windows=None if engine.windows is None else engine_pb2.WindowDefaults(**engine.windows.model_dump()),
        image_to_image="vae_encoder" in engine.optional_roles,
        license=engine_pb2.License(**engine.license.model_dump()),
        eta_samplers=[SAMPLER_NAMES.number(name) for name in samplers_with("eta")],  # type: ignore[misc]
        churn_samplers=[SAMPLER_NAMES.number(name) for name in samplers_with("churn")],  # type: ignore[misc]
        safety_mode=SAFETY_MODE_NAMES.number(safety_mode or "off"),  # type: ignore[arg-type]
        block_cache=engine.block_cache is not None,
        upscaling=None
        if engine.upscaling is None
        else engine_pb2.UpscalingSupport(
            factor=engine.latents.downsampling, max_noise_level=engine.upscaling.max_noise_level
        ),
        estimates_depth="depth_estimator" in engine.optional_roles,
        conditioning=CONDITIONING_NAMES.number(engine.conditioning),  # type: ignore[arg-type]
        loras=[_lora_info(lora) for lora in engine.loras],
        clip_guidance=None
        if engine.clip_guidance is None
        else engine_pb2.ClipGuidanceSupport(
            presets=[engine_pb2.ClipGuidancePreset(**preset.model_dump()) for preset in engine.clip_guidance.presets],
            exact="unet_gradient" in engine.optional_roles,
        ),
    )


def _lora_info(lora: LoraInfo) -> engine_pb2.LoraInfo:
    return engine_pb2.LoraInfo(
        name=lora.name,
        title=lora.title,
        description=lora.description,
        trigger_words=lora.trigger_words,
        license=None if lora.license is None else engine_pb2.License(**lora.license.model_dump()),
        sha256=lora.sha256,
        text_encoder=lora.text_encoder_modules > 0,
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration

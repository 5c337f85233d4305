"""Messages out: events, engines, and the resolved request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.duration_pb2 import Duration
from sdapi.v1 import engine_pb2, generation_pb2

from sdserver.engines import SCHEDULES, Engine
from sdserver.images import MEDIA_TYPES
from sdserver.request import Accepted, Finished, Image, Preview, Progress
from sdserver.samplers import SAMPLERS, samplers_with
from sdserver.wire.names import BLENDING_NAMES, SAMPLER_NAMES, SCHEDULE_NAMES

if TYPE_CHECKING:
    from sdserver.request import Event, GenerationRequest


def from_request(request: GenerationRequest) -> generation_pb2.GenerateRequest:
    """The resolved request as a message: sending it again gives the same images."""
    first, count = request.seeds[0], request.image_count
    # One seed says it all, if the others count up from it.
    one_seed = request.seeds == tuple(range(first, first + count))
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
        output=generation_pb2.Output(media_type=request.output.media_type, quality=request.output.quality),
        preview=None
        if request.preview_every_steps is None
        else generation_pb2.PreviewOptions(every_steps=request.preview_every_steps),
    )


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
                )
            )
        case Finished():
            return generation_pb2.GenerateResponse(
                finished=generation_pb2.Finished(
                    usage=generation_pb2.Usage(
                        image_count=event.usage.image_count,
                        unet_rows=event.usage.unet_rows,
                        pixel_steps=event.usage.pixel_steps,
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


def from_engine(engine: Engine, ready: bool) -> engine_pb2.Engine:
    """An engine as ListEngines tells it."""
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
        license=engine_pb2.License(**engine.license.model_dump()),
        eta_samplers=[SAMPLER_NAMES.number(name) for name in samplers_with("eta")],  # type: ignore[misc]
        churn_samplers=[SAMPLER_NAMES.number(name) for name in samplers_with("churn")],  # type: ignore[misc]
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration

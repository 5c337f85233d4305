"""The servicer over a backend without weights: contract, validation, faults, cancellation, drain."""

from __future__ import annotations

import asyncio
import io
import itertools
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from fakes import FakeBackend, pixel_of
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image
from sdapi.v1 import generation_pb2, sampling_pb2
from sdserver.errors import GenerationFailed, Unavailable
from sdserver.samplers import SAMPLERS
from sdserver.server import Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sdapi.v1.generation_pb2_grpc import GenerationServiceAsyncStub
    from sdserver.settings import ServeSettings

TEXT = "a lake at dusk"
NAN, INFINITY = float("nan"), float("inf")


def a_request(**fields: Any) -> generation_pb2.GenerateRequest:
    fields.setdefault("prompts", [generation_pb2.Prompt(text=TEXT)])
    fields.setdefault("steps", 4)
    fields.setdefault("width", 64)
    fields.setdefault("height", 64)
    return generation_pb2.GenerateRequest(**fields)


async def events_of(
    stub: GenerationServiceAsyncStub, request: generation_pb2.GenerateRequest
) -> list[generation_pb2.GenerateResponse]:
    return [event async for event in stub.Generate(request)]


async def image_of(stub: GenerationServiceAsyncStub, request: generation_pb2.GenerateRequest) -> Image.Image:
    [image] = [event.image for event in await events_of(stub, request) if event.HasField("image")]
    return Image.open(io.BytesIO(image.data))


async def failure_of(stub: GenerationServiceAsyncStub, request: generation_pb2.GenerateRequest) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await events_of(stub, request)
    return caught.value


def details_of(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    [data] = [value for key, value in error.trailing_metadata() or () if key == "grpc-status-details-bin"]
    status = Status.FromString(data)  # type: ignore[arg-type]
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    for detail in status.details:
        if detail.Is(kind.DESCRIPTOR):
            message = kind()
            detail.Unpack(message)
            return message
    return None


def violations_of(error: grpc.aio.AioRpcError) -> dict[str, str]:
    bad = details_of(error, error_details_pb2.BadRequest)
    return {violation.field: violation.description for violation in bad.field_violations}


# The stream


async def test_events_come_in_order_and_say_what_was_decided(stub: GenerationServiceAsyncStub) -> None:
    events = await events_of(stub, generation_pb2.GenerateRequest(prompts=[{"text": TEXT}], request_id="me-1"))
    kinds = [event.WhichOneof("event") for event in events]
    assert [kind for kind, _ in itertools.groupby(kinds)] == ["accepted", "progress", "image", "finished"]
    resolved = events[0].accepted.request
    assert resolved.request_id == "me-1"
    assert (resolved.engine, resolved.width, resolved.height, resolved.image_count) == ("tiny-landscape", 128, 128, 1)
    assert resolved.steps == events[1].progress.steps == 25
    assert resolved.guidance_scale == 5.0
    assert resolved.sampler == sampling_pb2.SAMPLER_DDIM
    assert resolved.prompts[0].weight == 1.0
    steps = [event.progress.step for event in events if event.HasField("progress")]
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, 25)
    finished = events[-1].finished
    assert finished.usage.image_count == 1
    assert finished.usage.unet_rows == 50
    assert finished.usage.pixel_steps == 50 * 128 * 128
    assert 0 < finished.timings.denoise.ToNanoseconds() <= finished.timings.total.ToNanoseconds()


async def test_the_resolved_request_reproduces_the_images(stub: GenerationServiceAsyncStub) -> None:
    first = await events_of(stub, a_request(image_count=2, sampler=sampling_pb2.SAMPLER_EULER_ANCESTRAL))
    again = await events_of(stub, first[0].accepted.request)
    assert [e.image for e in first if e.HasField("image")] == [e.image for e in again if e.HasField("image")]
    assert again[0].accepted.request == first[0].accepted.request


async def test_seed_zero_is_a_seed_and_images_count_up_from_it(stub: GenerationServiceAsyncStub) -> None:
    events = await events_of(stub, a_request(seed=0, image_count=3))
    assert sorted((e.image.index, e.image.seed) for e in events if e.HasField("image")) == [(0, 0), (1, 1), (2, 2)]


async def test_every_sampler_and_schedule_reaches_what_the_prompt_means(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    for sampler in SAMPLERS:
        for schedule in ("NATIVE", "KARRAS"):
            request = a_request(
                sampler=f"SAMPLER_{sampler.upper()}", schedule=f"SCHEDULE_{schedule}", guidance_scale=1.0
            )
            image = await image_of(stub, request)
            expected = pixel_of(backend.mean_of(TEXT))
            assert image.getextrema() == ((expected, expected),) * 3, (sampler, schedule)


async def test_sizes_that_are_no_multiple_are_generated_larger_and_cropped(stub: GenerationServiceAsyncStub) -> None:
    events = await events_of(stub, a_request(width=333, height=17))
    [image] = [event.image for event in events if event.HasField("image")]
    assert Image.open(io.BytesIO(image.data)).size == (image.width, image.height) == (333, 17)
    assert events[-1].finished.usage.pixel_steps == 8 * 352 * 32


@pytest.mark.parametrize(("media_type", "name"), [("image/png", "PNG"), ("image/webp", "WEBP"), ("image/jpeg", "JPEG")])
async def test_the_image_has_the_format_that_was_asked_for(
    stub: GenerationServiceAsyncStub, media_type: str, name: str
) -> None:
    image = await image_of(stub, a_request(output={"media_type": media_type}))
    assert image.format == name


# Guidance


async def value_of(stub: GenerationServiceAsyncStub, **fields: Any) -> int:
    image = await image_of(stub, a_request(**fields))
    [(low, high), *_] = image.getextrema()
    assert low == high
    return int(low)


async def test_guidance_moves_from_the_empty_prompt_to_the_prompts(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    mean = backend.mean_of(TEXT)
    for scale in (0.0, 0.5, 1.0, 1.5):
        assert await value_of(stub, guidance_scale=scale) == pixel_of(scale * mean)


async def test_a_full_negative_prompt_replaces_the_empty_one_and_a_weak_one_only_moves_it(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    for weight, share in ((-2.0, 1.0), (-0.5, 0.25), (-4.0, 1.0)):
        prompts = [{"text": TEXT, "weight": 2.0}, {"text": "trees", "weight": weight}]
        positive, negative = backend.mean_of(TEXT), share * backend.mean_of("trees")
        expected = negative + 1.25 * (positive - negative)
        assert await value_of(stub, prompts=prompts, guidance_scale=1.25) == pytest.approx(pixel_of(expected), abs=1)


async def test_composable_blending_sums_the_predictions_by_weight(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    prompts = [{"text": TEXT, "weight": 0.75}, {"text": "trees", "weight": -0.25}]
    expected = 1.5 * (0.75 * backend.mean_of(TEXT) - 0.25 * backend.mean_of("trees"))
    value = await value_of(stub, prompts=prompts, guidance_scale=1.5, blending="BLENDING_COMPOSABLE")
    assert value == pytest.approx(pixel_of(expected), abs=1)


async def test_without_guidance_an_image_costs_one_row_a_step(stub: GenerationServiceAsyncStub) -> None:
    for fields, rows in (
        ({"guidance_scale": 1.0}, 4),
        ({"guidance_scale": 0.0}, 4),
        ({"guidance_interval": {"start": 0.5}}, 6),
        ({"guidance_interval": {"end": 0.25}}, 5),
        ({"blending": "BLENDING_COMPOSABLE", "prompts": [{"text": "a"}, {"text": "b"}]}, 12),
    ):
        events = await events_of(stub, a_request(**fields))
        assert events[-1].finished.usage.unet_rows == rows, fields


# Bad requests

BAD: list[tuple[dict[str, Any], set[str]]] = [
    ({"prompts": []}, {"prompts"}),
    ({"prompts": [{"text": "x"}] * 65}, {"prompts"}),
    ({"prompts": [{"text": "x", "weight": 0.0}]}, {"prompts"}),
    ({"prompts": [{"text": " \n"}, {"text": "ok"}, {"text": ""}]}, {"prompts[0].text", "prompts[2].text"}),
    ({"prompts": [{"text": "x" * 10_001}]}, {"prompts[0].text"}),
    ({"prompts": [{"text": "x", "weight": NAN}]}, {"prompts[0].weight"}),
    ({"prompts": [{"text": "x", "weight": 10.5}]}, {"prompts[0].weight"}),
    ({"width": 0}, {"width"}),
    ({"width": -1, "height": 2**31 - 1}, {"width", "height"}),
    ({"width": 15}, {"width"}),
    ({"width": 512, "height": 512}, {"width"}),
    ({"steps": 0}, {"steps"}),
    ({"steps": 10**9}, {"steps"}),
    ({"image_count": 0}, {"image_count"}),
    ({"image_count": 10**6}, {"image_count"}),
    ({"seed": -1}, {"seed"}),
    ({"seed": 2**63 - 1, "image_count": 2}, {"seed"}),
    ({"guidance_scale": NAN}, {"guidance_scale"}),
    ({"guidance_scale": INFINITY}, {"guidance_scale"}),
    ({"guidance_scale": -0.5}, {"guidance_scale"}),
    ({"guidance_scale": 1e38}, {"guidance_scale"}),
    ({"guidance_interval": {"start": NAN}}, {"guidance_interval.start"}),
    ({"guidance_interval": {"start": 0.5, "end": 0.5}}, {"guidance_interval.end"}),
    ({"sampler": 999}, {"sampler"}),
    ({"schedule": 999}, {"schedule"}),
    ({"blending": 999}, {"blending"}),
    ({"output": {"media_type": "image/gif"}}, {"output.media_type"}),
    ({"output": {"media_type": "image/png", "quality": 90}}, {"output.quality"}),
    ({"output": {"media_type": "image/jpeg", "quality": 0}}, {"output.quality"}),
    ({"request_id": "a\nb"}, {"request_id"}),
    ({"request_id": "x" * 129}, {"request_id"}),
    ({"mask": {"data": b"x"}}, {"mask"}),
    ({"prompts": [], "width": 0, "steps": 0, "guidance_scale": NAN}, {"prompts", "width", "steps", "guidance_scale"}),
]


@pytest.mark.parametrize(("fields", "violated"), BAD)
async def test_bad_fields_are_all_named_at_once_and_never_reach_the_models(
    stub: GenerationServiceAsyncStub, backend: FakeBackend, fields: dict[str, Any], violated: set[str]
) -> None:
    error = await failure_of(stub, a_request(**fields))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert violations_of(error).keys() == violated
    info = details_of(error, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == ("INVALID_REQUEST", "sdapi")
    assert info.metadata["request_id"]
    assert backend.calls == 0


async def test_an_unknown_engine_is_not_found_and_the_answer_names_the_engines(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    for engine in ("nope", "../../etc/passwd", "x" * 65_536, "tiny-landscape\0"):
        error = await failure_of(stub, a_request(engine=engine))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert "tiny-landscape" in (error.details() or "")
        assert details_of(error, error_details_pb2.ErrorInfo).reason == "UNKNOWN_ENGINE"
    assert backend.calls == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"clip_guidance": {}},
        {"init_image": {"data": b"x"}},
        {"init_image": {"data": b"x"}, "mask": {"data": b"x"}},
        {"preview": {}},
    ],
)
async def test_what_the_server_cannot_do_yet_is_unimplemented_and_never_ignored(
    stub: GenerationServiceAsyncStub, backend: FakeBackend, fields: dict[str, Any]
) -> None:
    error = await failure_of(stub, a_request(**fields))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert details_of(error, error_details_pb2.ErrorInfo).metadata["field"] in fields
    assert backend.calls == 0


async def test_bytes_that_are_no_message_are_an_invalid_request(server: Server) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = channel.unary_stream("/sdapi.v1.GenerationService/Generate")(b"\xff\xff\xff\xff")  # type: ignore[var-annotated]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [event async for event in call]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "DecodeError" not in (caught.value.details() or "")


async def test_a_prompt_that_is_too_long_for_the_text_encoder_is_refused_not_cut(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    error = await failure_of(stub, a_request(prompts=[{"text": "ok"}, {"text": "tree " * 76}]))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert violations_of(error).keys() == {"prompts[1].text"}
    assert not backend.batches


# Faults of the models


async def test_models_that_are_not_ready_are_unavailable_and_the_caller_is_told_when_to_retry(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    backend.ready = False
    await asyncio.sleep(0.2)
    error = await failure_of(stub, a_request())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert details_of(error, error_details_pb2.ErrorInfo).reason == "ENGINE_NOT_READY"
    assert details_of(error, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
    backend.ready = True
    await asyncio.sleep(0.2)
    assert await image_of(stub, a_request())


@pytest.mark.parametrize(
    ("fault", "code", "reason"),
    [
        (Unavailable("gone", "TRITON_UNAVAILABLE"), grpc.StatusCode.UNAVAILABLE, "TRITON_UNAVAILABLE"),
        (GenerationFailed("unet failed", "MODEL_ERROR"), grpc.StatusCode.INTERNAL, "MODEL_ERROR"),
        (ZeroDivisionError("secret /path"), grpc.StatusCode.INTERNAL, "INTERNAL"),
    ],
)
async def test_a_failing_model_is_a_status_without_insides_and_the_next_request_works(
    stub: GenerationServiceAsyncStub, backend: FakeBackend, server: Server, fault: Exception, code: Any, reason: str
) -> None:
    backend.error = fault
    error = await failure_of(stub, a_request(image_count=3))
    assert error.code() is code
    assert details_of(error, error_details_pb2.ErrorInfo).reason == reason
    assert "secret" not in (error.details() or "")
    backend.error = None
    assert await image_of(stub, a_request())
    assert (server.admission.active, server.admission.queued) == (0, 0)


async def test_an_image_that_is_not_finite_is_an_error_and_never_a_black_picture(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    backend.not_finite = True
    error = await failure_of(stub, a_request())
    assert error.code() is grpc.StatusCode.INTERNAL
    assert details_of(error, error_details_pb2.ErrorInfo).reason == "NOT_FINITE"
    assert backend.decoded == 0


# Company, cancellation, limits


async def test_leaving_the_stream_cancels_the_work_within_one_step(
    stub: GenerationServiceAsyncStub, backend: FakeBackend, server: Server
) -> None:
    backend.delay = 0.02
    call = stub.Generate(a_request(steps=150))
    async for event in call:
        if event.progress.step == 3:
            call.cancel()
            break
    await asyncio.sleep(0.1)
    steps = len(backend.batches)
    assert steps <= 6
    await asyncio.sleep(0.1)
    assert len(backend.batches) == steps
    assert (server.admission.active, server.admission.queued) == (0, 0)


async def test_a_deadline_ends_the_work(stub: GenerationServiceAsyncStub, backend: FakeBackend, server: Server) -> None:
    backend.delay = 0.02
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [event async for event in stub.Generate(a_request(steps=150), timeout=0.2)]
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.sleep(0.1)
    assert (server.admission.active, backend.running) == (0, 0)


async def test_requests_in_flight_share_unet_calls(stub: GenerationServiceAsyncStub, backend: FakeBackend) -> None:
    backend.delay = 0.005
    requests = [a_request(steps=6 + n, sampler=1 + n % 7, guidance_scale=1.0 + n % 2) for n in range(6)]
    results = await asyncio.gather(*(events_of(stub, request) for request in requests))
    rows = sum(events[-1].finished.usage.unet_rows for events in results)
    assert sum(backend.batches) == rows
    assert len(backend.batches) < rows / 3


@pytest.fixture
async def small_stub(settings: ServeSettings, backend: FakeBackend) -> AsyncIterator[GenerationServiceAsyncStub]:
    """A server that runs one generation, lets one wait, and gives each 0.5 s."""
    from sdapi.v1.generation_pb2_grpc import GenerationServiceStub

    small = settings.model_copy(update={"max_active": 1, "max_queued": 1, "max_generation_seconds": 0.5})
    async with (
        Server(small, backend) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield GenerationServiceStub(channel)


async def test_a_waiting_request_knows_its_position_and_one_too_many_is_refused_at_once(
    small_stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    backend.delay = 0.02
    calls = []
    for position in (0, 1):
        call = small_stub.Generate(a_request(steps=10))
        assert (await call.read()).accepted.queue_position == position  # type: ignore[union-attr]
        calls.append(call)
    error = await failure_of(small_stub, a_request())
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details_of(error, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
    assert dict(error.trailing_metadata() or ())["grpc-retry-pushback-ms"]
    for call in calls:
        assert [event async for event in call][-1].HasField("finished")


async def test_a_generation_that_takes_too_long_is_ended_by_the_server(
    small_stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    backend.delay = 0.05
    error = await failure_of(small_stub, a_request(steps=150))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert details_of(error, error_details_pb2.ErrorInfo).reason == "TIME_LIMIT"


async def test_a_stopping_server_finishes_what_runs_and_refuses_the_rest(
    settings: ServeSettings, backend: FakeBackend
) -> None:
    from sdapi.v1.generation_pb2_grpc import GenerationServiceStub

    backend.delay = 0.02
    server = await Server(settings, backend).__aenter__()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub: GenerationServiceAsyncStub = GenerationServiceStub(channel)
        health = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        readiness = health_pb2.HealthCheckRequest(service="sdapi.v1.GenerationService")
        watch = health.Watch(readiness)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        running = asyncio.create_task(events_of(stub, a_request(steps=30)))
        while server.admission.active == 0:
            await asyncio.sleep(0.01)
        stopping = asyncio.create_task(server.__aexit__(None, None, None))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        error = await failure_of(stub, a_request())
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert details_of(error, error_details_pb2.ErrorInfo).reason == "SERVER_STOPPING"
        assert (await running)[-1].HasField("finished")
        await asyncio.wait_for(stopping, 3)
    assert backend.closed


# Engines, health, reflection


async def test_engines_are_published_with_everything_that_a_caller_needs(stub: GenerationServiceAsyncStub) -> None:
    [engine] = (await stub.ListEngines(generation_pb2.ListEnginesRequest())).engines
    assert engine.id == "tiny-landscape"
    assert engine.ready
    assert engine.digest.startswith("sha256:")
    assert (engine.native_width, engine.native_height) == (128, 128)
    assert engine.limits.min_size == 16
    assert engine.defaults.steps == 25
    assert len(engine.samplers) == len(SAMPLERS)
    assert sampling_pb2.SAMPLER_UNSPECIFIED not in engine.samplers
    assert engine.license.name == "Apache-2.0"


async def test_health_tells_liveness_from_readiness(server: Server, backend: FakeBackend) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]

        async def status(service: str) -> int:
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            return int(answer.status)

        assert await status("sdapi.v1.GenerationService") == health_pb2.HealthCheckResponse.SERVING
        backend.ready = False
        await asyncio.sleep(0.2)
        assert await status("sdapi.v1.GenerationService") == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await status("") == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_lists_the_service(server: Server) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[no-untyped-call]
        call = reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        answer = await call.read()
        call.cancel()
    assert "sdapi.v1.GenerationService" in {service.name for service in answer.list_services_response.service}

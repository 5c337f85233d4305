"""The servicer over a backend without weights: guidance, faults, company, cancellation, drain."""

from __future__ import annotations

import asyncio
import io
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from calls import TEXT, a_request, details_of, events_of, failure_of, image_of, images_of
from fakes import FakeBackend, pixel_of
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image
from sdapi.v1.generation_pb2_grpc import GenerationServiceStub
from sdserver.errors import GenerationFailed, Unavailable
from sdserver.samplers import SAMPLERS
from sdserver.server import Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sdapi.v1.generation_pb2_grpc import GenerationServiceAsyncStub
    from sdserver.settings import ServeSettings

# Samplers


async def test_every_sampler_and_schedule_reaches_what_the_prompt_means(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    for sampler in SAMPLERS:
        for schedule in ("NATIVE", "KARRAS", "EXPONENTIAL"):
            request = a_request(
                sampler=f"SAMPLER_{sampler.upper()}", schedule=f"SCHEDULE_{schedule}", guidance_scale=1.0
            )
            image = await image_of(stub, request)
            expected = pixel_of(backend.mean_of(TEXT))
            assert image.getextrema() == ((expected, expected),) * 3, (sampler, schedule)


# Guidance


async def value_of(stub: GenerationServiceAsyncStub, **fields: Any) -> int:
    image = await image_of(stub, a_request(**fields))
    low, high = image.convert("L").getextrema()
    assert low == high
    return int(low)  # type: ignore[arg-type]


async def test_guidance_moves_from_the_empty_prompt_to_the_prompts(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    mean = backend.mean_of(TEXT)
    for scale in (0.0, 0.5, 1.0, 1.5):
        assert await value_of(stub, guidance_scale=scale) == pixel_of(scale * mean)


async def test_a_full_negative_prompt_replaces_the_empty_one_and_a_weak_one_only_moves_it(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    for weight, share in ((-2.0, 1.0), (-1.0, 0.5), (-0.5, 0.25), (-4.0, 1.0)):
        prompts = [{"text": TEXT, "weight": 2.0}, {"text": "trees", "weight": weight}]
        positive, negative = backend.mean_of(TEXT), share * backend.mean_of("trees")
        expected = negative + 1.25 * (positive - negative)
        assert await value_of(stub, prompts=prompts, guidance_scale=1.25) == pytest.approx(pixel_of(expected), abs=1)


async def test_a_negative_prompt_alone_pushes_away_the_more_the_greater_its_weight(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    for weight in (-0.25, -0.5, -1.0):
        expected = (1 - 1.5) * -weight * backend.mean_of("trees")
        value = await value_of(stub, prompts=[{"text": "trees", "weight": weight}], guidance_scale=1.5)
        assert value == pytest.approx(pixel_of(expected), abs=1)


async def test_positive_prompts_are_blended_in_proportion_to_their_weights(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    for weight in (0.0, 0.5, 1.0, 2.0, 8.0):
        prompts = [{"text": TEXT}, {"text": "trees", "weight": weight}]
        expected = (backend.mean_of(TEXT) + weight * backend.mean_of("trees")) / (1 + weight)
        assert await value_of(stub, prompts=prompts, guidance_scale=1.0) == pytest.approx(pixel_of(expected), abs=1)


async def test_emphasis_reaches_the_text_encoder(stub: GenerationServiceAsyncStub, backend: FakeBackend) -> None:
    for factor in (0.0, 1.0, 1.5):
        prompts = [{"text": "trees", "emphasis": [{"start": 0, "end": 5, "factor": factor}]}]
        value = await value_of(stub, prompts=prompts, guidance_scale=1.0)
        assert value == pytest.approx(pixel_of(factor * backend.mean_of("trees")), abs=1)


async def test_prompts_of_different_lengths_are_blended_over_the_longest(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    long = "tree " * 100
    # The short prompt's second chunk is empty, which means 0.
    expected = (backend.mean_of(TEXT) / 2 + backend.mean_of(long)) / 2
    value = await value_of(stub, prompts=[{"text": TEXT}, {"text": long}], guidance_scale=1.0)
    assert value == pytest.approx(pixel_of(expected), abs=1)


async def test_composable_blending_sums_the_predictions_by_weight(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    prompts = [{"text": TEXT, "weight": 0.75}, {"text": "trees", "weight": -0.25}]
    expected = 1.5 * (0.75 * backend.mean_of(TEXT) - 0.25 * backend.mean_of("trees"))
    value = await value_of(stub, prompts=prompts, guidance_scale=1.5, blending="BLENDING_COMPOSABLE")
    assert value == pytest.approx(pixel_of(expected), abs=1)


# Bytes


async def test_bytes_that_are_no_message_are_an_invalid_request(server: Server) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        generate: grpc.aio.UnaryStreamMultiCallable[bytes, bytes]
        generate = channel.unary_stream("/sdapi.v1.GenerationService/Generate")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [event async for event in generate(b"\xff\xff\xff\xff")]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "DecodeError" not in (caught.value.details() or "")


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
    await asyncio.sleep(0.2)  # an engine that did not answer is asked again first
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
        events = aiter(call)
        assert (await anext(events)).accepted.queue_position == position
        calls.append(events)
    before = backend.texts.copy()
    error = await failure_of(small_stub, a_request(prompts=[{"text": "one too many"}]))
    assert backend.texts == before
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details_of(error, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
    assert dict(error.trailing_metadata() or ())["grpc-retry-pushback-ms"]
    for events in calls:
        assert [event async for event in events][-1].HasField("finished")


async def test_a_request_that_waits_holds_no_text_states_and_asks_for_them_again(
    settings: ServeSettings, backend: FakeBackend
) -> None:
    forgetful = settings.model_copy(update={"max_active": 1, "text_cache_mb": 0})
    backend.delay = 0.02
    async with (
        Server(forgetful, backend) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub: GenerationServiceAsyncStub = GenerationServiceStub(channel)
        streams = []
        for text in ("first", TEXT):
            streams.append(aiter(stub.Generate(a_request(prompts=[{"text": text}], guidance_scale=1.0))))
            assert (await anext(streams[-1])).HasField("accepted")
        assert backend.texts.count(TEXT) == 1
        [image] = images_of([event async for event in streams[1]])
        assert (backend.texts.count("first"), backend.texts.count(TEXT)) == (1, 2)
    expected = pixel_of(backend.mean_of(TEXT))
    assert Image.open(io.BytesIO(image.data)).getextrema() == ((expected, expected),) * 3


async def test_a_generation_that_takes_too_long_is_ended_by_the_server(
    small_stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    backend.delay = 0.05
    error = await failure_of(small_stub, a_request(steps=150))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert details_of(error, error_details_pb2.ErrorInfo).reason == "TIME_LIMIT"


async def test_encoding_that_takes_too_long_is_ended_by_the_server(
    small_stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    backend.encode_delay = 5.0
    error = await failure_of(small_stub, a_request())
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert details_of(error, error_details_pb2.ErrorInfo).reason == "TIME_LIMIT"


async def test_a_stopping_server_finishes_what_runs_and_refuses_the_rest(
    settings: ServeSettings, backend: FakeBackend
) -> None:
    backend.delay = 0.02
    server = await Server(settings, backend).__aenter__()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub: GenerationServiceAsyncStub = GenerationServiceStub(channel)
        health: Any = health_pb2_grpc.HealthStub(channel)
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


# Health, reflection


async def test_health_tells_liveness_from_readiness(server: Server, backend: FakeBackend) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)

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
        stub_class: Any = reflection_pb2_grpc.ServerReflectionStub
        call = stub_class(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        answer = await call.read()
        call.cancel()
    assert "sdapi.v1.GenerationService" in {service.name for service in answer.list_services_response.service}

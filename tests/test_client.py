"""The SDK against a real gRPC server whose answers are written here. What holds for one client holds for its twin."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import pytest
from fake_service import (
    AnyClient,
    BlockingTwin,
    Call,
    Responses,
    Waiting,
    accepted,
    finished,
    image,
    one_image,
    serving,
)
from sdclient import (
    Accepted,
    AsyncClient,
    CancelledError,
    Client,
    DeadlineExceededError,
    Finished,
    Image,
    InitImage,
    Progress,
    ServerBusyError,
    Timings,
    UnavailableError,
    Usage,
)
from sdclient._wire import CHANNEL_OPTIONS
from sdserver.server import OPTIONS as SERVER_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sdapi.v1.generation_pb2 import GenerateRequest
    from sdclient import Event


@pytest.fixture(params=[Client, BlockingTwin], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Callable[..., AnyClient]:
    """Makes a client of either kind."""
    kind: Callable[..., AnyClient] = request.param
    return kind


# ------------------------------------------------------------------------------------------------------------- events


def test_a_stream_yields_typed_events_in_the_order_of_the_server(connect: Callable[..., AnyClient]) -> None:
    with serving() as service, connect(service.target) as client, client.stream("a lake") as events:
        first, *rest = events
    assert isinstance(first, Accepted)
    assert rest == [
        Progress(0, 1),
        Progress(1, 1),
        Image(data=b"png", media_type="image/png", width=64, height=32, index=0, seed=7),
        Finished(
            Usage(image_count=1, unet_rows=40, pixel_steps=81_920),
            Timings(queue=0.0, encode=0.0, denoise=1.25, decode=0.0, total=1.5),
        ),
    ]


def test_generate_returns_the_images_in_the_order_of_their_index(connect: Callable[..., AnyClient]) -> None:
    def answer(request: GenerateRequest, call: Call) -> Responses:
        yield accepted(request)
        for index in (2, 0, 1):
            yield image(index, seed=5 + index)
        yield finished()

    with serving(answer) as service, connect(service.target) as client:
        images = client.generate("a lake", image_count=3)
    assert [(made.index, made.seed) for made in images] == [(0, 5), (1, 6), (2, 7)]


def test_engines_are_typed(connect: Callable[..., AnyClient]) -> None:
    with serving() as service, connect(service.target) as client:
        [engine] = client.engines()
    assert engine.id == "tiny-landscape"
    assert engine.ready
    assert engine.limits.size_multiple == 32
    assert (engine.defaults.sampler, engine.defaults.guidance_scale) == ("dpmpp_2m", 7.1)
    assert engine.samplers == ("euler", "dpmpp_2m")
    assert (engine.eta_samplers, engine.churn_samplers) == ((), ("euler",))
    assert engine.media_types == ("image/png", "image/webp")
    assert engine.license.name == "Apache-2.0"


def test_an_image_may_be_larger_than_the_message_limit_that_grpc_starts_with(connect: Callable[..., AnyClient]) -> None:
    data = bytes(5 << 20)

    def answer(request: GenerateRequest, call: Call) -> Responses:
        yield image(data=data)
        yield finished()

    with serving(answer) as service, connect(service.target) as client:
        [made] = client.generate("a lake")
    assert made.data == data


# ------------------------------------------------------------------------------------------------------------- leaving


def test_leaving_the_stream_cancels_the_call(connect: Callable[..., AnyClient]) -> None:
    answer = Waiting()
    with serving(answer) as service, connect(service.target) as client:
        with client.stream("a lake") as events:
            for event in events:
                if isinstance(event, Progress):
                    break
        assert answer.left.wait(10)


def test_an_error_in_the_block_cancels_the_call_and_comes_out_unchanged(connect: Callable[..., AnyClient]) -> None:
    def divide(event: Event) -> float:
        return 1 / 0

    answer = Waiting()
    with serving(answer) as service, connect(service.target) as client:
        with pytest.raises(ZeroDivisionError), client.stream("a lake") as events:
            divide(next(events))
        assert answer.left.wait(10)


def test_a_stream_that_was_left_yields_nothing_more(connect: Callable[..., AnyClient]) -> None:
    with serving(Waiting()) as service, connect(service.target) as client:
        with client.stream("a lake") as events:
            next(events)
        with pytest.raises(CancelledError):
            list(events)


def test_an_interrupt_while_waiting_for_an_event_cancels_the_call() -> None:
    def consume(events: Iterator[Event]) -> None:
        for event in events:
            if isinstance(event, Progress):
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()

    answer = Waiting()
    with serving(answer) as service, Client(service.target) as client:
        with pytest.raises(KeyboardInterrupt), client.stream("a lake") as events:
            consume(events)
        assert answer.left.wait(10)


def test_closing_the_client_ends_the_calls_of_other_threads() -> None:
    with serving(Waiting()) as service, ThreadPoolExecutor() as pool:
        client = Client(service.target)
        started = threading.Event()

        def consume() -> None:
            with client.stream("a lake") as events:
                for _ in events:
                    started.set()

        consumer = pool.submit(consume)
        assert started.wait(10)
        client.close()
        with pytest.raises(CancelledError):
            consumer.result(10)


async def test_closing_the_client_ends_the_calls_of_other_tasks_without_cancelling_the_tasks() -> None:
    with serving(Waiting()) as service:
        client = AsyncClient(service.target)
        started = asyncio.Event()

        async def consume() -> None:
            async with client.stream("a lake") as events:
                async for _ in events:
                    started.set()

        consumer = asyncio.create_task(consume())
        await started.wait()
        await client.close()
        with pytest.raises(CancelledError):
            await consumer


async def test_cancelling_a_task_cancels_its_call() -> None:
    answer = Waiting()
    with serving(answer) as service:
        async with AsyncClient(service.target) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await client.generate("a lake")
            assert await asyncio.to_thread(answer.left.wait, 10)


def test_an_async_client_may_be_made_before_there_is_an_event_loop() -> None:
    with serving() as service:
        client = AsyncClient(service.target)

        async def use() -> list[Image]:
            async with client:
                return await client.generate("a lake")

        assert len(asyncio.run(use())) == 1


def test_threads_may_share_a_client() -> None:
    with serving() as service, Client(service.target) as client, ThreadPoolExecutor(8) as pool:
        assert [len(images) for images in pool.map(client.generate, ["a lake"] * 32)] == [1] * 32


def test_a_given_channel_is_used_and_stays_open() -> None:
    with serving() as service, grpc.insecure_channel(service.target) as channel:
        for _ in range(2):
            with Client(channel=channel) as client:
                assert len(client.generate("a lake")) == 1


async def test_a_given_channel_of_asyncio_is_used_and_stays_open() -> None:
    with serving() as service:
        async with grpc.aio.insecure_channel(service.target) as channel:
            for _ in range(2):
                async with AsyncClient(channel=channel) as client:
                    assert len(await client.generate("a lake")) == 1


# ---------------------------------------------------------------------------------------------------- time and retries


def test_a_call_that_outlasts_its_timeout_fails_and_is_cancelled(connect: Callable[..., AnyClient]) -> None:
    answer = Waiting()
    with serving(answer) as service, connect(service.target) as client:
        with pytest.raises(DeadlineExceededError, match=r"within 0\.3 s; pass a greater timeout"):
            client.generate("a lake", timeout=0.3)
        assert answer.left.wait(10)


@pytest.mark.parametrize(
    ("of_client", "of_call", "expected"), [({}, {}, 600), ({"timeout": 50}, {}, 50), ({}, {"timeout": 20}, 20)]
)
def test_every_call_has_a_timeout(
    connect: Callable[..., AnyClient], of_client: dict[str, float], of_call: dict[str, float], expected: float
) -> None:
    remaining: list[float | None] = []

    def answer(request: GenerateRequest, call: Call) -> Responses:
        remaining.append(call.context.time_remaining())
        return one_image(request, call)

    with serving(answer) as service, connect(service.target, **of_client) as client:
        client.generate("a lake", **of_call)  # type: ignore[arg-type]
    assert remaining == [pytest.approx(expected, abs=10)]


def test_a_timeout_of_none_is_no_timeout(connect: Callable[..., AnyClient]) -> None:
    remaining: list[float | None] = []

    def answer(request: GenerateRequest, call: Call) -> Responses:
        remaining.append(call.context.time_remaining())
        return one_image(request, call)

    with serving(answer) as service, connect(service.target) as client:
        client.generate("a lake", timeout=None)
    assert remaining[0] is None or remaining[0] > 1e6


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_a_call_is_repeated_while_nothing_of_its_answer_has_arrived(
    connect: Callable[..., AnyClient], code: grpc.StatusCode
) -> None:
    def answer(request: GenerateRequest, call: Call) -> Responses:
        if len(service.requests) < 3:
            call.fail(code, "not now")
        yield from one_image(request, call)

    # An initial image: a request of this size would not fit gRPC's own buffer for retries.
    with serving(answer) as service, connect(service.target) as client:
        assert len(client.generate("a lake", init_image=InitImage(bytes(1 << 20)))) == 1
    assert len(service.requests) == 3


def test_a_call_is_not_repeated_after_its_first_event(connect: Callable[..., AnyClient]) -> None:
    def answer(request: GenerateRequest, call: Call) -> Responses:
        yield accepted(request)
        call.fail(grpc.StatusCode.UNAVAILABLE, "gone")

    with serving(answer) as service, connect(service.target) as client, pytest.raises(UnavailableError):
        client.generate("a lake")
    assert len(service.requests) == 1


def test_the_server_says_when_to_come_back(connect: Callable[..., AnyClient]) -> None:
    times: list[float] = []

    def answer(request: GenerateRequest, call: Call) -> Responses:
        times.append(time.monotonic())
        if len(times) == 1:
            call.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", pushback_ms=700)
        yield from one_image(request, call)

    with serving(answer) as service, connect(service.target) as client:
        client.generate("a lake")
    # Without being told, gRPC waits 0.24 s at most before its first retry.
    assert times[1] - times[0] > 0.6


def test_the_server_says_not_to_come_back(connect: Callable[..., AnyClient]) -> None:
    def answer(request: GenerateRequest, call: Call) -> Responses:
        call.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", pushback_ms=-1)

    with serving(answer) as service, connect(service.target) as client, pytest.raises(ServerBusyError):
        client.generate("a lake")
    assert len(service.requests) == 1


def test_the_server_allows_pings_as_often_as_the_sdk_sends_them() -> None:
    sdk, server = dict(CHANNEL_OPTIONS), dict(SERVER_OPTIONS)
    # One that pings more often than a server allows is disconnected.
    assert int(sdk["grpc.keepalive_time_ms"]) > server["grpc.http2.min_recv_ping_interval_without_data_ms"]


def test_the_api_key_goes_with_every_call(connect: Callable[..., AnyClient]) -> None:
    with serving() as service:
        with connect(service.target, api_key="secret") as client:
            client.generate("a lake")
        with connect(service.target) as client:
            client.generate("a lake")
    assert [metadata.get("authorization") for metadata in service.metadata] == ["Bearer secret", None]


def test_a_client_outlives_a_restart_of_its_server(connect: Callable[..., AnyClient]) -> None:
    with serving() as service:
        client = connect(service.target)
        client.generate("a lake")
    with serving(port=int(service.target.rpartition(":")[2])), client:
        assert len(client.generate("a lake")) == 1

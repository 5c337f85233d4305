"""A server for the tests of the SDK, whose answers the tests themselves write, and one face for both clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.status_pb2 import Status
from sdapi.v1 import engine_pb2, generation_pb2
from sdapi.v1.generation_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server
from sdclient import AsyncClient, Client

if TYPE_CHECKING:
    from typing import Self, Unpack

    from google.protobuf.message import Message
    from sdclient import Engine, Event, GenerateOptions, Image, Prompts

Responses = Iterator[generation_pb2.GenerateResponse]
Answer = Callable[[generation_pb2.GenerateRequest, "Call"], Responses]

ENGINE = engine_pb2.Engine(
    id="tiny-landscape",
    name="Tiny landscape",
    description="Small landscapes.",
    ready=True,
    digest="d1",
    native_width=384,
    native_height=128,
    limits=engine_pb2.EngineLimits(
        min_size=16,
        max_size=1024,
        max_pixels=1 << 20,
        size_multiple=32,
        max_steps=100,
        max_image_count=16,
        max_prompt_chunks=16,
    ),
    defaults=engine_pb2.EngineDefaults(
        width=384, height=128, steps=20, guidance_scale=7.1, sampler="SAMPLER_DPMPP_2M", schedule="SCHEDULE_KARRAS"
    ),
    samplers=["SAMPLER_EULER", "SAMPLER_DPMPP_2M"],
    churn_samplers=["SAMPLER_EULER"],
    schedules=["SCHEDULE_KARRAS"],
    media_types=["image/png", "image/webp"],
    license=engine_pb2.License(name="Apache-2.0", use_restrictions="None."),
)


def accepted(
    request: generation_pb2.GenerateRequest | None = None, queue_position: int = 0
) -> generation_pb2.GenerateResponse:
    return generation_pb2.GenerateResponse(
        accepted=generation_pb2.Accepted(
            request=request,
            queue_position=queue_position,
            prompt_usage=[_usage(prompt) for prompt in request.prompts] if request else [],
        )
    )


def _usage(prompt: generation_pb2.Prompt) -> generation_pb2.PromptUsage:
    """As if words were tokens."""
    tokens = len(prompt.text.split())
    return generation_pb2.PromptUsage(tokens=tokens, chunks=-(-tokens // 75))


def progress(step: int, steps: int) -> generation_pb2.GenerateResponse:
    return generation_pb2.GenerateResponse(progress=generation_pb2.Progress(step=step, steps=steps))


def image(index: int = 0, seed: int = 7, data: bytes = b"png") -> generation_pb2.GenerateResponse:
    return generation_pb2.GenerateResponse(
        image=generation_pb2.Image(index=index, seed=seed, data=data, media_type="image/png", width=64, height=32)
    )


def finished() -> generation_pb2.GenerateResponse:
    event = generation_pb2.Finished(
        usage=generation_pb2.Usage(image_count=1, unet_rows=40, pixel_steps=81_920),
        timings=generation_pb2.Timings(),
    )
    event.timings.denoise.FromMilliseconds(1250)
    event.timings.total.FromMilliseconds(1500)
    return generation_pb2.GenerateResponse(finished=event)


def one_image(request: generation_pb2.GenerateRequest, call: Call) -> Responses:
    """The answer of a server for which all is well."""
    yield accepted(request)
    yield progress(0, 1)
    yield progress(1, 1)
    yield image()
    yield finished()


class Call:
    """The server's side of one call."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self.context = context

    def fail(self, code: grpc.StatusCode, message: str, *details: Message, pushback_ms: int | None = None) -> NoReturn:
        """Ends the call with a status, its details, and how long a retry should wait."""
        trailers: list[tuple[str, str | bytes]] = []
        if details:
            status = Status(code=code.value[0], message=message)
            for detail in details:
                packed = AnyMessage()
                packed.Pack(detail)
                status.details.append(packed)
            trailers.append(("grpc-status-details-bin", status.SerializeToString()))
        if pushback_ms is not None:
            trailers.append(("grpc-retry-pushback-ms", str(pushback_ms)))
        self.context.set_trailing_metadata(tuple(trailers))
        self.context.abort(code, message)


class Waiting:
    """An answer that does not end by itself."""

    def __init__(self) -> None:
        self.started = threading.Event()
        """Set when the events are on their way."""
        self.left = threading.Event()
        """Set when the client has left the call."""

    def __call__(self, request: generation_pb2.GenerateRequest, call: Call) -> Responses:
        call.context.add_callback(self.left.set)
        return self._events(request)

    def _events(self, request: generation_pb2.GenerateRequest) -> Responses:
        yield accepted(request)
        yield progress(1, 9)
        self.started.set()
        self.left.wait()


class FakeService(GenerationServiceServicer):
    """Answers every Generate with `answer` and remembers what came."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.target = ""
        self.engines = [ENGINE]
        self.requests: list[generation_pb2.GenerateRequest] = []
        self.metadata: list[dict[str, str | bytes]] = []

    def Generate(self, request: generation_pb2.GenerateRequest, context: grpc.ServicerContext) -> Responses:  # noqa: N802
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        return self._answer(request, Call(context))

    def ListEngines(  # noqa: N802
        self, request: generation_pb2.ListEnginesRequest, context: grpc.ServicerContext
    ) -> generation_pb2.ListEnginesResponse:
        return generation_pb2.ListEnginesResponse(engines=self.engines)


@contextmanager
def serving(answer: Answer = one_image, *, port: int = 0) -> Iterator[FakeService]:
    """A real gRPC server on loopback."""
    service = FakeService(answer)
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        add_GenerationServiceServicer_to_server(service, server)
        service.target = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
        server.start()
        try:
            yield service
        finally:
            server.stop(0).wait()


class BlockingTwin:
    """An AsyncClient with the face of a Client, so that one test speaks for both."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(*arguments, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.run(self._client.close())
        self._runner.close()

    def generate(self, prompts: Prompts, **options: Unpack[GenerateOptions]) -> list[Image]:
        return self._runner.run(self._client.generate(prompts, **options))

    def engines(self, **options: Any) -> list[Engine]:
        return self._runner.run(self._client.engines(**options))

    @contextmanager
    def stream(self, prompts: Prompts, **options: Unpack[GenerateOptions]) -> Iterator[Iterator[Event]]:
        stream = self._client.stream(prompts, **options)
        events = self._runner.run(stream.__aenter__())

        async def following() -> Event | None:
            return await anext(events, None)

        def each() -> Iterator[Event]:
            while (event := self._runner.run(following())) is not None:
                yield event

        try:
            yield each()
        finally:
            self._runner.run(stream.__aexit__(None, None, None))


AnyClient = Client | BlockingTwin

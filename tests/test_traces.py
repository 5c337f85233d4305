"""One trace a request, from its caller to the models; shared calls are linked to all requests in them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from concurrent import futures
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
import sdserver.logs
import structlog
from calls import a_request, events_of, failure_of
from fakes import FakeBackend
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from sdapi.v1.generation_pb2_grpc import GenerationServiceStub
from sdclient import AsyncClient, Client
from sdserver.backends.observed import ObservedBackend
from sdserver.backends.triton import TritonBackend
from sdserver.errors import GenerationFailed
from sdserver.server import Server
from sdserver.traces import CLOSE_SECONDS, Traces, headers
from tritonclient.grpc import service_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sdapi.v1.generation_pb2_grpc import GenerationServiceAsyncStub
    from sdserver.engines import Catalog
    from sdserver.settings import ServeSettings

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = ("traceparent", f"00-{TRACE_ID}-b7ad6b7169203331-01")
STAGES = ("encode", "queue", "denoise", "decode", "write")


class Spans:
    """The spans that a server has ended."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()

    def named(self, name: str, trace_id: int | None = None) -> list[ReadableSpan]:
        return [
            span
            for span in self.exporter.get_finished_spans()
            if span.name == name and trace_id in (None, context_of(span).trace_id)
        ]

    def only(self, name: str) -> ReadableSpan:
        [span] = self.named(name)
        return span

    def parent_of(self, span: ReadableSpan) -> ReadableSpan | None:
        return next(
            (
                other
                for other in self.exporter.get_finished_spans()
                if span.parent is not None and context_of(other).span_id == span.parent.span_id
            ),
            None,
        )


def context_of(span: ReadableSpan) -> trace.SpanContext:
    context = span.get_span_context()
    assert context is not None
    return context


GENERATE = "sdapi.v1.GenerationService/Generate"


@pytest.fixture
def spans() -> Spans:
    return Spans()


@pytest.fixture
async def server(settings: ServeSettings, backend: FakeBackend, spans: Spans) -> AsyncIterator[Server]:
    async with Server(settings, backend, [Traces(SimpleSpanProcessor(spans.exporter))]) as server:
        yield server


async def test_a_request_is_one_trace_of_its_stages_and_the_models_that_they_call(
    stub: GenerationServiceAsyncStub, spans: Spans
) -> None:
    await events_of(stub, a_request(request_id="r-1", image_count=2, steps=3))
    call = spans.only(GENERATE)
    assert call.kind is SpanKind.SERVER
    assert call.parent is None
    assert call.status.status_code is StatusCode.UNSET
    attributes = dict(call.attributes or {})
    assert (
        attributes.items()
        >= {
            "rpc.system": "grpc",
            "rpc.method": "Generate",
            "sd.request_id": "r-1",
            "sd.engine": "tiny-landscape",
            "sd.tenant": "anonymous",
            "sd.outcome": "ok",
            "sd.steps": 3,
            "sd.image_count": 2,
        }.items()
    )
    assert not any("dusk" in str(value) for value in attributes.values()), "prompts are nobody's business"
    trace_id = context_of(call).trace_id
    for stage in STAGES:
        found = spans.named(stage, trace_id)
        assert len(found) == (1 if stage in ("encode", "queue") else 2), stage
        assert all(spans.parent_of(span) is call for span in found), stage
    assert {dict(span.attributes or {})["sd.image"] for span in spans.named("denoise")} == {0, 1}
    for encoding in spans.named("text_encoder", trace_id):
        assert spans.parent_of(encoding) is spans.only("encode")
        assert encoding.kind is SpanKind.CLIENT


async def test_a_shared_call_has_one_span_which_all_its_requests_are_linked_with(
    stub: GenerationServiceAsyncStub, spans: Spans, backend: FakeBackend
) -> None:
    backend.delay = 0.02
    await asyncio.gather(*(events_of(stub, a_request(steps=6)) for _ in range(3)))
    batches = spans.named("unet batch")
    assert len(batches) == len(backend.batches)
    shared = max(batches, key=lambda batch: len(batch.links))
    assert len(shared.links) == 3
    assert len({link.context.trace_id for link in shared.links}) == 3
    assert dict(shared.attributes or {})["sd.images"] == 3
    denoising = {context_of(span).span_id: span for span in spans.named("denoise")}
    for link in shared.links:
        asker = denoising[link.context.span_id]
        assert context_of(shared).span_id in {back.context.span_id for back in asker.links}
    assert context_of(shared).trace_id not in {context_of(call).trace_id for call in spans.named(GENERATE)}
    [model] = [span for span in spans.named("unet") if spans.parent_of(span) is shared]
    assert dict(model.attributes or {})["sd.rows"] == 6


async def test_the_trace_of_the_caller_goes_on_in_the_server_and_its_id_is_in_the_log(
    server: Server, spans: Spans, capsys: pytest.CaptureFixture[str]
) -> None:
    before = structlog.get_config()
    sdserver.logs.configure("info", "json")
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            call = GenerationServiceStub(channel).Generate(a_request(request_id="r-2"), metadata=[TRACEPARENT])
            _ = [event async for event in call]
    finally:
        structlog.configure(**before)
    span = spans.only(GENERATE)
    assert trace.format_trace_id(context_of(span).trace_id) == TRACE_ID
    assert span.parent is not None
    assert trace.format_span_id(span.parent.span_id) == "b7ad6b7169203331"
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    [generated] = [line for line in lines if line["event"] == "generated"]
    assert (generated["trace_id"], generated["request_id"]) == (TRACE_ID, "r-2")


async def test_both_clients_send_along_the_trace_of_their_caller(server: Server, spans: Spans) -> None:
    tracer = TracerProvider().get_tracer("test")
    target = f"127.0.0.1:{server.port}"

    def blocking() -> None:
        with Client(target) as client:
            client.generate("a lake", steps=1)

    with tracer.start_as_current_span("work") as work:
        async with AsyncClient(target) as client:
            await client.generate("a lake", steps=1)
            await client.engines()
        await asyncio.to_thread(blocking)
    async with AsyncClient(target) as client:
        await client.generate("a lake", steps=1)
    ids = [context_of(span).trace_id for span in spans.named(GENERATE)]
    mine = work.get_span_context().trace_id
    assert ids[:2] == [mine, mine]
    assert ids[2] != mine, "outside of the span"
    assert len(spans.named("sdapi.v1.GenerationService/ListEngines", mine)) == 1


async def test_a_fault_of_the_server_is_an_error_and_a_mistake_of_the_caller_is_none(
    stub: GenerationServiceAsyncStub, spans: Spans, backend: FakeBackend
) -> None:
    await failure_of(stub, a_request(steps=0))
    backend.not_finite = True
    await failure_of(stub, a_request())
    mistake, fault = spans.named(GENERATE)
    assert mistake.status.status_code is StatusCode.UNSET
    assert dict(mistake.attributes or {})["sd.reason"] == "INVALID_REQUEST"
    assert fault.status.status_code is StatusCode.ERROR
    assert fault.status.description == "NOT_FINITE"


async def test_a_caller_that_goes_ends_its_spans(
    stub: GenerationServiceAsyncStub, spans: Spans, backend: FakeBackend
) -> None:
    backend.delay = 0.05
    call = stub.Generate(a_request(steps=100))
    await aiter(call).__anext__()
    while not backend.running:
        await asyncio.sleep(0.005)
    call.cancel()
    await asyncio.sleep(0.2)
    span = spans.only(GENERATE)
    assert dict(span.attributes or {})["sd.outcome"] == "cancelled"
    assert spans.only("denoise").end_time is not None
    assert not any(span.events for span in spans.exporter.get_finished_spans()), "no traceback is sent anywhere"


async def test_what_a_caller_does_not_want_to_be_traced_is_not(server: Server, spans: Spans) -> None:
    not_sampled = ("traceparent", TRACEPARENT[1].removesuffix("01") + "00")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = GenerationServiceStub(channel).Generate(a_request(), metadata=[not_sampled])
        assert len([event async for event in call]) > 2
    assert spans.exporter.get_finished_spans() == ()


async def test_shared_calls_of_a_request_that_is_traced_are_traced_however_few_requests_are(
    settings: ServeSettings, spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    traces = Traces(SimpleSpanProcessor(spans.exporter))
    async with (
        Server(settings, FakeBackend(delay=0.01), [traces]) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub: GenerationServiceAsyncStub = GenerationServiceStub(channel)
        traced = stub.Generate(a_request(steps=5), metadata=[TRACEPARENT])
        await asyncio.gather(events_of(stub, a_request(steps=9)), drained(traced))
    assert len(spans.named(GENERATE)) == 1
    batches = spans.named("unet batch")
    assert len(batches) == 5
    assert all(len(batch.links) == 1 for batch in batches)
    [denoising] = spans.named("denoise")
    assert len(denoising.links) == 5


async def drained(call: Any) -> list[Any]:
    return [event async for event in call]


async def test_a_call_of_triton_is_a_part_of_the_trace_that_causes_it() -> None:
    spans = Spans()
    traces = Traces(SimpleSpanProcessor(spans.exporter))
    with traces.stage("tiny-landscape", "denoise"), traces.model("tiny-landscape", "unet", 2):
        sent = headers()
    span = context_of(spans.only("unet"))
    expected = f"00-{trace.format_trace_id(span.trace_id)}-{trace.format_span_id(span.span_id)}-"
    assert sent.keys() == {"traceparent"}
    assert sent["traceparent"].startswith(expected)
    assert headers() == {}


class Triton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Remembers the headers of the calls of its models, and fails each."""

    def __init__(self) -> None:
        self.headers: list[dict[str, str | bytes]] = []

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802 (gRPC's name)
        self.headers.append(dict(context.invocation_metadata()))
        await context.abort(grpc.StatusCode.INTERNAL, "on purpose")


async def test_triton_is_told_of_which_trace_its_call_is_a_part(settings: ServeSettings, catalog: Catalog) -> None:
    triton, server = Triton(), grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    spans = Spans()
    traces = Traces(SimpleSpanProcessor(spans.exporter))
    backend = ObservedBackend(TritonBackend(f"127.0.0.1:{port}", headers=headers), traces)
    latents = np.zeros((1, catalog.default.latents.channels, 16, 16), np.float32)
    with traces.stage("tiny-landscape", "denoise"):
        with pytest.raises(GenerationFailed):
            await backend.encode_text(catalog.default, "a lake", ())
        with pytest.raises(GenerationFailed):
            await backend.decode(catalog.default, latents)
    await backend.close()
    await server.stop(None)
    sent = [str(each["traceparent"]).split("-")[2] for each in triton.headers]
    models = (spans.only("text_encoder"), spans.only("vae_decoder"))
    assert sent == [trace.format_span_id(context_of(span).span_id) for span in models]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans as OpenTelemetry's collector does."""

    def __init__(self) -> None:
        self.resources: list[Any] = []

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self.resources += request.resource_spans
        return trace_service_pb2.ExportTraceServiceResponse()


async def test_spans_reach_a_collector_before_the_server_has_ended(
    settings: ServeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector = Collector()
    with futures.ThreadPoolExecutor(2) as pool:
        receiver = grpc.server(pool)
        add_servicer: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
        add_servicer(collector, receiver)
        port = receiver.add_insecure_port("127.0.0.1:0")
        receiver.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
        async with (
            Server(settings.model_copy(update={"traces": True}), FakeBackend()) as server,
            AsyncClient(f"127.0.0.1:{server.port}") as client,
        ):
            await client.generate("a lake", steps=2)
        receiver.stop(0).wait()
    names = [span.name for each in collector.resources for scope in each.scope_spans for span in scope.spans]
    assert names.count(GENERATE) == 1
    assert {"unet batch", *STAGES} <= set(names)
    attributes = {each.key: each.value.string_value for each in collector.resources[0].resource.attributes}
    assert attributes.items() >= {"service.name": "sdserver", "deployment.environment": "test"}.items()


async def test_a_collector_that_is_not_there_keeps_no_server_from_serving_and_from_ending(
    settings: ServeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    async with Server(settings.model_copy(update={"traces": True}), FakeBackend()) as server:
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            assert await client.generate("a lake", steps=2)
        start = time.monotonic()
    assert time.monotonic() - start < 2 * CLOSE_SECONDS
    assert not [thread.name for thread in threading.enumerate() if "OtelBatchSpan" in thread.name]


def test_a_client_without_opentelemetry_does_not_import_it() -> None:
    code = "import sys, sdclient; sdclient.Client()._stub; from sdclient import _wire; print(_wire.call_metadata(None))"
    code += "; print([name for name in sys.modules if name.startswith('opentelemetry')])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["()", "[]"]

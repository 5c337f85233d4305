"""Traces by OpenTelemetry: one a request, from its caller to the models. Imported only where they are wanted.

A call of the UNet has rows of several requests, so its span, `unet batch`, is in the trace of none: it is linked to the
denoising of each, and from it. What is sent where is up to the standard variables OTEL_*.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import structlog
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Link, SpanKind, StatusCode

from sdserver.observation import Observer, StepObserver

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

    from sdserver.observation import Call, Stage, StepModel

CLOSE_SECONDS = 3.0
# gRPC's codes that are the server's fault, as OpenTelemetry's conventions for RPC have them.
FAULTS = {"unknown", "deadline_exceeded", "unimplemented", "internal", "unavailable", "data_loss"}


class Traces(Observer):
    """Makes the spans of one server. Close it, so that the last ones are sent."""

    def __init__(self, processor: SpanProcessor | None = None) -> None:
        """`processor` takes the spans in place of an exporter over OTLP and gRPC: the seam for tests."""
        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "sdserver"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        # Whether a shared call is kept is up to the requests in it, and not to chance once more.
        shared = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
        self._exporter: SpanExporter | None = None
        if processor is None:
            self._exporter = OTLPSpanExporter()
            processor = BatchSpanProcessor(self._exporter)
        for provider in (self._provider, shared):
            provider.add_span_processor(processor)
        self._tracer, self._shared_tracer = (each.get_tracer("sdserver") for each in (self._provider, shared))

    def close(self) -> None:
        """Sends what has not been sent yet, as far as that can be done in CLOSE_SECONDS."""
        # Its own time limits are longer than a pod may take to end where the collector cannot be reached.
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)
        if closing.is_alive() and self._exporter:
            # Ends its retries, and with them the threads.
            self._exporter.shutdown()
            closing.join()

    @contextmanager
    def call(self, call: Call) -> Iterator[None]:
        service, _, method = call.method.strip("/").rpartition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
        parent = propagate.extract(dict(call.metadata), Context())
        name = call.method.strip("/")
        with self._tracer.start_as_current_span(
            name, parent, SpanKind.SERVER, attributes, record_exception=False, set_status_on_exception=False
        ) as span:
            structlog.contextvars.bind_contextvars(trace_id=trace.format_trace_id(span.get_span_context().trace_id))
            try:
                yield
            finally:
                _finish(span, call)

    @contextmanager
    def stage(self, engine: str, stage: Stage, image: int | None = None) -> Iterator[None]:
        attributes = {} if image is None else {"sd.image": image}
        with _span(self._tracer, stage, attributes):
            yield

    @contextmanager
    def model(self, engine: str, model: str, rows: int) -> Iterator[None]:
        if not trace.get_current_span().get_span_context().is_valid:
            # A call for requests of which none is traced.
            yield
            return
        with _span(self._tracer, model, {"sd.engine": engine, "sd.rows": rows}, SpanKind.CLIENT):
            yield

    def steps(self, engine: str, model: StepModel) -> StepObserver:
        return _Steps(self._shared_tracer, engine, model)


class _Steps(StepObserver):
    """Spans of the calls of one step scheduler."""

    def __init__(self, tracer: Tracer, engine: str, model: StepModel) -> None:
        self._tracer = tracer
        self._engine = engine
        self._model = model

    def asked(self) -> Span:
        return trace.get_current_span()

    @contextmanager
    def calling(self, asked: Sequence[object]) -> Iterator[None]:
        askers = [span for span in asked if isinstance(span, trace.Span) and span.is_recording()]
        if not askers:
            # Nobody's trace is kept, so nobody would find this span.
            yield
            return
        links = [Link(span.get_span_context()) for span in askers]
        attributes: dict[str, str | int] = {"sd.engine": self._engine, "sd.images": len(asked)}
        name = f"{self._model} batch"
        with self._tracer.start_as_current_span(name, Context(), attributes=attributes, links=links) as step:
            for span in askers:
                span.add_link(step.get_span_context())
            yield


def headers() -> dict[str, str]:
    """What to send along with a call, so that what it causes is a part of the current trace."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier


@contextmanager
def _span(
    tracer: Tracer, name: str, attributes: Mapping[str, str | int], kind: SpanKind = SpanKind.INTERNAL
) -> Iterator[None]:
    with tracer.start_as_current_span(name, kind=kind, attributes=attributes, record_exception=False):
        yield


def _finish(span: Span, call: Call) -> None:
    span.set_attribute("sd.outcome", call.outcome)
    for name, value in (
        ("sd.request_id", call.request_id),
        ("sd.engine", call.engine),
        ("sd.tenant", call.tenant),
        ("sd.reason", call.reason),
        *((f"sd.{name}", value) for name, value in call.facts.items()),
    ):
        if value != "":
            span.set_attribute(name, value)
    if call.outcome in FAULTS:
        span.set_status(StatusCode.ERROR, call.reason)

"""Figures for Prometheus: docs/operations.md has the table of them. Imported only where they are wanted."""

from __future__ import annotations

import math
import socket
import time
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from threading import Thread
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, Summary, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily

from sdserver.observation import CURRENT_WORK, UNET_MODELS, Observer, StepObserver, Work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from prometheus_client import Metric

    from sdserver.admission import Admission
    from sdserver.observation import Call, Stage, StepModel

MAX_TENANTS = 100
# How often the endpoint looks whether it should end: a server that stops waits for it.
NOTICES_END_SECONDS = 0.05
OTHER = "other"

STEP_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30)
SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
SIZES = {"<=256px": 256, "<=512px": 512, "<=768px": 768, "<=1024px": 1024}
"""Bucket of pixels -> the side of a square with as many."""


class Metrics(Observer):
    """The figures of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        # A second series beside each counter and histogram, of which Prometheus makes nothing.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, namespace="sdserver", registry=self.registry)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(name, text, labels, namespace="sdserver", registry=self.registry, buckets=buckets)

        self._requests = counter("requests", "Generate calls that have ended.", "engine", "outcome")
        self._refusals = counter("refusals", "Calls that ended with an error of the server's own.", "reason")
        self._admission = histogram("admission_seconds", "From acceptance to start of a generation.", SECONDS)
        self._first_row = histogram(
            "first_row_seconds",
            "From a generation's start to the UNet call that takes its first row.",
            SECONDS,
            "engine",
        )
        self._step = histogram("step_seconds", "One UNet call.", STEP_SECONDS, "engine")
        self._batch_rows = histogram("batch_rows", "Rows of one UNet call.", ROWS, "engine")
        self._batch_fill = Summary(
            "batch_fill",
            "Rows of one UNet call over the most it may have.",
            ["engine"],
            "sdserver",
            registry=self.registry,
        )
        self._rows = counter(
            "rows", "UNet rows: useful, wasted on images cancelled meanwhile, or padded.", "engine", "kind"
        )
        self._stages = histogram("stage_seconds", "Stages of generations.", SECONDS, "engine", "stage")
        self._texts = counter("text_cache_requests", "Texts that were asked for.", "result")
        self._text_results = {known: self._texts.labels(result) for known, result in ((True, "hit"), (False, "miss"))}
        self._images = counter("images", "Images generated, by the square that has as many pixels.", "engine", "size")
        self._spent = counter("tenant_pixel_steps", "Pixels that the UNet saw, summed over its rows.", "tenant")
        self._tenants: set[str] = set()

    def watch(self, admission: Admission, ready: Callable[[], Mapping[str, bool]]) -> None:
        """Shows places and engines (id -> whether it is ready) as they are at each scrape."""
        self.registry.register(_Now(admission, ready))

    def call(self, call: Call) -> _Call:
        return _Call(call, self._requests, self._refusals)

    @contextmanager
    def stage(self, engine: str, stage: Stage, image: int | None = None) -> Iterator[None]:
        start = time.monotonic()
        yield
        # Not where it fails or is cancelled: such times say nothing of how long it takes.
        self._stages.labels(engine, stage).observe(time.monotonic() - start)

    def steps(self, engine: str, model: StepModel) -> StepObserver:
        if model not in UNET_MODELS:
            return StepObserver()
        return _Steps(
            *(self._first_row.labels(engine), self._step.labels(engine), self._batch_rows.labels(engine)),
            self._batch_fill.labels(engine),
            {kind: self._rows.labels(engine, kind) for kind in ("useful", "padded", "wasted")},
        )

    def admitted(self, seconds: float) -> None:
        self._admission.observe(seconds)

    def text_asked(self, known: bool) -> None:
        self._text_results[known].inc()

    def image_done(self, engine: str, width: int, height: int) -> None:
        side = math.sqrt(width * height)
        size = next((name for name, most in SIZES.items() if side <= most), "larger")
        self._images.labels(engine, size).inc()

    def spent(self, tenant: str, pixel_steps: int) -> None:
        if tenant not in self._tenants:
            if len(self._tenants) < MAX_TENANTS:
                self._tenants.add(tenant)
            else:
                tenant = OTHER
        self._spent.labels(tenant).inc(pixel_steps)


class _Call:
    """Counts a call when it has ended."""

    def __init__(self, call: Call, requests: Counter, refusals: Counter) -> None:
        self._call = call
        self._requests = requests
        self._refusals = refusals

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        call = self._call
        if call.method.endswith("/Generate"):
            self._requests.labels(call.engine, call.outcome).inc()
        if call.reason:
            self._refusals.labels(call.reason).inc()


class _Steps(StepObserver):
    """Figures of the UNet calls of one engine."""

    def __init__(
        self, first_row: Histogram, step: Histogram, batch_rows: Histogram, fill: Summary, rows: Mapping[str, Counter]
    ) -> None:
        self._first_row = first_row
        self._step = step
        self._batch_rows = batch_rows
        self._fill = fill
        self._rows = rows

    def asked(self) -> Work | None:
        return CURRENT_WORK.get()

    @contextmanager
    def calling(self, asked: Sequence[object]) -> Iterator[None]:
        for work in asked:
            if isinstance(work, Work) and not work.in_a_call:
                work.in_a_call = True
                self._first_row.observe(time.monotonic() - work.started)
        yield

    def called(self, rows: int, useful: int, bound: int, seconds: float, padded: int = 0) -> None:
        self._step.observe(seconds)
        self._batch_rows.observe(rows)
        self._fill.observe(rows / bound)
        self._rows["useful"].inc(useful)
        self._rows["wasted"].inc(rows - useful)
        self._rows["padded"].inc(padded)


class _Now:
    """What is known at a scrape without having been counted."""

    def __init__(self, admission: Admission, ready: Callable[[], Mapping[str, bool]]) -> None:
        self._admission = admission
        self._ready = ready

    def collect(self) -> Iterable[Metric]:
        places = self._admission
        for name, text, value in (
            ("active_requests", "Generations that run.", places.active),
            ("queued_requests", "Generations that wait.", places.queued),
            ("queue_seconds", "Predicted wait of a generation that came now.", places.queue_seconds),
        ):
            yield GaugeMetricFamily(f"sdserver_{name}", text, value)
        engines = GaugeMetricFamily("sdserver_engine_ready", "Whether an engine's models answer.", labels=["engine"])
        for engine, ready in self._ready().items():
            engines.add_metric([engine], ready)
        yield engines


class MetricsEndpoint:
    """`/metrics` over HTTP on `host`:`port`, answered by threads of its own. Used as a context manager."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        """Listens. Raises OSError where it cannot."""
        self._server = make_server(host, port, make_wsgi_app(metrics.registry), _HttpServer, _Silent)
        self._thread = Thread(target=self._server.serve_forever, args=(NOTICES_END_SECONDS,), daemon=True)
        self.port: int = self._server.server_port

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _HttpServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        """Scrapes are not worth a line."""

"""Puts the parts together: one grpc.aio server with generation, health and reflection, and its orderly end."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_reflection.v1alpha import reflection
from sdapi.v1.generation_pb2_grpc import add_GenerationServiceServicer_to_server

from sdserver import cost_model, wire
from sdserver.admission import Admission
from sdserver.backends.observed import ObservedBackend
from sdserver.backends.triton import TritonBackend
from sdserver.block_list import read_block_list
from sdserver.engine_watch import EngineWatch
from sdserver.engines import load_catalog
from sdserver.health import HealthMonitor
from sdserver.image_writer import ImageWriter
from sdserver.images import missing_codecs
from sdserver.observation import together
from sdserver.pipeline import Pipeline
from sdserver.safety import SafetyCheck
from sdserver.safety_model import load_safety_model
from sdserver.service import SERVICE, GenerationService, StatusInterceptor
from sdserver.signing import Signer, SigningError
from sdserver.tenants import Tenants
from sdserver.tls import server_credentials
from sdserver.watched_files import FileError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self

    from sdserver.backends import Backend
    from sdserver.engines import Catalog
    from sdserver.metrics import Metrics, MetricsEndpoint
    from sdserver.observation import Observer
    from sdserver.safety import SafetyMode
    from sdserver.safety_model import SafetyModel
    from sdserver.settings import ServeSettings
    from sdserver.traces import Traces

log = structlog.get_logger()

# The largest request: 64 prompts of 10,000 characters, an initial image and a mask.
MAX_REQUEST_BYTES = 64 * 2**20
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", -1),
    # Without it a single connection may open any number of streams.
    ("grpc.max_concurrent_streams", 1024),
    # Finds callers that are gone without a word: gRPC relies on the ping's own time-out (grpc/grpc#39239).
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Allows the SDK's own keepalive pings.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),
]


class ServerError(Exception):
    """The server cannot start; says what to change."""


class Server:
    """A running server. `async with Server(settings) as server`: `server.port` is where it listens.

    `backend` replaces the one that the settings name, `observers` hear of everything beside metrics and traces: the
    seams for tests.
    Raises EngineError, SafetyError, BlockListError or ServerError when it cannot start.
    """

    def __init__(
        self, settings: ServeSettings, backend: Backend | None = None, observers: Sequence[Observer] = ()
    ) -> None:
        self._settings = settings
        self._given_backend = backend
        self._stack = AsyncExitStack()
        self.catalog: Catalog
        self._metrics = _metrics(settings)
        own = (each for each in (self._metrics, _traces(settings)) if each is not None)
        self._observer = together([*own, *observers])
        self.admission = Admission(settings.max_active, settings.max_queued, self._observer)
        self.port = 0
        self.metrics_port: int | None = None
        """Where the metrics are; None without them."""
        self.health_port: int | None = None
        """Where health is without TLS; None where it has no port of its own."""

    async def __aenter__(self) -> Self:
        async with self._stack:
            await self._start()
            self._stack = self._stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        settings = self._settings
        if missing := missing_codecs():
            raise ServerError(f"this Pillow cannot write {', '.join(missing)}: pip install --upgrade 'pillow>=11.3'")
        self.catalog = load_catalog(settings.model_repository, settings.default_engine)
        chosen = _safety(settings)
        path = settings.prompt_block_list
        block_list = None if path is None else await asyncio.to_thread(read_block_list, path)
        tenants, credentials = _tenants(settings), _credentials(settings)
        # Closed last: there is something to hear of until the end.
        self._stack.push_async_callback(asyncio.to_thread, self._observer.close)
        backend = ObservedBackend(self._given_backend or self._backend(chosen and chosen[1]), self._observer)
        safety = None if chosen is None else SafetyCheck(*chosen, backend)
        self._stack.push_async_callback(backend.close)
        pipeline = await self._stack.enter_async_context(
            Pipeline(
                self.catalog,
                backend,
                self.admission,
                settings.max_generation_seconds,
                settings.text_cache_mb * 1_000_000,
                ImageWriter(wire.to_json, await asyncio.to_thread(_signer, settings)),
                safety,
                self._observer,
                partial(cost_model.read, settings.cost_model_folder),
                settings.parallel_calls,
            )
        )
        watch = EngineWatch(
            *(settings.model_repository, settings.default_engine, self.catalog, pipeline.pool, backend),
            settings.engine_watch_seconds,
        )
        await self._stack.enter_async_context(watch)
        monitor = await self._stack.enter_async_context(
            HealthMonitor(self.catalog, backend, settings.health_interval_seconds)
        )
        if self._metrics is not None:
            self._metrics.watch(self.admission, lambda: {each.id: monitor.is_ready(each) for each in self.catalog})
            self.metrics_port = self._stack.enter_context(_metrics_endpoint(self._metrics, settings)).port
        interceptor = StatusInterceptor(tenants, self._observer)
        server = grpc.aio.server(interceptors=[interceptor], options=OPTIONS + _connection_age(settings))
        service = GenerationService(
            self.catalog, pipeline, monitor, settings.send_timeout_seconds, safety.mode if safety else None, block_list
        )
        add_GenerationServiceServicer_to_server(service, server)
        health_pb2_grpc.add_HealthServicer_to_server(monitor.servicer, server)
        reflection.enable_server_reflection((SERVICE, HEALTH_SERVICE, reflection.SERVICE_NAME), server)
        self.port = _listen(server, settings.host, settings.port, credentials)
        await server.start()
        if settings.health_port is not None:
            health = grpc.aio.server()
            health_pb2_grpc.add_HealthServicer_to_server(monitor.servicer, health)
            self.health_port = _listen(health, settings.host, settings.health_port, None)
            await health.start()
            self._stack.push_async_callback(health.stop, None)
        self._stack.push_async_callback(self._stop, server, monitor)
        ports = {"port": self.port, "metrics_port": self.metrics_port, "health_port": self.health_port}
        chosen_ports = {name: port for name, port in ports.items() if port is not None}
        log.info("serving", host=settings.host, **chosen_ports, engines=[engine.id for engine in self.catalog])
        if tenants.known and credentials is None and settings.host not in ("127.0.0.1", "::1", "localhost"):
            log.warning("API keys can be read on the way: set tls_certificate, or let a proxy in front speak TLS")

    def _backend(self, safety_model: SafetyModel | None) -> Backend:
        if self._settings.backend == "triton":
            return TritonBackend(self._settings.triton_url, safety_model, *_trace_headers(self._settings))
        from sdserver.backends.in_process import InProcessBackend

        return InProcessBackend(self.catalog, self._settings.model_repository, safety_model)

    async def _stop(self, server: grpc.aio.Server, monitor: HealthMonitor) -> None:
        """Says NOT_SERVING, refuses newcomers, lets the running generations finish, then closes."""
        await monitor.stop_serving()
        log.info("stopping", active=self.admission.active, queued=self.admission.queued)
        try:
            async with asyncio.timeout(self._settings.drain_seconds):
                await self.admission.drain()
        except TimeoutError:
            log.warning("generations did not finish in time and are cancelled", active=self.admission.active)
        # Not a grace period of gRPC's own: that one waits for open health watches, too.
        await server.stop(None)


def _listen(server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    address = f"{host}:{port}"
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ServerError(f"cannot listen on {address}: choose another port, or stop who has it") from error


def _connection_age(settings: ServeSettings) -> list[tuple[str, int]]:
    options = {
        "grpc.max_connection_age_ms": settings.max_connection_age_seconds,
        "grpc.max_connection_age_grace_ms": settings.max_connection_age_grace_seconds,
    }
    return [(name, int(1000 * seconds)) for name, seconds in options.items() if seconds is not None]


def _tenants(settings: ServeSettings) -> Tenants:
    try:
        return Tenants(settings.api_keys)
    except FileError as error:
        raise ServerError(f"api_keys: {error}") from error


def _credentials(settings: ServeSettings) -> grpc.ServerCredentials | None:
    certificate, private_key, client_ca = settings.tls_certificate, settings.tls_private_key, settings.tls_client_ca
    if certificate is None and private_key is None:
        if client_ca is not None:
            raise ServerError("tls_client_ca needs tls_certificate and tls_private_key: set them, too")
        return None
    if certificate is None or private_key is None:
        raise ServerError("TLS needs both tls_certificate and tls_private_key: set the other one, too")
    try:
        return server_credentials(certificate, private_key, client_ca)
    except FileError as error:
        raise ServerError(f"TLS: {error}") from error


def _metrics(settings: ServeSettings) -> Metrics | None:
    if settings.metrics_port is None:
        return None
    from sdserver.metrics import Metrics

    return Metrics()


def _metrics_endpoint(metrics: Metrics, settings: ServeSettings) -> MetricsEndpoint:
    from sdserver.metrics import MetricsEndpoint

    assert settings.metrics_port is not None
    try:
        return MetricsEndpoint(metrics, settings.metrics_host, settings.metrics_port)
    except OSError as error:
        address = f"{settings.metrics_host}:{settings.metrics_port}"
        raise ServerError(f"cannot show metrics on {address} ({error.strerror}): choose another port") from error


def _trace_headers(settings: ServeSettings) -> tuple[Callable[[], dict[str, str]], ...]:
    """What tells Triton of which trace a call is a part; empty without traces."""
    if not settings.traces:
        return ()
    from sdserver.traces import headers

    return (headers,)


def _traces(settings: ServeSettings) -> Traces | None:
    if not settings.traces:
        return None
    try:
        from sdserver.traces import Traces
    except ImportError as error:
        raise ServerError("traces need OpenTelemetry: pip install 'sd-service[server,traces]'") from error
    return Traces()


def _safety(settings: ServeSettings) -> tuple[SafetyMode, SafetyModel] | None:
    """What the safety check does, and its model; None: there is no check."""
    mode = settings.safety_mode or ("block" if settings.safety_model else "off")
    if mode == "off":
        return None
    if not settings.safety_model:
        raise ServerError(f"safety_mode is {mode}, but there is no safety_model: name one, or turn safety_mode off")
    return mode, load_safety_model(settings.model_repository, settings.safety_model)


def _signer(settings: ServeSettings) -> Signer | None:
    certificates, private_key = settings.c2pa_certificates, settings.c2pa_private_key
    if certificates is None and private_key is None:
        return None
    if certificates is None or private_key is None:
        raise ServerError("signing needs both c2pa_certificates and c2pa_private_key: set the other one, too")
    try:
        return Signer(certificates, private_key, settings.c2pa_algorithm, settings.c2pa_timestamp_authority)
    except SigningError as error:
        raise ServerError(str(error)) from error

"""Which engines are ready, and what grpc.health.v1 says of it.

Two things are told apart, as Kubernetes needs them: the service "" (liveness) is SERVING as long as this process
answers, whatever Triton does; `sdapi.v1.GenerationService` (readiness) is SERVING while at least one engine's models
answer and the server is not stopping.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog
from grpc_health.v1.health import aio as health_aio
from grpc_health.v1.health_pb2 import HealthCheckResponse

from sdserver.service import SERVICE

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from sdserver.backends import Backend
    from sdserver.engines import Catalog, Engine

log = structlog.get_logger()

_STATUS = {True: HealthCheckResponse.SERVING, False: HealthCheckResponse.NOT_SERVING}


class HealthMonitor:
    """Asks the backend about every engine each `interval_seconds`. Used as an async context manager."""

    def __init__(self, catalog: Catalog, backend: Backend, interval_seconds: float) -> None:
        self.servicer = health_aio.HealthServicer()
        self._catalog = catalog
        self._backend = backend
        self._interval_seconds = interval_seconds
        self._ready: dict[str, bool] = {}
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.servicer.set("", HealthCheckResponse.SERVING)
        await self._check()
        self._task = asyncio.create_task(self._work(), name="health monitor")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])

    def is_ready(self, engine: Engine) -> bool:
        """Whether the engine's models answered at the last look, and nobody has doubted it since."""
        return self._ready.get(engine.id, False)

    def doubt(self, engine: Engine) -> None:
        """The engine's models did not answer just now: it counts as not ready until the next look."""
        self._ready[engine.id] = False

    async def stop_serving(self) -> None:
        """Says NOT_SERVING from now on, so that nobody sends new requests."""
        self._stopping = True
        await self._publish()

    async def _work(self) -> None:
        while True:
            await asyncio.sleep(self._interval_seconds)
            await self._check()

    async def _check(self) -> None:
        engines = tuple(self._catalog)
        answers = await asyncio.gather(*(self._backend.is_ready(engine) for engine in engines))
        ready = {engine.id: answer for engine, answer in zip(engines, answers, strict=True)}
        for engine_id, answer in ready.items():
            if answer != self._ready.get(engine_id, False):
                log.info("engine is ready" if answer else "engine is not ready", engine=engine_id)
        self._ready = ready
        await self._publish()

    async def _publish(self) -> None:
        await self.servicer.set(SERVICE, _STATUS[any(self._ready.values()) and not self._stopping])

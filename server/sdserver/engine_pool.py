"""The engines that generations may use now, and how one leaves without ending those that use it."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sdserver.engine_schedulers import EngineSchedulers
from sdserver.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Self

    from sdserver.backends import Backend
    from sdserver.cost_model import CostModel
    from sdserver.engines import Engine
    from sdserver.observation import Observer


class _Place:
    """An engine's schedulers, and how many generations use them."""

    def __init__(self, schedulers: EngineSchedulers) -> None:
        self.schedulers = schedulers
        self.generations = 0
        self.idle = asyncio.Event()
        self.idle.set()


class EnginePool:
    """Schedulers by engine. Used as an async context manager, whose end stops all of them."""

    def __init__(
        self,
        backend: Backend,
        costs: Callable[[Engine], CostModel | None],
        observer: Observer,
        parallel_calls: int = 1,
    ) -> None:
        self._backend = backend
        self._costs = costs
        self._observer = observer
        self._parallel_calls = parallel_calls
        self._places: dict[str, _Place] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for place in self._places.values():
            await place.schedulers.__aexit__(None, None, None)

    async def open(self, engine: Engine) -> None:
        """Lets generations use an engine."""
        schedulers = EngineSchedulers(engine, self._backend, self._costs(engine), self._observer, self._parallel_calls)
        self._places[engine.id] = _Place(await schedulers.__aenter__())

    async def close(self, engine_id: str) -> None:
        """Lets no generation begin to use an engine any more, and returns when the last that does has ended."""
        place = self._places.pop(engine_id, None)
        if place is None:
            return
        try:
            await place.idle.wait()
        finally:
            await place.schedulers.__aexit__(None, None, None)

    @contextmanager
    def use(self, engine: Engine) -> Iterator[EngineSchedulers]:
        """Holds an engine for a generation. Raises Unavailable for one that has just been taken out."""
        place = self._places.get(engine.id)
        if place is None:
            raise Unavailable(
                f"engine {engine.id} is being exchanged; retry later", "ENGINE_NOT_READY", engine=engine.id
            )
        place.generations += 1
        place.idle.clear()
        try:
            yield place.schedulers
        finally:
            place.generations -= 1
            if place.generations == 0:
                place.idle.set()

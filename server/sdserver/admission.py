"""Who may start: a bounded number of generations run, a bounded number wait in order, the rest is refused at once."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

from sdserver.errors import QueueFull, Unavailable
from sdserver.observation import Observer

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

# Weight of the latest generation in the running mean of their durations.
SMOOTHING = 0.2


class Admission:
    """First come, first served: `max_active` generations at a time, `max_queued` waiting."""

    def __init__(self, max_active: int, max_queued: int, observer: Observer | None = None) -> None:
        self._max_active = max_active
        self._max_queued = max_queued
        self._observer = observer or Observer()
        self._active: set[Place] = set()
        self._queue: deque[Place] = deque()
        self._mean_seconds = 1.0
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def active(self) -> int:
        """Generations that run."""
        return len(self._active)

    @property
    def queued(self) -> int:
        """Generations that wait."""
        return len(self._queue)

    @property
    def queue_seconds(self) -> float:
        """Predicted wait of a generation that came now."""
        if len(self._active) < self._max_active:
            return 0.0
        return self._mean_seconds * (len(self._queue) + 1) / self._max_active

    def enter(self) -> Place:
        """A place for one generation; leave it by its `with` block. Raises QueueFull or Unavailable at once."""
        if self._closed:
            raise Unavailable("the server is stopping; ask another one or retry later", "SERVER_STOPPING")
        full = len(self._active) >= self._max_active
        if full and len(self._queue) >= self._max_queued:
            wait = self.queue_seconds
            raise QueueFull(
                f"{len(self._queue)} requests are waiting already; retry after {wait:.1f} s", retry_after=wait
            )
        place = Place(self, position=len(self._queue) + 1 if full else 0)
        self._queue.append(place)
        self._idle.clear()
        self._fill()
        return place

    async def drain(self) -> None:
        """Refuses newcomers from now on and waits until nobody is left."""
        self._closed = True
        await self._idle.wait()

    def _fill(self) -> None:
        while self._queue and len(self._active) < self._max_active:
            place = self._queue.popleft()
            self._active.add(place)
            self._observer.admitted(place.start())

    def _leave(self, place: Place, seconds: float | None) -> None:
        if place in self._active:
            self._active.remove(place)
            if seconds is not None:
                self._mean_seconds += SMOOTHING * (seconds - self._mean_seconds)
        else:
            self._queue.remove(place)
        self._fill()
        if not self._active and not self._queue:
            self._idle.set()


class Place:
    """One generation's place in the queue, then among the active ones, until its `with` block ends."""

    def __init__(self, admission: Admission, position: int) -> None:
        self._admission = admission
        self._started = asyncio.Event()
        self._entry_time = time.monotonic()
        self._start_time = 0.0
        self.position = position
        """Generations that had to finish first when it entered; 0: it started at once."""

    def start(self) -> float:
        """Called by the admission when the generation may run; returns the seconds that it has waited."""
        self._start_time = time.monotonic()
        self._started.set()
        return self._start_time - self._entry_time

    async def started(self) -> None:
        """Waits until the generation may run."""
        await self._started.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Only generations that ran to their end say how long one takes.
        self._admission._leave(self, time.monotonic() - self._start_time if kind is None else None)

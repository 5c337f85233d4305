"""Who may start: a bounded number of generations run, a bounded number wait in line, the rest is refused at once."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from typing import TYPE_CHECKING

from sdserver.errors import QueueFull, Unavailable
from sdserver.observation import ANONYMOUS, Observer

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

# Weight of the latest generation in the running mean of their durations.
SMOOTHING = 0.2


class Admission:
    """`max_active` generations at a time, `max_queued` waiting.

    The next to start is of the tenant that has the fewest running; among equals, and within a tenant, who came first.
    So a tenant with a long line makes others wait no longer than for one that ends.
    """

    def __init__(self, max_active: int, max_queued: int, observer: Observer | None = None) -> None:
        self._max_active = max_active
        self._max_queued = max_queued
        self._observer = observer or Observer()
        self._active: set[Place] = set()
        # By tenant, none of them empty.
        self._lines: dict[str, deque[Place]] = {}
        self._arrivals = 0
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
        return sum(map(len, self._lines.values()))

    @property
    def queue_seconds(self) -> float:
        """Predicted wait of a generation that came now."""
        if len(self._active) < self._max_active:
            return 0.0
        return self._mean_seconds * (self.queued + 1) / self._max_active

    def enter(self, tenant: str = ANONYMOUS) -> Place:
        """A place for one generation; leave it by its `with` block. Raises QueueFull or Unavailable at once."""
        if self._closed:
            raise Unavailable("the server is stopping; ask another one or retry later", "SERVER_STOPPING")
        full = len(self._active) >= self._max_active
        if full and self.queued >= self._max_queued:
            wait = self.queue_seconds
            raise QueueFull(f"{self.queued} requests are waiting already; retry after {wait:.1f} s", retry_after=wait)
        self._arrivals += 1
        place = Place(self, tenant, self._arrivals, position=self._position(tenant) if full else 0)
        self._lines.setdefault(tenant, deque()).append(place)
        self._idle.clear()
        self._fill()
        return place

    async def drain(self) -> None:
        """Refuses newcomers from now on and waits until nobody is left."""
        self._closed = True
        await self._idle.wait()

    def _position(self, tenant: str) -> int:
        """The place in line of who comes now: how many start before it, and one more."""
        running = Counter(place.tenant for place in self._active)
        # The n-th of a line starts when its tenant has n more running than now.
        turn = running[tenant] + len(self._lines.get(tenant, ()))
        return 1 + sum(min(len(line), max(0, turn + 1 - running[other])) for other, line in self._lines.items())

    def _fill(self) -> None:
        while self._lines and len(self._active) < self._max_active:
            running = Counter(place.tenant for place in self._active)
            tenant = min(self._lines, key=lambda each: (running[each], self._lines[each][0].arrival))
            place = self._lines[tenant][0]
            self._leave_line(place)
            self._active.add(place)
            self._observer.admitted(place.start())

    def _leave(self, place: Place, seconds: float | None) -> None:
        if place in self._active:
            self._active.remove(place)
            if seconds is not None:
                self._mean_seconds += SMOOTHING * (seconds - self._mean_seconds)
        else:
            self._leave_line(place)
        self._fill()
        if not self._active and not self._lines:
            self._idle.set()

    def _leave_line(self, place: Place) -> None:
        self._lines[place.tenant].remove(place)
        if not self._lines[place.tenant]:
            del self._lines[place.tenant]


class Place:
    """One generation's place in the queue, then among the active ones, until its `with` block ends."""

    def __init__(self, admission: Admission, tenant: str, arrival: int, position: int) -> None:
        self._admission = admission
        self.tenant = tenant
        self.arrival = arrival
        """Which place this is, counted since the server's start."""
        self._started = asyncio.Event()
        self._entry_time = time.monotonic()
        self._start_time = 0.0
        self.position = position
        """Generations that had to finish first, as far as was known when it entered; 0: it started at once."""

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

"""Time in a simulation: what happens when, and processes that wait for it."""

from __future__ import annotations

import heapq
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    Act = Callable[[], None]
    # Yields what takes time: functions that call back when it is over.
    Process = Generator[Callable[[Act], None], None, None]


class Clock:
    """What happens when: at the same time in the order in which it was said, and last what waits for the rest."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, bool, int, Act]] = []
        self._number = count()

    def at(self, time: float, act: Act, *, last: bool = False) -> None:
        heapq.heappush(self._events, (time, last, next(self._number), act))

    def after(self, seconds: float, act: Act) -> None:
        self.at(self.now + seconds, act)

    def run(self) -> None:
        while self._events:
            self.now, _, _, act = heapq.heappop(self._events)
            act()


def drive(process: Process) -> None:
    """Runs a process until it waits, and further each time when that is over."""
    wait = next(process, None)
    if wait is not None:
        wait(partial(drive, process))

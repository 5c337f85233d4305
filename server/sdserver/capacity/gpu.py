"""A GPU with its Triton, in a simulation."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdserver.capacity.events import Act, Clock
    from sdserver.capacity.outcome import Outcome
    from sdserver.capacity.workload import Shape


@dataclass(slots=True, eq=False)
class Call:
    """A call of a model on its way. `seconds` is what so many rows take."""

    model: str
    shape: Shape
    rows: int
    seconds: Callable[[int], float]
    ended: Act


class Gpu:
    """A Triton: one call at a time, in order. UNet calls of a shape that wait run together, as far as they fit."""

    def __init__(self, clock: Clock, most_rows: int, outcome: Outcome, slowness: Callable[[float], float]) -> None:
        """`slowness` says how many times longer calls take that begin at a time."""
        self._clock = clock
        self._most_rows = most_rows
        self._outcome = outcome
        self._slowness = slowness
        self._waiting: deque[Call] = deque()
        self._runs = False

    def call(self, call: Call) -> None:
        self._waiting.append(call)
        if not self._runs:
            self._next()

    def _next(self) -> None:
        first = self._waiting.popleft()
        together, rows = [first], first.rows
        # Triton batches calls of the UNet alone.
        others = [call for call in self._waiting if call.model == "unet"] if first.model == "unet" else []
        for other in others:
            if other.shape != first.shape or rows + other.rows > self._most_rows:
                break
            together.append(other)
            rows += other.rows
            self._waiting.remove(other)
        seconds = first.seconds(rows) * self._slowness(self._clock.now)
        self._outcome.busy += seconds
        self._runs = True
        self._clock.after(seconds, partial(self._ended, together))

    def _ended(self, calls: list[Call]) -> None:
        self._runs = False
        if self._waiting:
            self._next()
        for call in calls:
            call.ended()

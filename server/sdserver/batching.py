"""Which rows go into the next call of a model, and when: the step scheduler's rule, without clocks, tasks or arrays.

`step_scheduler` sends what it says to a model; `capacity` plays it against a cost model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from sdserver import fair_queue

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from sdserver.fair_queue import FairQueue

# How long before a call's expected end the next one may be sent: what it takes to arrive, and how wrong, as a share of
# the call, the expectation may be.
AHEAD_SECONDS, AHEAD_SHARE = 0.002, 0.1
# No timer is finer.
LEAST_SECONDS = 1e-4
# How much of what is expected of a call is what the last one took.
NEWS = 0.3
# Of shapes and numbers of rows, whose calls' seconds are kept.
MOST_KNOWN = 1024


class Ask(fair_queue.Ask, Protocol):
    """Rows of one shape that one tenant wants computed; batches take them in their order."""

    waiting: int
    """Rows that no batch has taken yet."""

    @property
    def size(self) -> int:
        """Rows in all."""
        ...


A = TypeVar("A", bound=Ask)


@dataclass(slots=True, eq=False)
class Batch(Generic[A]):
    """Rows of one call: of each ask so many, from a place on."""

    shape: Hashable
    tenant: str
    """Whose turn it was."""
    bound: int
    """The most rows that it may have."""
    parts: list[tuple[A, int, int]] = field(default_factory=list)
    began: float | None = None
    """When its call began to run; None: it waits behind another one."""

    @property
    def rows(self) -> int:
        """Rows that it has."""
        return sum(rows for _, _, rows in self.parts)


class Calls(Generic[A]):
    """The calls of a model that are under way; it answers `parallel` at a time, and one more waits behind them.

    Times are those of any clock that goes on.
    """

    def __init__(self, bound: Callable[[int], int], parallel: int = 1) -> None:
        """`bound(row_work)`: the most rows of a batch."""
        self._bound = bound
        self._parallel = parallel
        self._under_way: list[Batch[A]] = []
        self._seconds: dict[tuple[Hashable, int], float] = {}

    def next_batch(self, queue: FairQueue[A], now: float) -> Batch[A] | None:
        """Takes the batch that is sent now; None: nothing, for the time being.

        As long as fewer than `parallel` calls run, whatever waits is sent. One more call goes behind them, so that the
        model goes on without a pause, if it is full or of a shape that no running call has. Of the same shape, one that
        is not full waits until the running call has answered: rows that come back then, for their next step, may join.
        """
        turn = queue.turn()
        if turn is None or len(self._under_way) > self._parallel or self._too_early(now) > 0:
            return None
        most = self._bound(turn.first.row_work)
        for other in self._under_way if len(self._under_way) == self._parallel else ():
            if other.shape == turn.shape:
                if queue.waiting(turn.shape, most) < most:
                    return None
            elif turn.time > queue.time_of(other.tenant, other.shape):
                # It is the turn of rows that the running call gives back.
                return None
        batch: Batch[A] = Batch(turn.shape, turn.tenant, most)

        def took(ask: A, rows: int) -> None:
            batch.parts.append((ask, ask.size - ask.waiting, rows))
            ask.waiting -= rows

        queue.take(turn, most, took)
        self._under_way.append(batch)
        self._begin(now)
        return batch

    def ask_again(self, queue: FairQueue[A], now: float) -> float:
        """Seconds after which a batch may be sent though nothing has come or ended; 0: there is no such time."""
        return 0.0 if queue.turn() is None else self._too_early(now)

    def _too_early(self, now: float) -> float:
        """Seconds until a batch may go behind the running calls: shortly before the first of them is expected to end.

        Until then rows may come whose turn it rather is, and they would have to wait for one call more.
        """
        if len(self._under_way) != self._parallel:
            return 0.0
        waits = []
        for batch in self._under_way:
            seconds = self._seconds.get((batch.shape, batch.rows))
            if batch.began is None or seconds is None:
                return 0.0
            waits.append(batch.began + (1 - AHEAD_SHARE) * seconds - AHEAD_SECONDS - now)
        return wait if (wait := min(waits)) > LEAST_SECONDS else 0.0

    def ended(self, batch: Batch[A], now: float, *, answered: bool = True) -> None:
        """A call has ended, `answered` or otherwise."""
        self._under_way.remove(batch)
        if answered and batch.began is not None:
            kind, seconds = (batch.shape, batch.rows), now - batch.began
            if kind not in self._seconds and len(self._seconds) == MOST_KNOWN:
                self._seconds.clear()
            self._seconds[kind] = (1 - NEWS) * self._seconds.get(kind, seconds) + NEWS * seconds
        self._begin(now)

    def _begin(self, now: float) -> None:
        for batch in self._under_way[: self._parallel]:
            if batch.began is None:
                batch.began = now

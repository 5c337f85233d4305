"""Which rows go into the next call of a model: the rule of the step scheduler, without clocks, tasks or arrays.

`step_scheduler` sends what it says to a model; `capacity` plays it against a cost model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from sdserver import fair_queue

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable

    from sdserver.fair_queue import FairQueue

# One that runs, and one behind it.
MAX_CALLS = 2


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

    @property
    def rows(self) -> int:
        """Rows that it has."""
        return sum(rows for _, _, rows in self.parts)


def next_batch(queue: FairQueue[A], running: Collection[Batch[A]], bound: Callable[[int], int]) -> Batch[A] | None:
    """Takes the batch that can be sent now, of at most `bound(row_work)` rows; None: nothing, for the time being.

    A full batch is sent while another call runs, so that the model goes on without a pause. One that is not full waits
    until the running call has answered: the rows that come back then, for their next step, may join it.
    """
    turn = queue.turn()
    if turn is None or len(running) == MAX_CALLS:
        return None
    most = bound(turn.first.row_work)
    for other in running:
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
    return batch

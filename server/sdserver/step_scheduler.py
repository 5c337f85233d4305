"""One call of a model for the rows of many generations: requests join and leave the batch at every denoising step.

While a call runs, rows of other generations wait; the next call takes those whose turn it is (`fair_queue`) and
whatever of their shape fits beside them (`batching`). Nothing but the shapes has to agree: sampler, step, guidance and
prompts differ freely.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdserver.batching import Batch, Calls
from sdserver.fair_queue import FairQueue
from sdserver.observation import ANONYMOUS, StepObserver

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable, Sequence
    from types import TracebackType
    from typing import Self

Array = NDArray[np.float32]
Rows = NDArray[Any]


class Row(NamedTuple):
    """One latent under one condition: `latents` [U, h, w] as the UNet takes them, `text_states` [tokens, width]."""

    latents: Array
    timestep: float
    text_states: Array


@dataclass(slots=True, eq=False)
class _Ask:
    """Rows that one generation asked for together, and where their predictions [R, C, h, w] go."""

    tenant: str
    rows: Sequence[tuple[Any, ...]]
    shape: Hashable
    row_work: int
    answer: asyncio.Future[Rows]
    observed: object
    waiting: int
    missing: int
    parts: list[tuple[int, Rows]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.rows)

    def answered(self, start: int, predictions: Rows) -> None:
        """Takes the predictions of some rows, from `start` on."""
        self.parts.append((start, predictions))
        self.missing -= len(predictions)
        if self.missing == 0 and not self.answer.done():
            whole = [part for _, part in sorted(self.parts, key=lambda item: item[0])]
            self.answer.set_result(whole[0] if len(whole) == 1 else np.concatenate(whole))


class StepScheduler:
    """Batches the rows of one model, at most `bound(places)` a call for rows of so many places (height times width).

    The model answers `parallel` calls at a time; one more waits behind them, sent shortly before it can begin.
    A row is a tuple of arrays and numbers, whose first is an array [..., h, w]. `model` takes an array for each of its
    places, such as latents [B, C, h, w], timesteps [B] and text states [B, tokens, width] for `Row`, and returns
    [B, ...]. Used as an async context manager; leaving it stops the calls and cancels whoever still waits.
    """

    def __init__(
        self,
        model: Callable[..., Awaitable[Rows]],
        bound: Callable[[int], int],
        observer: StepObserver | None = None,
        parallel: int = 1,
    ) -> None:
        self._model = model
        self._under_way: Calls[_Ask] = Calls(bound, parallel)
        self._observer = observer or StepObserver()
        self._queue: FairQueue[_Ask] = FairQueue()
        self._calls: dict[Batch[_Ask], asyncio.Task[bool]] = {}
        self._changed = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._asks: set[_Ask] = set()
        self._later: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        self._worker = asyncio.create_task(self._work(), name="step scheduler")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._worker is not None
        self._not_later()
        tasks = [self._worker, *self._calls.values()]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for ask in self._asks:
            ask.answer.cancel()

    @property
    def waiting_rows(self) -> int:
        """Rows that no call has taken yet."""
        return self._queue.rows

    async def predict(self, rows: Sequence[tuple[Any, ...]], tenant: str = ANONYMOUS) -> Rows:
        """[R, ...] predictions of rows of the same shapes.

        Cancelling withdraws the rows that no call has taken, and calls that are for nobody else.
        """
        shape = tuple(np.shape(value) for value in rows[0])
        height, width = shape[0][-2:]
        answer: asyncio.Future[Rows] = asyncio.get_running_loop().create_future()
        ask = _Ask(tenant, rows, shape, height * width, answer, self._observer.asked(), len(rows), len(rows))
        self._asks.add(ask)
        self._queue.put(ask)
        self._changed.set()
        try:
            return await answer
        finally:
            self._asks.remove(ask)
            if ask.missing:
                self._withdraw(ask)

    def _withdraw(self, ask: _Ask) -> None:
        self._queue.remove(ask)
        for batch, call in self._calls.items():
            if not _useful_rows(batch):
                call.cancel()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._changed.wait()
            while self._changed.is_set():
                self._changed.clear()
                # One turn of the event loop: generations that the last call answered ask for their next step now, and
                # so get into the same batch again.
                await asyncio.sleep(0)
            self._not_later()
            while (batch := self._under_way.next_batch(self._queue, loop.time())) is not None:
                call = asyncio.create_task(self._call(batch), name="model call")
                self._calls[batch] = call
                # No `finally` of a task runs that is cancelled before its first turn.
                call.add_done_callback(partial(self._ended, batch))
            if (wait := self._under_way.ask_again(self._queue, loop.time())) > 0:
                self._later = loop.call_later(wait, self._changed.set)
            if not self._asks:
                self._queue.reset()

    def _not_later(self) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None

    async def _call(self, batch: Batch[_Ask]) -> bool:
        """Whether the model has answered."""
        rows = [row for ask, start, count in batch.parts for row in ask.rows[start : start + count]]
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            with self._observer.calling([ask.observed for ask, _, _ in batch.parts]):
                predictions = await self._model(*(_stacked(values) for values in zip(*rows, strict=True)))
        except asyncio.CancelledError:
            self._observer.called(len(rows), 0, batch.bound, loop.time() - began)
            raise
        except Exception as error:
            for ask, _, _ in batch.parts:
                if not ask.answer.done():
                    ask.answer.set_exception(error)
            return False
        self._observer.called(len(rows), _useful_rows(batch), batch.bound, loop.time() - began)
        at = 0
        for ask, start, count in batch.parts:
            ask.answered(start, predictions[at : at + count])
            at += count
        return True

    def _ended(self, batch: Batch[_Ask], call: asyncio.Task[bool]) -> None:
        del self._calls[batch]
        answered = not call.cancelled() and call.exception() is None and call.result()
        self._under_way.ended(batch, asyncio.get_running_loop().time(), answered=answered)
        self._changed.set()


def _useful_rows(batch: Batch[_Ask]) -> int:
    """Rows for which somebody still waits."""
    return sum(rows for ask, _, rows in batch.parts if not ask.answer.done())


def _stacked(values: Sequence[Any]) -> NDArray[Any]:
    """[B, ...] of B arrays or numbers; floats are float32."""
    stacked: NDArray[Any] = np.stack(values)
    return stacked.astype(np.float32) if stacked.dtype == np.float64 else stacked

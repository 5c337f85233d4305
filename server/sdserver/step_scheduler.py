"""One call of a model for the rows of many generations: requests join and leave the batch at every denoising step.

While a call runs, rows of other generations wait; the next call takes those that waited longest and everything of the
same shapes that fits beside them. Nothing but the shapes has to agree: sampler, step, guidance and prompts differ
freely.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from types import TracebackType
    from typing import Self

Array = NDArray[np.float32]


class Row(NamedTuple):
    """One latent under one condition: `latents` [C, h, w] as the UNet takes them, `text_states` [tokens, width]."""

    latents: Array
    timestep: float
    text_states: Array


@dataclass(slots=True, eq=False)
class _Waiting:
    """Rows that one generation asked for together, and where their predictions [R, C, h, w] go."""

    rows: Sequence[tuple[Any, ...]]
    predictions: asyncio.Future[Array]
    done: list[Array] = field(default_factory=list)

    @property
    def shape(self) -> tuple[Any, ...]:
        """What has to agree in a batch."""
        return tuple(np.shape(value) for value in self.rows[0])


class StepScheduler:
    """Batches the rows of one model, at most `max_rows` a call, one call at a time.

    A row is a tuple of arrays and numbers. `model` takes an array for each of its places, such as latents [B, C, h, w],
    timesteps [B] and text states [B, tokens, width] for `Row`, and returns [B, C, h, w].
    Used as an async context manager; leaving it stops the worker and cancels whoever still waits.
    """

    def __init__(self, model: Callable[..., Awaitable[Array]], max_rows: int) -> None:
        self._model = model
        self._max_rows = max_rows
        self._waiting: deque[_Waiting] = deque()
        self._arrival = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._worker = asyncio.create_task(self._work(), name="step scheduler")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._worker is not None
        self._worker.cancel()
        await asyncio.wait([self._worker])
        for waiting in self._waiting:
            waiting.predictions.cancel()
        self._waiting.clear()

    @property
    def waiting_rows(self) -> int:
        """Rows that no call has taken yet."""
        return sum(len(waiting.rows) - len(waiting.done) for waiting in self._waiting)

    async def predict(self, rows: Sequence[tuple[Any, ...]]) -> Array:
        """[R, C, h, w] predictions of rows of the same shapes. Cancelling withdraws the rows that no call has taken."""
        waiting = _Waiting(rows, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._arrival.set()
        return await waiting.predictions

    async def _work(self) -> None:
        while True:
            await self._arrival.wait()
            # One turn of the event loop: generations that the last call answered ask for their next step now, and so
            # get into the same batch again.
            await asyncio.sleep(0)
            batch = self._next_batch()
            if not batch:
                self._arrival.clear()
                continue
            await self._run(batch)

    def _next_batch(self) -> list[tuple[_Waiting, Sequence[tuple[Any, ...]]]]:
        """The rows that waited longest and whatever of their shape fits beside them; what does not fit stays first."""
        self._waiting = deque(waiting for waiting in self._waiting if not waiting.predictions.done())
        if not self._waiting:
            return []
        shape = self._waiting[0].shape
        batch: list[tuple[_Waiting, Sequence[tuple[Any, ...]]]] = []
        room = self._max_rows
        for waiting in self._waiting:
            if room == 0:
                break
            if waiting.shape == shape:
                taken = waiting.rows[len(waiting.done) : len(waiting.done) + room]
                batch.append((waiting, taken))
                room -= len(taken)
        return batch

    async def _run(self, batch: list[tuple[_Waiting, Sequence[tuple[Any, ...]]]]) -> None:
        rows = [row for _, taken in batch for row in taken]
        try:
            predictions = await self._model(*(_stacked(values) for values in zip(*rows, strict=True)))
        except Exception as error:
            for waiting, _ in batch:
                if not waiting.predictions.done():
                    waiting.predictions.set_exception(error)
            return
        start = 0
        for waiting, taken in batch:
            waiting.done.extend(predictions[start : start + len(taken)])
            start += len(taken)
            if len(waiting.done) == len(waiting.rows) and not waiting.predictions.done():
                waiting.predictions.set_result(np.stack(waiting.done))


def _stacked(values: Sequence[Any]) -> NDArray[Any]:
    """[B, ...] of B arrays or numbers; floats are float32."""
    stacked: NDArray[Any] = np.stack(values)
    return stacked.astype(np.float32) if stacked.dtype == np.float64 else stacked

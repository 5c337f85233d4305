"""A server in a simulation: admission, the life of requests, step schedulers."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING

from sdserver.batching import Batch, Calls
from sdserver.capacity.events import drive
from sdserver.capacity.gpu import Call
from sdserver.engine_schedulers import decoder_rows, unet_rows
from sdserver.fair_queue import FairQueue
from sdserver.observation import ANONYMOUS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sdserver.capacity.events import Act, Clock, Process
    from sdserver.capacity.gpu import Gpu
    from sdserver.capacity.outcome import Costs, Outcome, Pool
    from sdserver.capacity.workload import Shape, Work


@dataclass(slots=True, eq=False)
class Ask:
    """Rows that an image waits for."""

    shape: Shape
    row_work: int
    size: int
    waiting: int
    missing: int
    answered: Act
    tenant: str = ANONYMOUS


class Scheduler:
    """A `StepScheduler`. `step` is what the event loop does for each answer."""

    def __init__(
        self,
        model: str,
        server: Server,
        bound: Callable[[int], int],
        seconds: Callable[[int, int], float],
        step: float,
        called: Callable[[Batch[Ask]], None],
        parallel: int,
    ) -> None:
        self._model = model
        self._server = server
        self._seconds = seconds
        self._step = step
        self._called = called
        self._under_way: Calls[Ask] = Calls(bound, parallel)
        self._queue: FairQueue[Ask] = FairQueue()
        self._asks = 0
        self._looks = False

    def ask(self, shape: Shape, rows: int, answered: Act) -> None:
        self._queue.put(Ask(shape, math.prod(shape), rows, rows, rows, answered))
        self._asks += 1
        self._look()

    def _look(self) -> None:
        if not self._looks:
            self._looks = True
            self._server.clock.at(self._server.clock.now, self._send, last=True)

    def _send(self) -> None:
        self._looks = False
        clock = self._server.clock
        while (batch := self._under_way.next_batch(self._queue, clock.now)) is not None:
            first = batch.parts[0][0]
            ended = partial(self._server.work, len(batch.parts) * self._step, partial(self._ended, batch))
            seconds = partial(self._seconds, first.row_work)
            next(self._server.gpus).call(Call(self._model, first.shape, batch.rows, seconds, ended))
            self._called(batch)
        if (wait := self._under_way.ask_again(self._queue, clock.now)) > 0:
            clock.after(wait, self._look)
        if not self._asks:
            self._queue.reset()

    def _ended(self, batch: Batch[Ask]) -> None:
        self._under_way.ended(batch, self._server.clock.now)
        for ask, _, rows in batch.parts:
            ask.missing -= rows
            if ask.missing == 0:
                self._asks -= 1
                ask.answered()
        self._look()


class Place:
    """A request's place among those that run."""

    def __init__(self) -> None:
        self.started = False
        self.waits: Act | None = None

    def start(self) -> None:
        self.started = True
        if self.waits is not None:
            self.waits()

    def when_started(self, act: Act) -> None:
        if self.started:
            act()
        else:
            self.waits = act


class Server:
    """Admission, the life of requests, and the schedulers of an engine."""

    def __init__(
        self, clock: Clock, gpus: Sequence[Gpu], number: int, pool: Pool, costs: Costs, outcome: Outcome
    ) -> None:
        self.clock = clock
        # Servers do not all begin with the same one.
        self.gpus = cycle(gpus[(number + turn) % len(gpus)] for turn in range(len(gpus)))
        self._pool = pool
        self._costs = costs
        self._outcome = outcome
        self._active = 0
        self._queue: deque[Place] = deque()
        self._free_at = 0.0
        engine, unet, stages = costs.engine, costs.unet, costs.stages
        self._unet = Scheduler(
            "unet",
            self,
            partial(unet_rows, engine, costs.batched_by or unet),
            lambda places, rows: unet.seconds(rows, places),
            costs.server_step,
            self._called,
            pool.parallel_calls,
        )
        self._decoder = Scheduler(
            "vae_decoder",
            self,
            partial(decoder_rows, engine),
            lambda places, rows: stages.decode_place * rows * places,
            0.0,
            lambda batch: None,
            pool.parallel_calls,
        )

    def work(self, seconds: float, act: Act) -> None:
        """Does something on the event loop, which does one thing at a time."""
        self._free_at = max(self.clock.now, self._free_at) + seconds
        self.clock.at(self._free_at, act)

    def request(self, work: Work, *, counts: bool) -> Process:
        """The life of a request."""
        pool, arrival = self._pool, self.clock.now
        if self._active >= pool.max_active and len(self._queue) >= pool.max_queued:
            self._outcome.refused += counts
            return
        place = Place()
        self._queue.append(place)
        self._fill()
        yield self._encode
        yield place.when_started
        wait = self.clock.now - arrival
        yield partial(self._all_images, work)
        self._active -= 1
        self._fill()
        if counts:
            self._outcome.images += work.images
            self._outcome.waits.append(wait)
            self._outcome.latencies.append(self.clock.now - arrival)
        self._outcome.ends.append(self.clock.now)

    def _fill(self) -> None:
        while self._queue and self._active < self._pool.max_active:
            self._active += 1
            self._queue.popleft().start()

    def _encode(self, done: Act) -> None:
        encode = self._costs.stages.encode
        next(self.gpus).call(Call("text_encoder", (1, 1), 1, lambda rows: rows * encode, done))

    def _all_images(self, work: Work, done: Act) -> None:
        left = work.images

        def one_done() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                done()

        for _ in range(work.images):
            drive(self._image(work, one_done))

    def _image(self, work: Work, done: Act) -> Process:
        for _ in range(work.evaluations):
            yield partial(self._unet.ask, work.shape, work.rows)
        yield partial(self._decoder.ask, work.tile, work.tiles)
        # On a thread of its own.
        yield partial(self.clock.after, self._costs.stages.write_place * work.places)
        done()

    def _called(self, batch: Batch[Ask]) -> None:
        self._outcome.rows += batch.rows
        self._outcome.room += batch.bound

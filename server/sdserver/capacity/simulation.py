"""The servers and their GPUs without models or clocks: the step scheduler, played against measured costs.

A discrete-event simulation. Requests arrive, get a place or are refused, and their images ask for rows; which rows a
call takes is decided by the scheduler's own rule (`batching`, `fair_queue`), and how long it takes by the cost model.

    arrivals = poisson(mix, rate=3.0, requests=2000, seed=0)
    simulate(arrivals, Pool(gpus=1, servers=1), costs).quantile(0.95)

What it leaves out: a GPU does the calls of all models one after the other, where it really works on them at the same
time, each slower by as much; prompts are of one chunk; all callers are one tenant.
"""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING

from sdserver.capacity.events import Clock, drive
from sdserver.capacity.gpu import Gpu
from sdserver.capacity.outcome import Costs, Outcome, Pool
from sdserver.capacity.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sdserver.capacity.workload import Work


def simulate(
    arrivals: Iterable[tuple[float, Work]],
    pool: Pool,
    costs: Costs,
    *,
    warm_up: int = 0,
    seed: int = 0,
    slowness: Callable[[float], float] = lambda now: 1.0,
) -> Outcome:
    """Serves requests to their end; the first `warm_up` of them do not count.

    Calls that begin at a time take `slowness` of it times what they cost: a machine that does other things, too.
    """
    clock, outcome, generator = Clock(), Outcome(gpus=pool.gpus), random.Random(seed)
    gpus = [Gpu(clock, costs.engine.max_batch_rows, outcome, slowness) for _ in range(pool.gpus)]
    servers = [Server(clock, gpus, number, pool, costs, outcome) for number in range(pool.servers)]
    for number, (time, work) in enumerate(arrivals):
        if number == warm_up:
            outcome.began = time
        # Many clients that take servers in turn, each for itself, are as good as chance.
        server = generator.choice(servers)
        clock.at(time, partial(drive, server.request(work, counts=number >= warm_up)))
    clock.run()
    return outcome

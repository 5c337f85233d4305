"""How many GPUs serve so many requests a second, so that callers wait no longer than they should."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sdserver.capacity.simulation import simulate
from sdserver.capacity.workload import images_of, poisson

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdserver.capacity.outcome import Costs, Outcome, Pool
    from sdserver.capacity.workload import Mix

# What a plan may refuse.
REFUSED_SHARE = 0.001
# GPUs are counted to this share of them: the next digits are the weather of a simulation.
PRECISION = 0.02


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of a service, and how soon: 95 % of the requests should take at most `p95` seconds."""

    mix: Mix
    rate: float
    """Requests a second."""
    p95: float

    @property
    def images_per_second(self) -> float:
        return self.rate * images_of(self.mix)


class Planner:
    """Simulates pools of one kind under one demand, with so many requests each time.

    Pools know nothing of each other, and each gets its share of the requests by chance: one of them stands for all.
    """

    def __init__(self, demand: Demand, pool: Pool, costs: Costs, requests: int = 1000, seed: int = 0) -> None:
        self.demand = demand
        self._pool = pool
        self._costs = costs
        self._requests = requests
        self._seed = seed
        self._known: dict[int, Outcome] = {}
        self._least: int | None = None

    def outcome(self, gpus: int) -> Outcome:
        """What one of the pools sees when there are so many GPUs in all."""
        if gpus not in self._known:
            rate = self.demand.rate * self._pool.gpus / gpus
            arrivals = poisson(self.demand.mix, rate, self._requests, self._seed)
            self._known[gpus] = simulate(arrivals, self._pool, self._costs, warm_up=self._requests // 10)
        return self._known[gpus]

    def least_gpus(self) -> int:
        """As many as make all the images if nobody minds waiting."""
        if self._least is None:
            rate = saturated_rate(self.demand.mix, self._pool, self._costs, self._seed)
            self._least = self.whole(self.demand.images_per_second / rate * self._pool.gpus)
        return self._least

    def whole(self, gpus: float) -> int:
        """So many, and as many more as fill their pools; at least one pool."""
        return max(1, math.ceil(gpus / self._pool.gpus)) * self._pool.gpus

    def gpus(self) -> int:
        """The fewest that meet the demand, to within PRECISION. Raises Unreachable."""
        alone = lone_p95(self.demand.mix, self._pool, self._costs, self._seed)
        if alone > self.demand.p95:
            raise Unreachable(alone)
        each = self._pool.gpus
        return each * fewest(lambda pools: self._meets(each * pools), self.least_gpus() // each)

    def _meets(self, gpus: int) -> bool:
        outcome = self.outcome(gpus)
        return outcome.quantile(0.95) <= self.demand.p95 and outcome.refused_share <= REFUSED_SHARE


class Unreachable(Exception):
    """Requests take longer than they may even alone: `seconds`, by the 95th percentile."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"even alone, requests take {seconds:.2f} s")
        self.seconds = seconds


def fewest(enough: Callable[[int], bool], least: int) -> int:
    """The fewest, from `least` on and to within PRECISION, that are enough, if more than enough are enough, too."""
    low, high = least - 1, least
    while not enough(high):
        low, high = high, max(high + 1, math.ceil(high * 1.5))
    while high - low > max(1, int(PRECISION * high)):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def saturated_rate(mix: Mix, pool: Pool, costs: Costs, seed: int = 0) -> float:
    """Images a second that a pool makes when requests always wait."""
    requests = max(200, 25 * pool.max_active) * pool.servers
    crowd = [(0.0, work) for _, work in poisson(mix, 1.0, requests, seed)]
    ends = simulate(crowd, replace(pool, max_queued=requests), costs, seed=seed).ends
    # Neither while the first ones fall into step, nor while the last ones are alone.
    first, last = len(ends) // 5, 4 * len(ends) // 5
    return images_of(mix) * (last - first) / (ends[last] - ends[first])


def lone_p95(mix: Mix, pool: Pool, costs: Costs, seed: int = 0) -> float:
    """Seconds that 95 % of the requests stay below where none meets another."""
    alone = [simulate([(0.0, work)], pool, costs).latencies[0] for _, work in poisson(mix, 1.0, 100, seed)]
    return sorted(alone)[95]

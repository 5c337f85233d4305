"""Whether `sdserver plan` tells the truth: its simulation against the real SDK, server and Triton, which get the same
requests at the same times.

The costs are measured first, as `sdserver calibrate` does it; then come three loads, as shares of what the simulation
says that this machine can do. A machine that does other things meanwhile is another one than it was a minute ago, and
another one from one second to the next, so the simulation that counts is fed with what the calls of the very run took,
and when; those of the plan, from before, and of the run's calls on average stand beside it. The bound is on the
differences of images a second, and of the seconds that requests take: on average, those in the middle, and the slowest.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from sdclient import AsyncClient, UnavailableError
from sdserver import cost_model, logs
from sdserver.capacity.outcome import Costs, Pool
from sdserver.capacity.planning import saturated_rate
from sdserver.capacity.simulation import simulate
from sdserver.capacity.workload import poisson, work_of
from sdserver.cost_model import CostModel, StageCosts
from sdserver.engines import load_catalog
from sdserver.observation import Observer, StepObserver
from sdserver.plan_command import SERVER_STEP_MS
from sdserver.server import Server

from benchmarks.harness import calibrated, machine, triton

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sdserver.capacity.workload import Work
    from sdserver.observation import StepModel
    from sdserver.settings import ServeSettings

STEPS = (8, 12, 16, 20)
LOADS = (0.4, 0.7, 0.9)
BOUND = 0.15
# So many calls of the run say how fast the machine was at a time.
NEAR_CALLS = 3
LEAST_REQUESTS = 40
MOST_PAUSE_SECONDS = 2.0
MODEL_LOADS_SECONDS = 30.0
ATTEMPTS = 4


class Took(NamedTuple):
    """What a call of a model took, without waiting for another of it."""

    ended: float
    rows: int
    seconds: float


@dataclass
class Calls(Observer):
    """What the calls of a server's models took, by model."""

    seen: dict[str, list[Took]] = field(default_factory=dict)

    def steps(self, engine: str, model: StepModel) -> StepObserver:
        seen = self.seen.setdefault(model, [])

        class Keeps(StepObserver):
            ended = 0.0

            def called(self, rows: int, useful: int, bound: int, seconds: float, padded: int = 0) -> None:
                now = time.perf_counter()
                seen.append(Took(now, rows, min(seconds, now - self.ended)))
                self.ended = now

        return Keeps()

    def costs(self, planned: Costs, places: int) -> Costs:
        """The planned costs, but with the mean seconds of these calls, all of images of so many places."""
        _, rows, seconds = np.array(self.seen["unet"]).T
        row, call = np.polyfit(rows, seconds, 1)
        if row <= 0 or call < 0:
            row, call = seconds.sum() / rows.sum(), 0.0
        _, decode_rows, decode_seconds = np.array(self.seen["vae_decoder"]).T
        beside = float(decode_seconds.sum() / decode_rows.sum()) + planned.stages.encode
        # These UNet calls took longer while others decoded or encoded: what that costs the GPU is in them already.
        stages = StageCosts(0.0, 0.0, planned.stages.write_place + beside / places)
        unet = CostModel(float(call), float(row) / places, 0.0)
        return replace(planned, unet=unet, stages=stages, batched_by=planned.unet)

    def slowness(self, costs: Costs, places: int, began: float) -> Callable[[float], float]:
        """How many times longer than on average UNet calls took that began about then, in seconds after `began`."""
        ended, rows, seconds = np.array(self.seen["unet"]).T
        starts = ended - seconds - began
        expected = costs.unet.call + rows * costs.unet.row(places)

        def around(now: float) -> float:
            near = np.argsort(np.abs(starts - now))[:NEAR_CALLS]
            return float(seconds[near].sum() / expected[near].sum())

        return around


@dataclass(frozen=True)
class Point:
    """What was seen, or foreseen, at one load: images a second, and the seconds that requests took."""

    images_per_second: float
    mean: float
    middle: float
    """The mean of the tenth around the median: of few requests, a quantile is one of them, and so chance."""
    slowest: float
    """The mean of the slowest tenth."""

    @classmethod
    def of(cls, latencies: list[float], seconds: float) -> Point:
        """Of the requests of one image that took so long each, within so many seconds in all."""
        ordered, tenth = sorted(latencies), len(latencies) // 10
        before = (len(ordered) - tenth) // 2
        return cls(
            len(latencies) / seconds,
            statistics.mean(latencies),
            statistics.mean(ordered[before : before + tenth]),
            statistics.mean(ordered[-tenth:]),
        )

    def over(self, other: Point) -> Point:
        """The ratios of two points."""
        return Point(*(mine / others for mine, others in zip(self, other, strict=True)))

    @property
    def worst(self) -> float:
        """The greatest difference from 1."""
        return max(abs(each - 1) for each in self)

    def __iter__(self) -> Iterator[float]:
        return iter((self.images_per_second, self.mean, self.middle, self.slowest))

    def __str__(self) -> str:
        return "".join(f"{each:9.2f}" for each in self)


async def really(client: AsyncClient, arrivals: list[tuple[float, Work]]) -> tuple[float, list[float]]:
    """Sends requests when they are due; when that began, and the seconds that each took from then."""
    began = time.perf_counter()

    async def one(number: int, due: float, work: Work) -> float:
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        await client.generate(f"a lake, number {number}", steps=work.evaluations, seed=number, guidance_scale=5.0)
        return time.perf_counter() - began - due

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(number, *arrival)) for number, arrival in enumerate(arrivals)]
    return began, [task.result() for task in tasks]


async def steadily(client: AsyncClient, arrivals: list[tuple[float, Work]], calls: Calls) -> tuple[float, list[float]]:
    """As `really`, and once more where the machine stood still meanwhile, as a virtual one may: nothing is measured
    then. Triton takes models for dead that stood still."""
    for _ in range(ATTEMPTS):
        for seen in calls.seen.values():
            seen.clear()
        pauses: list[float] = []
        watching = asyncio.create_task(watch(pauses))
        try:
            result = await really(client, arrivals)
        except* UnavailableError as error:
            print(f"Triton lost a model: {error.exceptions[0]}")
        else:
            if max(pauses, default=0.0) < MOST_PAUSE_SECONDS:
                return result
        finally:
            watching.cancel()
        print(f"the machine stood still for {max(pauses, default=0.0):.1f} s: this load once more")
        await asyncio.sleep(MODEL_LOADS_SECONDS)
    raise SystemExit("the machine stands still again and again: nothing can be measured")


async def watch(pauses: list[float]) -> None:
    """Notes how long the event loop was away each time."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(0.1)
        pauses.append(time.perf_counter() - before)


@dataclass(frozen=True)
class Row:
    """What the real server did at a load, and what simulations say."""

    real: Point
    simulated: Point
    """With what this run's calls took, and when."""
    on_average: Point
    """With what this run's calls took on average."""
    planned: Point
    """With what `calibrate` measured before."""


async def measure(seconds: float) -> dict[float, Row]:
    """By load."""
    found = {}
    async with triton() as plain, calibrated(plain) as settings:
        costs, pool = _costs(settings), Pool(max_active=settings.max_active, max_queued=10_000)
        width, height = costs.engine.native_width, costs.engine.native_height
        mix = tuple((work_of(costs.engine, width, height, steps), 1.0) for steps in STEPS)
        places = mix[0][0].places
        able = saturated_rate(mix, pool, costs)
        print(f"the simulation says {able:.2f} images a second at most")
        real, calls = settings.model_copy(update={"max_queued": pool.max_queued}), Calls()
        async with Server(real, observers=[calls]) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
            await asyncio.gather(*(client.generate("a lake", steps=4, seed=seed) for seed in range(8)))
            for number, load in enumerate(LOADS):
                rate = load * able
                arrivals = poisson(mix, rate, max(LEAST_REQUESTS, round(rate * seconds)), number)
                began, latencies = await steadily(client, arrivals, calls)
                took = calls.costs(costs, places)
                outcomes = (
                    simulate(arrivals, pool, took, slowness=calls.slowness(took, places, began)),
                    simulate(arrivals, pool, took),
                    simulate(arrivals, pool, costs),
                )
                ends = [due + latency for (due, _), latency in zip(arrivals, latencies, strict=True)]
                found[load] = Row(
                    Point.of(latencies, max(ends) - arrivals[0][0]),
                    *(Point.of(outcome.latencies, outcome.seconds) for outcome in outcomes),
                )
    return found


def _costs(settings: ServeSettings) -> Costs:
    engine = load_catalog(settings.model_repository).default
    calibration = cost_model.load(settings.cost_model_folder / f"{engine.id}.json")
    assert calibration.stages is not None
    return Costs(engine, calibration.cost_model, calibration.stages, SERVER_STEP_MS / 1000)


def main() -> int:
    """Prints the figures; returns 1 if a difference is beyond the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each load")
    arguments = parser.parse_args()
    logs.configure("warning", "console")
    found = asyncio.run(measure(arguments.seconds))
    print(f"simulation and reality, requests of {min(STEPS)} to {max(STEPS)} steps; {machine()}")
    print(f"{'load':>6}{'':12}{'images/s':>9}{'mean s':>9}{'middle':>9}{'slowest':>9}")
    for load, row in found.items():
        for name, point in (("real", row.real), ("simulated", row.simulated), ("on average", row.on_average)):
            print(f"{load:6.1f}  {name:10}{point}")
        print(f"{load:6.1f}  {'planned':10}{row.planned}")
        print(f"{load:6.1f}  {'ratio':10}{row.simulated.over(row.real)}")
    worst = max(row.simulated.over(row.real).worst for row in found.values())
    print(f"greatest difference {worst:.0%} (bound {BOUND:.0%})")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())

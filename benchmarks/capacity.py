"""Whether `sdserver plan` tells the truth: its simulation against the real SDK, server and Triton, which get the same
requests at the same times.

The costs are measured first, as `sdserver calibrate` does it; then come three loads, as shares of what the simulation
says that this machine can do. A machine that does other things meanwhile is another one than it was a minute ago, so
the simulation that counts is fed with what the calls of the very run took; that of the plan, from before, stands beside
it. The bound is on the differences of images a second, and of the mean, median and 95th percentile of the seconds that
requests take.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from sdclient import AsyncClient
from sdserver import cost_model, logs
from sdserver.capacity.outcome import Costs, Pool, quantile
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
    from sdserver.capacity.workload import Work
    from sdserver.observation import StepModel
    from sdserver.settings import ServeSettings

STEPS = (8, 12, 16, 20)
LOADS = (0.4, 0.7, 0.9)
BOUND = 0.15


@dataclass
class Calls(Observer):
    """What the calls of a server's models took, by model: rows and seconds, without waiting for each other."""

    seen: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def steps(self, engine: str, model: StepModel) -> StepObserver:
        seen = self.seen.setdefault(model, [])

        class Keeps(StepObserver):
            ended = 0.0

            def called(self, rows: int, useful: int, bound: int, seconds: float, padded: int = 0) -> None:
                now = time.perf_counter()
                seen.append((rows, min(seconds, now - self.ended)))
                self.ended = now

        return Keeps()

    def costs(self, planned: Costs, places: int) -> Costs:
        """The planned costs, but with the mean seconds of these calls, all of images of so many places."""
        rows, seconds = np.array(self.seen["unet"]).T
        row, call = np.polyfit(rows, seconds, 1)
        if row <= 0 or call < 0:
            row, call = seconds.sum() / rows.sum(), 0.0
        decode_rows, decode_seconds = np.array(self.seen["vae_decoder"]).T
        beside = float(decode_seconds.sum() / decode_rows.sum()) + planned.stages.encode
        # These UNet calls took longer while others decoded or encoded: what that costs the GPU is in them already.
        stages = StageCosts(0.0, 0.0, planned.stages.write_place + beside / places)
        unet = CostModel(float(call), float(row) / places, 0.0)
        return replace(planned, unet=unet, stages=stages, batched_by=planned.unet)


@dataclass(frozen=True)
class Point:
    """What was seen, or foreseen, at one load."""

    images_per_second: float
    mean: float
    p50: float
    p95: float

    @classmethod
    def of(cls, latencies: list[float], seconds: float) -> Point:
        """Of the requests of one image that took so long each, within so many seconds in all."""
        return cls(
            len(latencies) / seconds,
            statistics.mean(latencies),
            quantile(latencies, 0.5),
            quantile(latencies, 0.95),
        )

    def over(self, other: Point) -> Point:
        """The ratios of two points."""
        return Point(
            self.images_per_second / other.images_per_second,
            self.mean / other.mean,
            self.p50 / other.p50,
            self.p95 / other.p95,
        )

    @property
    def worst(self) -> float:
        """The greatest difference from 1."""
        return max(abs(each - 1) for each in (self.images_per_second, self.mean, self.p50, self.p95))

    def __str__(self) -> str:
        return f"{self.images_per_second:9.2f}{self.mean:9.2f}{self.p50:9.2f}{self.p95:9.2f}"


async def really(client: AsyncClient, arrivals: list[tuple[float, Work]]) -> Point:
    """Sends requests when they are due."""
    began = time.perf_counter()

    async def one(number: int, due: float, work: Work) -> float:
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        await client.generate(f"a lake, number {number}", steps=work.evaluations, seed=number, guidance_scale=5.0)
        return time.perf_counter() - began - due

    latencies = await asyncio.gather(*(one(number, *arrival) for number, arrival in enumerate(arrivals)))
    return Point.of(latencies, time.perf_counter() - began - arrivals[0][0])


async def measure(seconds: float) -> dict[float, tuple[Point, Point, Point]]:
    """By load: what the real server did; what the simulation says by its calls, and what the plan said."""
    found = {}
    async with triton() as plain, calibrated(plain) as settings:
        costs, pool = _costs(settings), Pool(max_active=settings.max_active, max_queued=10_000)
        width, height = costs.engine.native_width, costs.engine.native_height
        mix = tuple((work_of(costs.engine, width, height, steps), 1.0) for steps in STEPS)
        able = saturated_rate(mix, pool, costs)
        print(f"the simulation says {able:.2f} images a second at most")
        real, calls = settings.model_copy(update={"max_queued": pool.max_queued}), Calls()
        async with Server(real, observers=[calls]) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
            await asyncio.gather(*(client.generate("a lake", steps=4, seed=seed) for seed in range(8)))
            for number, load in enumerate(LOADS):
                rate = load * able
                arrivals = poisson(mix, rate, max(20, round(rate * seconds)), number)
                for seen in calls.seen.values():
                    seen.clear()
                was = await really(client, arrivals)
                simulated, planned = (
                    simulate(arrivals, pool, each) for each in (calls.costs(costs, mix[0][0].places), costs)
                )
                found[load] = (
                    was,
                    Point.of(simulated.latencies, simulated.seconds),
                    Point.of(planned.latencies, planned.seconds),
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
    print(f"{'load':>6}{'':12}{'images/s':>9}{'mean s':>9}{'p50':>9}{'p95':>9}")
    for load, (real, simulated, planned) in found.items():
        print(f"{load:6.1f}{'  real':12}{real}\n{'':6}{'  simulated':12}{simulated}\n{'':6}{'  planned':12}{planned}")
        print(f"{'':6}{'  ratio':12}{simulated.over(real)}")
    worst = max(simulated.over(real).worst for real, simulated, _ in found.values())
    print(f"greatest difference {worst:.0%} (bound {BOUND:.0%})")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())

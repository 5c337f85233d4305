"""Many clients at once, through the real SDK, server and Triton: four ways to run the same requests, in turns.

    ours           requests join and leave the batch at each step
    request-level  a batch of requests runs to its end before the next one starts, as where a Triton model is the
                   whole pipeline behind its dynamic batcher (NVIDIA's tutorial)
    serial         one request after the other
    diffusers      a diffusers pipeline behind a lock, in this process, without any server

The first three are the same server but for who may start; so request-level batching here mixes step counts and scales,
which pipelines do not. Closed loop: each client asks again when it has its image. Open loop: requests arrive by a
Poisson process at a share of the rate that ours reached; diffusers, far slower, takes no part.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sdclient import Accepted, AsyncClient, Finished, Progress
from sdserver import logs
from sdserver.admission import Admission
from sdserver.backends.triton import TritonBackend
from sdserver.engines import load_catalog
from sdserver.server import Server

from benchmarks.harness import Calls, calibrated, machine, quantile, spread, triton
from benchmarks.one_image import diffusers_pipeline

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from sdserver.settings import ServeSettings

CLIENTS = 8
STEPS = (8, 12, 16, 20)
OPEN_LOOP_SHARE = 0.7
BOUNDS = {"of the engine alone": 0.9, "over request-level": 1.2}
PLOT = Path("out/load.png")


class GroupAdmission(Admission):
    """Nobody starts while anybody runs; then all that wait, as many as may run at a time."""

    def _fill(self) -> None:
        if not self._active:
            super()._fill()


@dataclass
class Arm:
    """One way to run requests, and what was seen of it."""

    name: str
    images_per_second: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    open_latencies: list[float] = field(default_factory=list)
    first_steps: list[float] = field(default_factory=list)
    calls: Calls = field(default_factory=Calls)
    stages: dict[str, list[float]] = field(default_factory=dict)


@asynccontextmanager
async def served(settings: ServeSettings, arm: Arm) -> AsyncIterator[AsyncClient]:
    """A client of a server that runs requests in an arm's way."""
    if arm.name == "serial":
        settings = settings.model_copy(update={"max_active": 1})
    server = Server(settings, observers=[arm.calls])
    if arm.name == "request-level":
        server.admission = GroupAdmission(settings.max_active, settings.max_queued)
    async with server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        yield client


async def one(client: AsyncClient, arm: Arm, generator: random.Random) -> float:
    """Seconds of one request; keeps what is known of its stages."""
    options: dict[str, Any] = {
        "steps": generator.choice(STEPS),
        "seed": generator.randrange(2**32),
        "guidance_scale": generator.uniform(3, 9),
    }
    began = time.perf_counter()
    accepted = began
    async with client.stream(f"a lake, number {generator.randrange(50)}", **options) as events:
        async for event in events:
            match event:
                case Accepted():
                    accepted = time.perf_counter()
                case Progress(step=1):
                    arm.first_steps.append(time.perf_counter() - accepted)
                case Finished(timings=timings):
                    for stage in ("queue", "encode", "denoise", "decode"):
                        arm.stages.setdefault(stage, []).append(getattr(timings, stage))
    return time.perf_counter() - began


async def closed_loop(client: AsyncClient, arm: Arm, seconds: float, seed: int) -> tuple[float, float]:
    """CLIENTS clients for so many seconds; returns when it began and ended."""
    began = time.perf_counter()
    done = 0

    async def loop(number: int) -> None:
        nonlocal done
        generator = random.Random(seed * 1000 + number)
        while time.perf_counter() - began < seconds:
            arm.latencies.append(await one(client, arm, generator))
            done += 1

    await asyncio.gather(*(loop(number) for number in range(CLIENTS)))
    ended = time.perf_counter()
    arm.images_per_second.append(done / (ended - began))
    return began, ended


async def open_loop(client: AsyncClient, arm: Arm, rate: float, seconds: float, seed: int) -> None:
    """Requests by a Poisson process of that rate a second; the same ones at the same times for each arm."""
    generator = random.Random(seed)
    tasks: list[asyncio.Task[float]] = []
    began = time.perf_counter()
    due = began
    while (due := due + generator.expovariate(rate)) - began < seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(client, arm, random.Random(generator.random()))))
    arm.open_latencies += await asyncio.gather(*tasks)


async def engine_alone(settings: ServeSettings, rows: int, seconds: float) -> float:
    """Rows a second of UNet calls of so many rows, one after the other, and nothing else."""
    engine = load_catalog(settings.model_repository).default
    backend = TritonBackend(settings.triton_url)
    scale = engine.latents.downsampling
    generator = np.random.default_rng(0)
    shape = rows, engine.unet_channels, engine.native_height // scale, engine.native_width // scale
    latents = generator.standard_normal(shape, np.float32)
    states = generator.standard_normal(
        (rows, engine.text_encoder.context_length, engine.text_encoder.width), np.float32
    )
    try:
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            await backend.predict(engine, latents, np.full(rows, 500, np.float32), states)
            done += rows
        return done / (time.perf_counter() - began)
    finally:
        await backend.close()


async def diffusers_loop(arm: Arm, pipeline: Callable[[int], None], seconds: float, seed: int) -> None:
    """The pipeline behind a lock, for CLIENTS callers that always wait: it runs all the time."""
    generator = random.Random(seed)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        await asyncio.to_thread(pipeline, generator.choice(STEPS))
        done += 1
    arm.images_per_second.append(done / (time.perf_counter() - began))


async def measure(rounds: int, seconds: float) -> tuple[dict[str, Arm], list[float]]:
    """All arms, and the shares of the engine's own rate that ours reached."""
    arms = {name: Arm(name) for name in ("ours", "request-level", "serial", "diffusers")}
    shares: list[float] = []
    async with triton() as plain, calibrated(plain) as settings:
        engine = load_catalog(settings.model_repository).default
        folder = settings.model_repository / "engines" / engine.id
        pipelines = {steps: diffusers_pipeline(engine, folder, steps) for steps in STEPS}
        for number in range(rounds):
            for name, arm in arms.items():
                if name == "diffusers":
                    await diffusers_loop(arm, lambda steps: pipelines[steps](), seconds, number)
                    continue
                async with served(settings, arm) as client:
                    began, _ = await closed_loop(client, arm, seconds, number)
                    if name == "ours":
                        rows = round(statistics.median(call.rows for call in arm.calls.calls))
                        alone = await engine_alone(settings, rows, seconds / 2)
                        # Without the tail, in which the last clients are alone.
                        until = began + seconds
                        shares.append(arm.calls.useful_rows(began + 1, until) / (until - began - 1) / alone)
        rate = OPEN_LOOP_SHARE * statistics.median(arms["ours"].images_per_second)
        for name in ("ours", "request-level", "serial"):
            async with served(settings, arms[name]) as client:
                await open_loop(client, arms[name], rate, rounds * seconds, seed=1)
    return arms, shares


def report(arms: dict[str, Arm], shares: list[float]) -> bool:
    """Prints the figures; returns whether the bounds hold."""
    ours = arms["ours"]
    print(f"{CLIENTS} clients, {min(STEPS)} to {max(STEPS)} steps; {machine()}")
    print(f"{'':15}{'images/s':>22}{'p50 s':>8}{'p95':>7}{'p99':>7}   open loop: {'p50':>6}{'p95':>7}{'p99':>7}")
    for arm in arms.values():
        row = f"  {arm.name:13}{spread(arm.images_per_second):>22}"
        for values in (arm.latencies, arm.open_latencies):
            row += "   " + "".join(f"{quantile(values, share):7.2f}" for share in (0.5, 0.95, 0.99)) if values else ""
        print(row)
    ratios: dict[str, list[float]] = {"of the engine alone": shares}
    for name in ("request-level", "serial", "diffusers"):
        others = arms[name].images_per_second
        ratios[f"over {name}"] = [a / b for a, b in zip(ours.images_per_second, others, strict=True)]
    print("ratios of images (of the engine alone: of UNet rows) a second, by rounds")
    for name, values in ratios.items():
        bound = f", bound {BOUNDS[name]}" if name in BOUNDS else ""
        print(f"  ours {name:22}{spread(values)}{bound}")
    wasted = sum(call.rows - call.useful for call in ours.calls.calls)
    print(f"fill {ours.calls.fill:.2f}, rows wasted {wasted} of {sum(call.rows for call in ours.calls.calls)}")
    stages = {stage: f"{statistics.median(values) * 1000:.0f} ms" for stage, values in ours.stages.items()}
    print("medians of stages, ours: " + ", ".join(f"{stage} {value}" for stage, value in stages.items()))
    for arm in (ours, arms["request-level"], arms["serial"]):
        print(f"accepted to first step done, {arm.name}: p50 {quantile(arm.first_steps, 0.5):.2f} s, "
              f"p95 {quantile(arm.first_steps, 0.95):.2f} s")  # fmt: skip
    return all(statistics.median(ratios[name]) >= bound for name, bound in BOUNDS.items())


def plot(arms: dict[str, Arm]) -> None:
    """Throughput, and how long requests took in open loop, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    names = list(arms)
    left.bar(names, [statistics.median(arms[name].images_per_second) for name in names], color="#4a6fa5")
    left.set_title(f"images a second, {CLIENTS} clients")
    for name in names[:3]:
        values = np.sort(arms[name].open_latencies)
        right.plot(values, np.linspace(0, 1, len(values)), label=name)
    right.set(title="open loop: share of requests done within", xlabel="seconds", ylim=(0, 1))
    right.legend()
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=110)
    print(f"plots: {PLOT}")


def main() -> int:
    """Prints and plots the figures; returns 1 if a ratio is below its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each arm in each round")
    arguments = parser.parse_args()
    logs.configure("warning", "console")
    arms, shares = asyncio.run(measure(arguments.rounds, arguments.seconds))
    plot(arms)
    return int(not report(arms, shares))


if __name__ == "__main__":
    sys.exit(main())

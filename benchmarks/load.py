"""Many clients at once, through the real SDK, server and Triton: five ways to run the same requests, in turns.

    ours           requests join and leave the batch at each step
    request-level  a batch of requests runs to its end before the next one starts, as where a Triton model is the
                   whole pipeline behind its dynamic batcher (NVIDIA's tutorial); a pipeline has one number of steps,
                   so a batch is of those that wait with the oldest one's
    mixed groups   the same with any numbers of steps in a batch, which pipelines cannot do
    serial         one request after the other
    diffusers      a diffusers pipeline behind a lock, in this process, without any server

The first four are the same server but for who may start; their guidance scales differ within a batch. Closed loop: each
client asks again when it has its image. Open loop: requests arrive by a Poisson process at a share of the rate that
ours reached; diffusers, far slower, takes no part.

At the end 12 clients ask ours for images that have nothing in common but their size: how full are its calls?

The engine alone is what its UNet, called at the median number of rows, and its decoder could do one after the other,
with no server and nothing else to do.
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
from sdclient import AsyncClient, Finished, Progress, Sampler
from sdserver import logs
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
MIXED_CLIENTS = 12
SAMPLERS: tuple[Sampler, ...] = ("ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_sde", "unipc")
OPEN_LOOP_SHARE = 0.7
BOUNDS = {"of the engine alone": 0.9, "over request-level": 1.2}
FILL_BOUND = 0.9
PLOT = Path("out/load.png")


class Gate:
    """Who may ask the server: all at once or, with `size`, groups of so many, each after the one before has ended.

    A group is of the oldest that wait: with `same_steps`, of those with as many steps as the oldest.
    """

    def __init__(self, size: int | None = None, *, same_steps: bool = False) -> None:
        self._size, self._same_steps = size, same_steps
        self._waiting: list[tuple[int, asyncio.Event]] = []
        self._running = 0

    @asynccontextmanager
    async def __call__(self, steps: int) -> AsyncIterator[None]:
        if self._size is not None:
            turn = asyncio.Event()
            self._waiting.append((steps, turn))
            # Those that ask at the same time are in the same group.
            await asyncio.sleep(0)
            self._next()
            await turn.wait()
        try:
            yield
        finally:
            self._running -= 1
            # Who has his image now asks again before the next group is made.
            asyncio.get_running_loop().call_later(0.002, self._next)

    def _next(self) -> None:
        if self._running > 0 or not self._waiting:
            return
        oldest, _ = self._waiting[0]
        group = [each for each in self._waiting if not self._same_steps or each[0] == oldest][: self._size]
        self._running = len(group)
        for each in group:
            self._waiting.remove(each)
            each[1].set()


GATES: dict[str, Callable[[], Gate]] = {
    "ours": Gate,
    "request-level": lambda: Gate(CLIENTS, same_steps=True),
    "mixed groups": lambda: Gate(CLIENTS),
    "serial": lambda: Gate(1),
}


@dataclass
class Arm:
    """One way to run requests, and what was seen of it."""

    name: str
    gate: Gate = field(default_factory=Gate)
    images_per_second: list[float] = field(default_factory=list)
    fills: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    open_latencies: list[float] = field(default_factory=list)
    first_steps: list[float] = field(default_factory=list)
    calls: Calls = field(default_factory=Calls)
    stages: dict[str, list[float]] = field(default_factory=dict)


@asynccontextmanager
async def served(settings: ServeSettings, arm: Arm) -> AsyncIterator[AsyncClient]:
    """A client of a server that the requests of an arm go to, in its way."""
    arm.gate = GATES.get(arm.name, Gate)()
    async with Server(settings, observers=[arm.calls]) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        yield client


async def one(client: AsyncClient, arm: Arm, generator: random.Random) -> float:
    """Seconds of one request; keeps what is known of its stages."""
    options: dict[str, Any] = {
        "steps": generator.choice(STEPS),
        "seed": generator.randrange(2**32),
        "guidance_scale": generator.uniform(3, 9),
    }
    if arm.name == "mixed":
        options |= {"sampler": generator.choice(SAMPLERS), "image_count": generator.choice((1, 1, 2))}
        if generator.random() < 0.25:
            # One row a step, not two.
            options["guidance_scale"] = 1.0
    began = time.perf_counter()
    prompt = f"a lake, number {generator.randrange(50)}"
    async with arm.gate(options["steps"]), client.stream(prompt, **options) as events:
        async for event in events:
            match event:
                case Progress(step=1):
                    arm.first_steps.append(time.perf_counter() - began)
                case Finished(timings=timings):
                    for stage in ("queue", "encode", "denoise", "decode"):
                        arm.stages.setdefault(stage, []).append(getattr(timings, stage))
    return time.perf_counter() - began


async def closed_loop(client: AsyncClient, arm: Arm, seconds: float, seed: int, clients: int = CLIENTS) -> float:
    """So many clients for so many seconds; returns when it began."""
    began = time.perf_counter()
    done = 0

    async def loop(number: int) -> None:
        nonlocal done
        generator = random.Random(seed * 1000 + number)
        while time.perf_counter() - began < seconds:
            arm.latencies.append(await one(client, arm, generator))
            done += 1

    await asyncio.gather(*(loop(number) for number in range(clients)))
    arm.images_per_second.append(done / (time.perf_counter() - began))
    return began


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


async def engine_alone(settings: ServeSettings, rows: int, seconds: float) -> tuple[float, float]:
    """Rows a second of UNet calls of so many rows, one after the other, and nothing else; and images a second of the
    decoder."""
    engine = load_catalog(settings.model_repository).default
    backend = TritonBackend(settings.triton_url)
    scale = engine.latents.downsampling
    generator = np.random.default_rng(0)
    shape = rows, engine.unet_channels, engine.native_height // scale, engine.native_width // scale
    # In pairs, as guidance asks for them.
    latents = generator.standard_normal(shape, np.float32)[np.arange(rows) // 2]
    latents[:, engine.latents.channels :] = 0
    states = generator.standard_normal(
        (rows, engine.text_encoder.context_length, engine.text_encoder.width), np.float32
    )
    try:
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            await backend.predict(engine, latents, np.full(rows, 500, np.float32), states)
            done += rows
        unet = done / (time.perf_counter() - began)
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < seconds / 4:
            await backend.decode(engine, latents[:1])
            done += 1
        return unet, done / (time.perf_counter() - began)
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
    arms = {name: Arm(name) for name in (*GATES, "diffusers")}
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
                    arm.calls.calls.clear()
                    began = await closed_loop(client, arm, seconds, number)
                    # Without the tail, in which the last clients are alone.
                    until = began + seconds
                    arm.fills.append(arm.calls.fill(began + 1, until))
                    if name == "ours":
                        rows = round(statistics.median(call.rows for call in arm.calls.calls))
                        unet, decoder = await engine_alone(settings, rows, seconds / 2)
                        rows_an_image = 2 * statistics.mean(STEPS)
                        alone = rows_an_image / (rows_an_image / unet + 1 / decoder)
                        shares.append(arm.calls.useful_rows(began + 1, until) / (until - began - 1) / alone)
        rate = OPEN_LOOP_SHARE * statistics.median(arms["ours"].images_per_second)
        for name in GATES:
            async with served(settings, arms[name]) as client:
                await open_loop(client, arms[name], rate, rounds * seconds, seed=1)
        arms["mixed"] = mixed = Arm("mixed")
        async with served(settings, mixed) as client:
            began = await closed_loop(client, mixed, seconds, 1, MIXED_CLIENTS)
            mixed.fills.append(mixed.calls.fill(began + 1, began + seconds))
    return arms, shares


def report(arms: dict[str, Arm], shares: list[float]) -> bool:
    """Prints the figures; returns whether the bounds hold."""
    ours = arms["ours"]
    print(f"{CLIENTS} clients, {min(STEPS)} to {max(STEPS)} steps; {machine()}")
    print(f"{'':15}{'images/s':>22}{'p50 s':>8}{'p95':>7}{'p99':>7}   open loop: {'p50':>6}{'p95':>7}{'p99':>7}")
    for arm in (arms[name] for name in (*GATES, "diffusers")):
        row = f"  {arm.name:13}{spread(arm.images_per_second):>22}"
        for values in (arm.latencies, arm.open_latencies):
            row += "   " + "".join(f"{quantile(values, share):7.2f}" for share in (0.5, 0.95, 0.99)) if values else ""
        print(row)
    ratios: dict[str, list[float]] = {"of the engine alone": shares}
    for name in (*list(GATES)[1:], "diffusers"):
        others = arms[name].images_per_second
        ratios[f"over {name}"] = [a / b for a, b in zip(ours.images_per_second, others, strict=True)]
    print("ratios of images (of the engine alone: of UNet rows) a second, by rounds")
    for name, values in ratios.items():
        bound = f", bound {BOUNDS[name]}" if name in BOUNDS else ""
        print(f"  ours {name:22}{spread(values)}{bound}")
    for name in GATES:
        print(f"fill of UNet calls, {name}: {spread(arms[name].fills)}")
    [fill] = arms["mixed"].fills
    print(f"fill of UNet calls, {MIXED_CLIENTS} clients, all mixed: {fill:.2f}, bound {FILL_BOUND}")
    wasted = sum(call.rows - call.useful for call in ours.calls.calls)
    print(f"rows wasted {wasted} of {sum(call.rows for call in ours.calls.calls)}")
    stages = {stage: f"{statistics.median(values) * 1000:.0f} ms" for stage, values in ours.stages.items()}
    print("medians of stages, ours: " + ", ".join(f"{stage} {value}" for stage, value in stages.items()))
    for arm in (arms[name] for name in GATES):
        print(f"asked to first step done, {arm.name}: p50 {quantile(arm.first_steps, 0.5):.2f} s, "
              f"p95 {quantile(arm.first_steps, 0.95):.2f} s")  # fmt: skip
    return fill >= FILL_BOUND and all(statistics.median(ratios[name]) >= bound for name, bound in BOUNDS.items())


def plot(arms: dict[str, Arm]) -> None:
    """Throughput, latencies, the wait for the first step, fill and the time by stage, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained")
    rate, latency, opened, first, fill, stages = panels.flat
    names = [*GATES, "diffusers"]
    rate.bar(names, [statistics.median(arms[name].images_per_second) for name in names], color="#4a6fa5")
    rate.set_title(f"images a second, {CLIENTS} clients")
    for axes, kind, title in (
        (latency, "latencies", "seconds of a request: p50, p95, p99"),
        (first, "first_steps", "seconds from asking to the first step done: p50, p95, p99"),
    ):
        for place, share in enumerate((0.5, 0.95, 0.99)):
            heights = [quantile(getattr(arms[name], kind), share) for name in GATES]
            axes.bar(
                np.arange(len(GATES)) + 0.27 * (place - 1),
                heights,
                0.25,
                color=("#9db8d9", "#4a6fa5", "#27415f")[place],
            )
        axes.set_xticks(range(len(GATES)), list(GATES))
        axes.set_title(title)
    for name in GATES:
        ordered = sorted(arms[name].open_latencies)
        opened.plot(ordered, np.linspace(0, 1, len(ordered)), label=name)
    opened.set(title="open loop: share of requests done within", xlabel="seconds", ylim=(0, 1))
    opened.legend()
    fill.bar([*GATES, "mixed"], [statistics.median(arms[name].fills) for name in (*GATES, "mixed")], color="#4a6fa5")
    fill.set(title="rows of UNet calls over the most that pay", ylim=(0, 1))
    for name in GATES:
        bottom = 0.0
        for (stage, values), colour in zip(
            arms[name].stages.items(), ("#c9c9c9", "#e0b04a", "#4a6fa5", "#7fa55a"), strict=True
        ):
            height = statistics.mean(values)
            stages.bar(name, height, bottom=bottom, color=colour, label=stage if name == "ours" else None)
            bottom += height
    stages.set_title("seconds by stage")
    stages.legend()
    for axes in (rate, latency, first, fill, stages):
        axes.tick_params("x", labelsize=8)
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

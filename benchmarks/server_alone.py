"""What the server itself costs, over models that answer at once: steps a second of one core, from 1 to 1,000 requests
in flight, memory of 1,000 streams that wait, and how busy one server keeps many GPUs, whose calls take 50 ms.

Processor time of the server's process counts, not the clock: callers share the machine. Progress streams at each step,
as far as the caller keeps up.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from sdclient import Accepted, AsyncClient
from sdserver.engines import load_catalog
from sdserver.settings import ServeSettings

from benchmarks.harness import machine
from benchmarks.instant_server import CALL_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

BOUND_STEPS = 3000
BOUND_MB = 100
IN_FLIGHT = (1, 4, 16, 64, 256, 1000)
STEPS = 50
WAITING = 1000
GPUS = (1, 4, 16)
IMAGES = 3
PLOT = Path("out/server_alone.png")


@contextmanager
def server(*options: str) -> Iterator[tuple[psutil.Process, str]]:
    """A server's process and address."""
    command = [sys.executable, "-m", "benchmarks.instant_server", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield psutil.Process(process.pid), f"127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def steps_a_second(in_flight: int, requests: int) -> float:
    """Denoising steps for each second of processor time, with so many requests always in flight."""
    with server("--max-active", str(in_flight)) as (process, address):
        # One connection carries at most 100 streams at a time.
        clients = [AsyncClient(address) for _ in range(-(-in_flight // 90))]
        places = asyncio.Semaphore(in_flight)

        async def one(number: int) -> None:
            async with places:
                await clients[number % len(clients)].generate("a lake", steps=STEPS, seed=number)

        await asyncio.gather(*(one(number) for number in range(min(in_flight, 20))))
        before = cpu_seconds(process)
        await asyncio.gather(*(one(number) for number in range(requests)))
        used = cpu_seconds(process) - before
        for client in clients:
            await client.close()
    return requests * STEPS / used


async def share_of_gpus(gpus: int) -> float:
    """The share of their time in which GPUs that one server feeds have full calls, with more than enough to do."""
    in_flight, bound = 24 * gpus, load_catalog(ServeSettings().model_repository).default.max_batch_rows
    with server("--max-active", str(in_flight), "--gpus", str(gpus)) as (_, address):
        clients = [AsyncClient(address) for _ in range(-(-in_flight // 90))]

        async def caller(number: int) -> None:
            for _ in range(IMAGES):
                await clients[number % len(clients)].generate("a lake", steps=STEPS, seed=number)

        began = time.perf_counter()
        await asyncio.gather(*(caller(number) for number in range(in_flight)))
        seconds = time.perf_counter() - began
        for client in clients:
            await client.close()
    return 2 * STEPS * IMAGES * in_flight / bound * CALL_SECONDS / gpus / seconds


async def memory_of_waiting(streams: int) -> float:
    """MB that so many streams which wait for their place add to the server."""
    with server("--hang", "--max-active", "1") as (process, address):
        clients = [AsyncClient(address) for _ in range(-(-streams // 90))]
        accepted = 0

        async def wait(number: int) -> None:
            nonlocal accepted
            async with clients[number % len(clients)].stream("a lake", seed=number) as events:
                async for event in events:
                    accepted += isinstance(event, Accepted)

        tasks = [asyncio.create_task(wait(0))]
        while accepted < 1:
            await asyncio.sleep(0.05)
        before = process.memory_info().rss
        tasks += [asyncio.create_task(wait(number)) for number in range(1, streams + 1)]
        while accepted < streams:
            await asyncio.sleep(0.05)
        after = process.memory_info().rss
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in clients:
            await client.close()
    return (after - before) / 1e6


def plot(found: dict[int, float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(list(found), [1000 / rate for rate in found.values()], "o-", color="#4a6fa5")
    axes.set(xscale="log", xlabel="requests in flight", ylabel="ms of processor time a step", ylim=(0, None))
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=110)
    print(f"plot: {PLOT}")


def main() -> int:
    """Prints and plots the figures; returns 1 if one is beyond its bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    random.seed(0)
    rates: dict[int, list[float]] = {in_flight: [] for in_flight in IN_FLIGHT}
    for _ in range(arguments.rounds):
        for in_flight, seen in rates.items():
            seen.append(asyncio.run(steps_a_second(in_flight, max(40, in_flight))))
    found = {in_flight: statistics.median(seen) for in_flight, seen in rates.items()}
    memory = asyncio.run(memory_of_waiting(WAITING))
    busy = {gpus: asyncio.run(share_of_gpus(gpus)) for gpus in GPUS}
    print(f"the server alone; {machine()}")
    for in_flight, rate in found.items():
        print(f"  {in_flight:5} in flight   {rate:6.0f} steps a second of one core")
    best = max(found.values())
    print(f"best {best:.0f} steps a second (bound {BOUND_STEPS})")
    print(f"{WAITING} waiting streams take {memory:.0f} MB (bound {BOUND_MB})")
    for gpus, share in busy.items():
        print(f"  {gpus:3} GPUs have full calls in {share:.0%} of the time")
    plot(found)
    return int(best < BOUND_STEPS or memory > BOUND_MB)


if __name__ == "__main__":
    sys.exit(main())

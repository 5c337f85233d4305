"""How the step scheduler treats those who share it, through the real SDK, server and Triton.

joining   how long a newcomer waits for its first UNet row, in step times of those in flight
leaving   how long after a caller has gone its last row goes into a call, in step times: callers cancel, run into their
          deadline, or close their connection, in turns
small     how much longer images of the smallest shape take beside larger ones than alone
stalled   what a caller that does not read its events costs the others
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdclient import Accepted, AsyncClient, DeadlineExceededError, PreviewOptions, Progress
from sdserver import logs
from sdserver.observation import CURRENT_CALL, Observer, StepObserver
from sdserver.server import Server

from benchmarks.harness import calibrated, machine, quantile, triton

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from sdserver.observation import StepModel
    from sdserver.settings import ServeSettings

IN_FLIGHT = 8
DECODED_SECONDS = 1.5
IN_TURN = 5
SMALL: dict[str, Any] = {"steps": 12}
LARGE: list[dict[str, Any]] = [
    {"steps": 12, "width": 256},
    {"steps": 12, "width": 192, "height": 192},
    {"steps": 12, "width": 256, "height": 256},
]
BOUNDS = {"joining": 1.5, "leaving": 1.0, "small": 2.0, "stalled": 1.02}


@dataclass
class Rows(Observer):
    """When rows of each request went into a UNet call, on the clock of `time.perf_counter`."""

    sent: dict[str, list[float]] = field(default_factory=dict)

    def steps(self, engine: str, model: StepModel) -> StepObserver:
        if model != "unet":
            return StepObserver()
        sent = self.sent

        class Keeps(StepObserver):
            def asked(self) -> str:
                return CURRENT_CALL.get().request_id

            @contextmanager
            def calling(self, asked: Sequence[object]) -> Iterator[None]:
                now = time.perf_counter()
                for request_id in dict.fromkeys(map(str, asked)):
                    sent.setdefault(request_id, []).append(now)
                yield

        return Keeps()


@asynccontextmanager
async def in_flight(client: AsyncClient, options: Sequence[dict[str, Any]]) -> AsyncIterator[list[float]]:
    """Callers that ask again and again; the list fills with the seconds that a step of one of them took."""
    step_seconds: list[float] = []

    async def loop(number: int, **options: Any) -> None:
        generator = random.Random(number)
        while True:
            last = None
            async with client.stream("a lake", seed=generator.randrange(2**32), **options) as events:
                async for event in events:
                    if isinstance(event, Progress) and event.step > 0:
                        now = time.perf_counter()
                        if last is not None:
                            step_seconds.append(now - last)
                        last = now

    tasks = [asyncio.create_task(loop(number, **each)) for number, each in enumerate(options)]
    try:
        await asyncio.sleep(1)
        yield step_seconds
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def gone_at(
    client: AsyncClient, address: str, name: str, how: str, steps: int, step: float
) -> tuple[float, float]:
    """When a newcomer was accepted, and when it had gone after about so many steps, on `time.perf_counter`."""
    accepted = gone = 0.0
    timeout = (steps + 1) * step if how == "deadline" else None
    async with AsyncClient(address) as own:
        caller = own if how == "disconnect" else client
        stream = caller.stream("a lake", steps=20, request_id=name, timeout=timeout)
        with suppress(DeadlineExceededError):
            async with stream as events:
                async for event in events:
                    if isinstance(event, Accepted):
                        accepted = time.perf_counter()
                    if how != "deadline" and isinstance(event, Progress) and event.step >= steps:
                        break
                if how == "disconnect":
                    await own.close()
        gone = time.perf_counter()
    return accepted, gone


async def joining_and_leaving(
    client: AsyncClient, address: str, rows: Rows, times: int
) -> tuple[list[float], list[float]]:
    """Step times until a newcomer's first row, and from a caller's leaving to its last row; one after the other."""
    generator = random.Random(1)
    joined: list[float] = []
    left: list[float] = []
    neighbours = [{"steps": generator.choice([8, 12, 16])} for _ in range(IN_FLIGHT - 1)]
    async with in_flight(client, neighbours) as step_seconds:
        for number in range(times):
            await asyncio.sleep(generator.random() * 0.5)
            name = f"newcomer-{number}"
            steps, how = generator.randrange(2, 5), ("cancel", "deadline", "disconnect")[number % 3]
            accepted, gone = await gone_at(client, address, name, how, steps, statistics.median(step_seconds))
            if not accepted or name not in rows.sent:
                continue
            # Long enough for what it left behind to be seen.
            await asyncio.sleep(3 * statistics.median(step_seconds))
            step = statistics.median(step_seconds[-100:])
            joined.append((rows.sent[name][0] - accepted) / step)
            left.append(max(0.0, rows.sent[name][-1] - gone) / step)
    return joined, left


async def seconds_of(client: AsyncClient, options: dict[str, Any], times: int) -> list[float]:
    taken = []
    for number in range(times):
        began = time.perf_counter()
        await client.generate("a lake", seed=number, **options)
        taken.append(time.perf_counter() - began)
    return taken


async def small_among_large(client: AsyncClient, times: int) -> float:
    """The 99th percentile of a small image's time beside larger ones, over its median alone."""
    alone = await seconds_of(client, SMALL, max(5, times // 4))
    async with in_flight(client, LARGE):
        beside = await seconds_of(client, SMALL, times)
    return quantile(beside, 0.99) / statistics.median(alone)


async def stalled_reader(client: AsyncClient, address: str, times: int) -> float:
    """Time of images of others beside a caller that has stopped reading, over that without one, in turns.

    Both wait equally long before: cores that have slept take a moment longer.
    """
    ratios = []
    for _ in range(times):
        await asyncio.sleep(DECODED_SECONDS)
        without = statistics.median(await seconds_of(client, SMALL, IN_TURN))
        async with AsyncClient(address) as lazy:
            stream = lazy.stream("a lake", steps=1, image_count=4, preview=PreviewOptions(every_steps=1))
            async with stream as events:
                async for event in events:
                    if isinstance(event, Progress) and event.step == 1:
                        break
                # Its images are ready by then, and it does not take them.
                await asyncio.sleep(DECODED_SECONDS)
                beside = statistics.median(await seconds_of(client, SMALL, IN_TURN))
        ratios.append(beside / without)
    return statistics.median(ratios)


async def measure(rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in BOUNDS}
    async with triton() as plain, calibrated(plain) as settings:
        for _ in range(rounds):
            rows = Rows()
            async with served(settings, rows) as (client, address):
                joined, left = await joining_and_leaving(client, address, rows, 36)
                found["joining"].append(quantile(joined, 0.95))
                found["leaving"].append(quantile(left, 0.99))
                found["small"].append(await small_among_large(client, 100))
                found["stalled"].append(await stalled_reader(client, address, 8))
    return found


@asynccontextmanager
async def served(settings: ServeSettings, rows: Rows) -> AsyncIterator[tuple[AsyncClient, str]]:
    """A client of a server, and the server's address."""
    async with Server(settings.model_copy(update={"max_active": 16}), observers=[rows]) as server:
        address = f"127.0.0.1:{server.port}"
        async with AsyncClient(address) as client:
            await client.generate("a lake", steps=2)
            yield client, address


def main() -> int:
    """Prints the figures; returns 1 if one is above its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logs.configure("warning", "console")
    found = asyncio.run(measure(arguments.rounds))
    said = {
        "joining": f"accepted to first row, p95, {IN_FLIGHT} in flight, in step times",
        "leaving": "caller gone to its last row, p99, in step times",
        "small": "smallest shape beside larger ones, p99, over its median alone",
        "stalled": "time of others beside a stalled reader, over that without",
    }
    print(f"step scheduler; {machine()}")
    for name, values in found.items():
        print(f"  {said[name]:65} {statistics.median(values):.2f} (rounds {', '.join(f'{v:.2f}' for v in values)}; "
              f"bound {BOUNDS[name]})")  # fmt: skip
    return int(any(statistics.median(values) > BOUNDS[name] for name, values in found.items()))


if __name__ == "__main__":
    sys.exit(main())

"""Block caching through the SDK, the server and a real Triton: time and likeness of an image, by its interval.

Intervals take turns, so that a busy machine slows all of them. Likeness is the peak signal-to-noise ratio to the image
of the same request without caching.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as Pillow
from sdclient import AsyncClient, BlockCache, Finished, Image
from sdserver import logs
from sdserver.server import Server

from benchmarks.harness import machine, quantile, spread, triton

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sdclient import GenerateOptions

PROMPTS = ("a lake at dusk", "mountains, snow", "a forest in fog", "a house by the sea, sunset")
INTERVALS = (1, 2, 3, 5)
WARM_UP = 2


@dataclass
class Arm:
    """What was measured with one interval."""

    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    decibels: list[float] = field(default_factory=list)
    cached: float = 0.0


def psnr(picture: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    """Decibels between pictures of 8 bits; infinite where they are equal."""
    error = float(np.square(picture - reference).mean())
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


async def measure(rounds: int, steps: int, size: int | None) -> dict[int, Arm]:
    """The arms, by their interval; each round is another prompt or seed."""
    arms = {interval: Arm() for interval in INTERVALS}
    async with triton() as settings, Server(settings) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        for number in range(-WARM_UP, rounds):
            pictures, seconds = {}, {}
            for interval, arm in arms.items():
                options: GenerateOptions = {"steps": steps, "seed": number + WARM_UP, "width": size, "height": size}
                options["block_cache"] = BlockCache(interval)
                start = time.perf_counter()
                async with client.stream(PROMPTS[number % len(PROMPTS)], **options) as events:
                    async for event in events:
                        match event:
                            case Image():
                                pictures[interval] = np.asarray(Pillow.open(io.BytesIO(event.data)), np.float64)
                            case Finished(usage):
                                arm.cached = usage.cached_rows / usage.unet_rows
                seconds[interval] = time.perf_counter() - start
            if number < 0:
                continue
            for interval, arm in arms.items():
                arm.seconds.append(seconds[interval])
                arm.ratios.append(seconds[interval] / seconds[1])
                arm.decibels.append(psnr(pictures[interval], pictures[1]))
    return arms


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--size", type=int, help="pixels; default: the engine's")
    arguments = parser.parse_args()
    logs.configure("warning", "console")
    arms = asyncio.run(measure(arguments.rounds, arguments.steps, arguments.size))
    print(f"block caching, {arguments.steps} steps, {arguments.rounds} images an interval, {machine()}")
    print("| interval | rows cached | seconds | over interval 1 (quartiles) | PSNR, dB (range) |")
    print("| --- | --- | --- | --- | --- |")
    for interval, arm in arms.items():
        decibels = "" if interval == 1 else spread(arm.decibels, digits=1)
        low, high = quantile(arm.ratios, 0.25), quantile(arm.ratios, 0.75)
        ratio = f"{statistics.median(arm.ratios):.2f} ({low:.2f} to {high:.2f})"
        print(f"| {interval} | {arm.cached:.0%} | {statistics.median(arm.seconds):.2f} | {ratio} | {decibels} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

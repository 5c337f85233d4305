"""A step with CLIP guidance against one without, through SDK, server and a real Triton: one caller and four images.

Guided as the default preset has it, with a gradient for each step, and exactly. They take turns with unguided requests,
so that a busy machine slows all. The bound of a step with the default preset is 2 unguided ones.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
from typing import TYPE_CHECKING

from sdclient import AsyncClient, ClipGuidance, Finished
from sdserver import logs
from sdserver.engines import load_catalog
from sdserver.server import Server
from sdserver.settings import ServeSettings
from sdserver.triton_process import TritonProcess

if TYPE_CHECKING:
    from sdclient import GenerateOptions

PROMPT = "a lake at dusk"
IMAGES = 4
BOUND = 2.0

VARIANTS: dict[str, ClipGuidance | None] = {
    "unguided": None,
    "default preset": ClipGuidance(),
    "a gradient for each step": ClipGuidance(steps_per_gradient=1),
    "default preset, exact": ClipGuidance(exact=True),
}


async def step_seconds(client: AsyncClient, guidance: ClipGuidance | None, steps: int) -> float:
    """Seconds that a denoising step of all images takes."""
    options: GenerateOptions = {"steps": steps, "seed": 7, "image_count": IMAGES, "clip_guidance": guidance}
    async with client.stream(PROMPT, **options) as events:
        async for event in events:
            if isinstance(event, Finished):
                return event.timings.denoise / steps
    raise AssertionError("the stream ended without Finished")


async def measure(rounds: int, steps: int) -> dict[str, list[float]]:
    """[rounds] seconds a step of each variant, taken in turns after a round that warms up."""
    settings = ServeSettings(port=0)
    engine = load_catalog(settings.model_repository).default
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    async with TritonProcess(
        settings.model_repository, engine.models, grpc_port=0, http_port=0, metrics_port=0
    ) as triton:
        with_triton = settings.model_copy(update={"triton_url": f"127.0.0.1:{triton.grpc_port}"})
        async with Server(with_triton) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
            for number in range(rounds + 1):
                for name, guidance in VARIANTS.items():
                    seconds = await step_seconds(client, guidance, steps)
                    if number > 0:
                        times[name].append(seconds)
    return times


def main() -> int:
    """Prints the ratios; returns 1 if a guided step is above the bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=25)
    arguments = parser.parse_args()
    logs.configure("warning", "console")
    times = asyncio.run(measure(arguments.rounds, arguments.steps))
    print(f"{IMAGES} images, {arguments.steps} steps, {os.cpu_count()} cores, medians of {arguments.rounds} rounds")
    medians: dict[str, float] = {}
    for name, seconds in times.items():
        ratios = sorted(ours / plain for ours, plain in zip(seconds, times["unguided"], strict=True))
        medians[name] = statistics.median(ratios)
        low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
        print(
            f"  {name:28}{statistics.median(seconds) * 1000:6.0f} ms a step, ratio {medians[name]:.2f} "
            f"(quartiles {low:.2f} to {high:.2f})"
        )
    print(f"  bound of a guided step: {BOUND}")
    return int(medians["default preset"] > BOUND)


if __name__ == "__main__":
    sys.exit(main())

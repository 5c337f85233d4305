"""What a denoising step costs beyond the UNet's own work: the real server and the real Triton over a UNet that answers
at once with what it was given.

One image with guidance, so each call has two rows of the engine's native size. Generations of many and of few steps
take turns; a step costs the difference of their times over that of their steps. The bound is 0.7 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

from sdclient import AsyncClient
from sdserver import logs
from sdserver.engines import load_catalog
from sdserver.server import Server
from sdserver.settings import ServeSettings
from sdserver.triton_process import TritonProcess

BOUND_MS = 0.7
FEW, MANY = 10, 110

UNET = '''"""Answers with the latents that it is given."""

from sdmodels.python_backend import UNetModel


class TritonPythonModel(UNetModel):
    def start(self, engine_folder, threads):
        return lambda latents, timestep, text_states: (latents,)
'''


def instant_repository(shipped: Path, folder: Path) -> Path:
    """A model repository as the shipped one, but for the UNet."""
    for entry in shipped.iterdir():
        if entry.is_dir() and not entry.name.endswith(".unet"):
            (folder / entry.name).symlink_to(entry)
        elif entry.is_dir():
            (folder / entry.name / "1").mkdir(parents=True)
            (folder / entry.name / "1/model.py").write_text(UNET)
            (folder / entry.name / "config.pbtxt").symlink_to(entry / "config.pbtxt")
    return folder


async def measure(rounds: int) -> list[float]:
    """[rounds] milliseconds of a step."""
    with tempfile.TemporaryDirectory() as folder:
        repository = instant_repository(ServeSettings().model_repository, Path(folder))
        settings = ServeSettings(port=0, model_repository=repository)
        models = load_catalog(repository).default.models
        async with TritonProcess(repository, models, grpc_port=0, http_port=0, metrics_port=0) as triton:
            settings = settings.model_copy(update={"triton_url": f"127.0.0.1:{triton.grpc_port}"})
            async with Server(settings) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
                costs = []
                for _ in range(rounds + 1):
                    few, many = [await seconds(client, steps) for steps in (FEW, MANY)]
                    costs.append((many - few) / (MANY - FEW) * 1000)
                return costs[1:]


async def seconds(client: AsyncClient, steps: int) -> float:
    """Seconds of denoising, as the server tells them."""
    start = time.perf_counter()
    await client.generate("a lake", steps=steps, seed=7)
    return time.perf_counter() - start


def main() -> int:
    """Prints the figure; returns 1 if it is above the bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    logs.configure("warning", "console")
    costs = sorted(asyncio.run(measure(arguments.rounds)))
    low, median, high = costs[len(costs) // 4], statistics.median(costs), costs[3 * len(costs) // 4]
    print(f"a step of two rows beyond the UNet  {median:.2f} ms (quartiles {low:.2f} to {high:.2f}; bound {BOUND_MS})")
    return int(median > BOUND_MS)


if __name__ == "__main__":
    sys.exit(main())

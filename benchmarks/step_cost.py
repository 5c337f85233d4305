"""What a denoising step costs beyond the UNet's own work: the real server and the real Triton over a UNet that answers
at once with what it was given, and over one that does so after 10 ms in which it keeps its core busy.

One image with guidance, so each call has two rows of the engine's native size. The server has a process of its own, as
it has in use. Generations of many and of few steps take turns; a step costs the difference of their times over that of
their steps, less the UNet's own time. The bound is 0.7 ms, for the first; the second pays also for cores that have
fallen asleep meanwhile, which virtual machines wake late.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import statistics
import subprocess
import sys
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sdclient import AsyncClient, Finished, UnavailableError
from sdserver import logs
from sdserver.engines import load_catalog
from sdserver.settings import ServeSettings
from sdserver.triton_process import TritonProcess

from benchmarks.harness import machine, spread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

BOUND_MS = 0.7
FEW, MANY = 10, 110
UNET_MS = (0.0, 10.0)

UNET = '''"""Answers with the latents that it is given, after a time."""

import time

from sdmodels.python_backend import UNetModel


class TritonPythonModel(UNetModel):
    def start(self, engine_folder, device, threads):
        def run(latents, timestep, text_states):
            until = time.perf_counter() + {milliseconds} / 1000
            while time.perf_counter() < until:
                pass
            return (latents,)

        return run
'''


def timed_repository(shipped: Path, folder: Path, milliseconds: float) -> Path:
    """A model repository as the shipped one, but for the UNet, which takes so long."""
    for entry in shipped.iterdir():
        if entry.is_dir() and not entry.name.endswith(".unet"):
            (folder / entry.name).symlink_to(entry)
        elif entry.is_dir():
            (folder / entry.name / "1").mkdir(parents=True)
            (folder / entry.name / "1/model.py").write_text(UNET.format(milliseconds=milliseconds))
            (folder / entry.name / "config.pbtxt").symlink_to(entry / "config.pbtxt")
    return folder


@asynccontextmanager
async def served(repository: Path, triton_url: str) -> AsyncIterator[AsyncClient]:
    """A client of a server with a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [f"--port={port}", f"--triton-url={triton_url}", f"--model-repository={repository}"]
    command = [sys.executable, "-m", "sdserver", "serve", "--log-level=error", *options]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
    try:
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            while True:
                try:
                    await client.generate("a lake", steps=2)
                    break
                except UnavailableError:
                    await asyncio.sleep(0.2)
            yield client
    finally:
        process.terminate()
        await process.wait()


async def measure(rounds: int, milliseconds: float) -> list[float]:
    """[rounds] milliseconds of a step beyond those of a UNet that takes so long."""
    with tempfile.TemporaryDirectory() as folder:
        repository = timed_repository(ServeSettings().model_repository, Path(folder), milliseconds)
        models = load_catalog(repository).default.models
        async with (
            TritonProcess(repository, models, grpc_port=0, http_port=0, metrics_port=0) as triton,
            served(repository, f"127.0.0.1:{triton.grpc_port}") as client,
        ):
            costs = []
            for _ in range(rounds + 1):
                few, many = [await denoising_seconds(client, steps) for steps in (FEW, MANY)]
                costs.append((many - few) / (MANY - FEW) * 1000 - milliseconds)
            return costs[1:]


async def denoising_seconds(client: AsyncClient, steps: int) -> float:
    """Seconds of denoising, as the server tells them."""
    async with client.stream("a lake", steps=steps, seed=7) as events:
        async for event in events:
            if isinstance(event, Finished):
                return event.timings.denoise
    raise AssertionError("the stream ended without Finished")


def main() -> int:
    """Prints the figures; returns 1 if that over a UNet that answers at once is above the bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    logs.configure("warning", "console")
    found = {milliseconds: asyncio.run(measure(arguments.rounds, milliseconds)) for milliseconds in UNET_MS}
    print(f"a step of two rows beyond the UNet; {machine()}")
    for milliseconds, costs in found.items():
        bound = "" if milliseconds else f", bound {BOUND_MS}"
        print(f"  over one of {milliseconds:4.1f} ms  {spread(costs, ' ms')}{bound}")
    return int(statistics.median(found[UNET_MS[0]]) > BOUND_MS)


if __name__ == "__main__":
    sys.exit(main())

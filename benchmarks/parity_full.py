"""The picture of the service against that of diffusers' own pipeline, of Stable Diffusion 2.1 at its full size.

Random weights of a fixed seed (`benchmarks.full_checkpoint`), stored in fp16, which both read. The service is SDK,
server and a real Triton, its UNet by OpenVINO in fp32 and in bf16; diffusers computes in fp32. One side at a time is in
memory: 8 GB, and 11 GB of disk. `make parity-full` takes some minutes on idle cores.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers_pictures import Case, clip_tokenizer, psnr
from sdclient import AsyncClient
from sdserver.engine_store import EngineStore
from sdserver.server import Server
from sdserver.settings import ServeSettings
from sdserver.triton_process import TritonProcess
from transformers import CLIPTextModel

from benchmarks import full_checkpoint
from benchmarks.harness import machine

if TYPE_CHECKING:
    from diffusers_pictures import Picture

ENGINE = "stable-diffusion-full"
# The greatest difference of a pixel in fp32, of 255; and decibels in bf16.
MOST_IN_FP32 = 2
LEAST_IN_BF16 = 40


@dataclass
class Modules:
    """diffusers' modules of a checkpoint, in fp32."""

    unet: Any
    vae: Any
    transformers_text_encoder: Any

    @classmethod
    def of(cls, folder: Path) -> Modules:
        """Read from a folder of diffusers."""
        classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
        return cls(
            *(
                kind.from_pretrained(folder / name, torch_dtype=torch.float32).eval().requires_grad_(False)
                for name, kind in classes.items()
            )
        )


def add(checkpoint: Path, repository: Path, precision: str) -> None:
    """`sdserver engine add`; of an engine that is there it changes the precision alone."""
    command = [sys.executable, "-m", "sdserver", "engine", "add", str(checkpoint), "--name", ENGINE]
    subprocess.run([*command, "--model-repository", str(repository), "--precision", precision], check=True)


async def by_the_service(repository: Path, cases: list[Case]) -> dict[Case, Picture]:
    """Pictures of an engine by a real Triton and a server of their own."""
    engine = EngineStore(repository).find(ENGINE)
    assert engine is not None
    triton = TritonProcess(
        *(repository, engine.models), grpc_port=0, http_port=0, metrics_port=0, start_seconds=1800, on_progress=print
    )
    async with triton:
        settings = ServeSettings(
            port=0, model_repository=repository, triton_url=f"127.0.0.1:{triton.grpc_port}", max_generation_seconds=3600
        )
        async with Server(settings) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
            while not (await client.engines())[0].ready:
                await asyncio.sleep(0.5)
            return {case: await case.by_the_service(client) for case in cases}


def main() -> int:
    """Prints the differences; returns 1 if one is above its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a folder of diffusers of SD 2.x, instead of random weights")
    parser.add_argument("--repository", type=Path, help="where its engine is, or will be; default: a temporary folder")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--guidance", type=float, default=7.5)
    options = parser.parse_args()
    cases = [
        Case(ENGINE, "ddim", width=512, height=512, steps=options.steps, scale=options.guidance),
        Case(ENGINE, "euler", width=640, height=384, steps=options.steps, scale=options.guidance),
    ]
    with tempfile.TemporaryDirectory() as elsewhere:
        checkpoint = options.checkpoint or Path(elsewhere) / "checkpoint"
        repository = options.repository or Path(elsewhere) / "repository"
        if options.checkpoint is None:
            full_checkpoint.write(checkpoint)
        ours: dict[str, dict[Case, Picture]] = {}
        for precision in ("fp32", "bf16"):
            add(checkpoint, repository, precision)
            ours[precision] = asyncio.run(by_the_service(repository, cases))
            gc.collect()
        modules = Modules.of(checkpoint)
        tokenizer = clip_tokenizer(Path(elsewhere) / "tokenizer", "2")
        scheduler = full_checkpoint.SCHEDULER
        theirs = {case: case.by_diffusers(modules, tokenizer, scheduler) for case in cases}
    print(f"SD 2.1 at full size, random weights, {options.steps} steps with guidance {options.guidance:g}; {machine()}")
    held = True
    for case, expected in theirs.items():
        most = float(np.abs(ours["fp32"][case] - expected).max())
        decibels = {precision: psnr(pictures[case], expected) for precision, pictures in ours.items()}
        held &= most <= MOST_IN_FP32 and decibels["bf16"] >= LEAST_IN_BF16
        print(
            f"  {case.width} x {case.height}, {case.sampler:5}: fp32 differs by at most {most:.2f} of 255 "
            f"({decibels['fp32']:.1f} dB); bf16 {decibels['bf16']:.1f} dB; contrast {expected.std():.0f}"
        )
    return int(not held)


if __name__ == "__main__":
    sys.exit(main())

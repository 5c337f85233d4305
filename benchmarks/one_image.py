"""One image through SDK, server and a real Triton, against the same work by a diffusers pipeline in one process.

Same weights, prompt, size, steps, sampler and guidance; the two take turns, so that a busy machine slows both. The
bound of the ratio is 0.75.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from typing import TYPE_CHECKING

from sdclient import AsyncClient
from sdserver import logs
from sdserver.engines import load_catalog
from sdserver.server import Server
from sdserver.settings import ServeSettings
from sdserver.triton_process import TritonProcess

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sdserver.engines import Engine

PROMPT = "a valley in the Alps at sunset, epic vista"
BOUND = 0.75


def diffusers_pipeline(engine: Engine, folder: Path, steps: int) -> Callable[[], None]:
    """A function that makes one image with diffusers alone, as its documentation has it: fp32, its own defaults."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from sdmodels.text_encoder import TextEncoder

    schedule = engine.noise_schedule
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae", low_cpu_mem_usage=False),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False),
        text_encoder=None,
        tokenizer=None,
        scheduler=DDIMScheduler(
            num_train_timesteps=schedule.train_timesteps,
            beta_start=schedule.beta_start,
            beta_end=schedule.beta_end,
            beta_schedule=schedule.beta_schedule,
            prediction_type=engine.prediction_type,
            timestep_spacing=schedule.timestep_spacing,
            clip_sample=False,
            set_alpha_to_one=True,
            steps_offset=schedule.steps_offset,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    encoder = TextEncoder(folder)

    def generate() -> None:
        empty, prompt = (torch.from_numpy(encoder(text)[0])[None] for text in ("", PROMPT))
        pipeline(
            prompt_embeds=prompt,
            negative_prompt_embeds=empty,
            width=engine.native_width,
            height=engine.native_height,
            num_inference_steps=steps,
            guidance_scale=engine.defaults.guidance_scale,
            generator=torch.Generator().manual_seed(7),
        )

    return generate


async def measure(rounds: int, steps: int) -> list[tuple[float, float]]:
    """[rounds] seconds of ours and of diffusers, taken in turns after two rounds that warm up."""
    settings = ServeSettings(port=0)
    engine = load_catalog(settings.model_repository).default
    folder = settings.model_repository / "engines" / engine.id
    times = []
    async with TritonProcess(
        settings.model_repository, engine.models, grpc_port=0, http_port=0, metrics_port=0
    ) as triton:
        ours_settings = settings.model_copy(update={"triton_url": f"127.0.0.1:{triton.grpc_port}"})
        async with Server(ours_settings) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
            diffusers = diffusers_pipeline(engine, folder, steps)
            for number in range(rounds + 2):
                start = time.perf_counter()
                await client.generate(PROMPT, steps=steps, seed=7)
                middle = time.perf_counter()
                await asyncio.to_thread(diffusers)
                end = time.perf_counter()
                if number >= 2:
                    times.append((middle - start, end - middle))
    return times


def main() -> int:
    """Prints the ratio; returns 1 if it is above the bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=25)
    arguments = parser.parse_args()
    logs.configure("warning", "console")
    times = asyncio.run(measure(arguments.rounds, arguments.steps))
    ratios = sorted(ours / theirs for ours, theirs in times)
    low, median, high = ratios[len(ratios) // 4], statistics.median(ratios), ratios[3 * len(ratios) // 4]
    print(f"one image, {arguments.steps} steps, {os.cpu_count()} cores, median of {len(times)} rounds")
    print(f"  SDK + server + Triton   {statistics.median(ours for ours, _ in times):.3f} s")
    print(f"  diffusers, one process  {statistics.median(theirs for _, theirs in times):.3f} s")
    print(f"  ratio                   {median:.2f} (quartiles {low:.2f} to {high:.2f}; bound {BOUND})")
    return int(median > BOUND)


if __name__ == "__main__":
    sys.exit(main())

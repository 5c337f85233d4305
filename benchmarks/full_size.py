"""A denoising step of Stable Diffusion 2.1's own UNet, 512x512 with guidance: ours against diffusers, on this CPU.

Random weights of the real configuration, because time does not depend on them. Each calls its model as it is called in
use: ours the runtime that Triton's model would choose, with the machine's threads; diffusers its UNet2DConditionModel
in float32 and, on request, in bfloat16. They take turns. Takes about 12 GB of memory, 6 GB of disk and some minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from sdmodels.cores import physical_cores
from sdmodels.runtimes import default_device, default_runtime, load_unet

from benchmarks.harness import machine, spread

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdmodels.runtimes import Floats

ROWS, PLACES = 2, 64
BOUNDS = {"float32": 0.40, "bfloat16": 0.70}
# unet/config.json of stabilityai/stable-diffusion-2-1, as far as it differs from diffusers' defaults.
CONFIG = {
    "sample_size": 96,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
}


def random_unet(folder: Path) -> None:
    """An engine's folder with nothing but the UNet, in half precision as checkpoints are."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(CONFIG).half()
    unet.save_pretrained(folder / "unet", max_shard_size="20GB")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    (folder / "engine.json").write_text(json.dumps({"weights": {"unet/diffusion_pytorch_model.safetensors": digest}}))


def diffusers_unet(folder: Path, dtype: torch.dtype) -> Callable[[Floats, Floats, Floats], Floats]:
    """diffusers' own UNet in a precision."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype).eval()

    @torch.inference_mode()
    def predict(latents: Floats, timesteps: Floats, text_states: Floats) -> Floats:
        arguments = (torch.from_numpy(array) for array in (latents, timesteps, text_states))
        x, t, c = (argument.to(dtype) for argument in arguments)
        prediction: Floats = unet(x, t, c, return_dict=False)[0].float().numpy()
        return prediction

    return predict


def measure(folder: Path, rounds: int, dtypes: list[torch.dtype]) -> dict[str, list[float]]:
    """Seconds a step of each, by name, in turns; the first turn warms up."""
    generator = np.random.default_rng(0)
    # Guidance asks for one picture under two texts.
    latents = np.repeat(generator.standard_normal((1, 4, PLACES, PLACES), np.float32), ROWS, axis=0)
    states = generator.standard_normal((ROWS, 77, 1024), np.float32)
    timesteps = np.full(ROWS, 500, np.float32)
    began = time.perf_counter()
    models = {"ours": load_unet(folder, physical_cores())}
    print(f"ours ({default_runtime(default_device())}): ready after {time.perf_counter() - began:.0f} s")
    models |= {str(dtype).removeprefix("torch."): diffusers_unet(folder, dtype) for dtype in dtypes}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            began = time.perf_counter()
            prediction = model(latents, timesteps, states)
            if number > 0:
                seconds[name].append(time.perf_counter() - began)
                print(f"  round {number} {name:9} {seconds[name][-1]:.1f} s", flush=True)
            assert np.isfinite(prediction).all()
    return seconds


def main() -> int:
    """Prints the ratios; returns 1 if one is above its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bfloat16", action="store_true", help="diffusers in bfloat16, too: slow on CPUs without it")
    arguments = parser.parse_args()
    dtypes = [torch.float32, *([torch.bfloat16] if arguments.bfloat16 else [])]
    with tempfile.TemporaryDirectory() as folder:
        random_unet(Path(folder))
        seconds = measure(Path(folder), arguments.rounds, dtypes)
    ours = seconds.pop("ours")
    print(f"a step of SD 2.1 at 512x512 with guidance; {machine()}")
    print(f"  ours                 {spread(ours, ' s')}")
    held = True
    for name, theirs in seconds.items():
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        held &= statistics.median(ratios) <= BOUNDS[name]
        print(f"  diffusers {name:9}  {spread(theirs, ' s')}: ratio {spread(ratios)}, bound {BOUNDS[name]}")
    return int(not held)


if __name__ == "__main__":
    sys.exit(main())

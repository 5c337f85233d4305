"""Caches the latents of the world: mean and standard deviation of the encoder's posterior, sampled fresh in training.

The encoder is fixed once the joint stage of the autoencoder is over. The cache grows: a later run with more scenes
encodes only what is missing, and the UNet takes what there is when it starts.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from training import dataset, vae
from training.common import pid_file, train_dir, write_atomically
from training.world import FORMATS

if TYPE_CHECKING:
    from pathlib import Path

SQUARE_SCENES, OTHER_SCENES = 24_000, 2_700


@dataclass(frozen=True)
class Latents:
    """One format's cache: `moments` [N, 8, height / 8, width / 8] float16, mean then standard deviation, unscaled."""

    scenes: dataset.Scenes
    moments: np.ndarray[Any, np.dtype[np.float16]]

    def __len__(self) -> int:
        return len(self.moments)

    def sample(self, rows: np.ndarray[Any, Any], scaling_factor: float, noise: torch.Generator) -> torch.Tensor:
        """[len(rows), 4, h, w] latents drawn from the posterior, times the scaling factor."""
        mean, std = torch.from_numpy(self.moments[rows].astype(np.float32)).chunk(2, dim=1)
        return (mean + std * torch.randn(mean.shape, generator=noise)) * scaling_factor


def _paths(size: tuple[int, int]) -> tuple[Path, Path]:
    folder = train_dir() / "latents"
    folder.mkdir(exist_ok=True)
    stem = f"{size[0]}x{size[1]}"
    return folder / f"{stem}.npy", folder / f"{stem}.json"


def _done(path: Path) -> int:
    return int(json.loads(path.read_text())["done"]) if path.exists() else 0


@torch.no_grad()
def encode(size: tuple[int, int], count: int) -> None:
    """Make the cache of one format hold its first `count` training scenes; saves its place after each batch of 200."""
    scenes = dataset.load(size)
    moments_path, done_path = _paths(size)
    done, count = _done(done_path), min(count, scenes.trained)
    if done >= count:
        return
    shape = (scenes.trained, 8, size[1] // 8, size[0] // 8)
    if done == 0:
        np.lib.format.open_memmap(moments_path, "w+", np.float16, shape).flush()  # type: ignore[no-untyped-call]
    moments = np.load(moments_path, mmap_mode="r+")
    model = vae.load_trained()
    for first in tqdm(range(done, count, 200), desc=f"latents {size[0]}x{size[1]}", unit="x200"):
        last = min(first + 200, count)
        for row in range(first, last, 8):
            rows = slice(row, min(row + 8, last))
            pixels = vae.to_tensor(scenes.images[rows]).contiguous(memory_format=torch.channels_last)
            posterior = model.encode(pixels).latent_dist
            moments[rows] = torch.cat([posterior.mean, posterior.std], 1).numpy()
        moments.flush()
        write_atomically(json.dumps({"done": last}), done_path)


def load(size: tuple[int, int]) -> Latents:
    """What is cached of one format.

    Raises FileNotFoundError when nothing is; run `python -m training.latents` first.
    """
    moments_path, done_path = _paths(size)
    if _done(done_path) == 0:
        raise FileNotFoundError(f"{moments_path} is missing: run `python -m training.latents` first")
    return Latents(dataset.load(size), np.load(moments_path, mmap_mode="r")[: _done(done_path)])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.latents", description=__doc__)
    parser.add_argument("--square", type=int, default=SQUARE_SCENES, help="scenes of the native format")
    parser.add_argument("--other", type=int, default=OTHER_SCENES, help="scenes of each other format")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with pid_file("latents"):
        for quarter in range(1, 5):  # every format grows at the same pace, for a UNet that trains meanwhile
            for size in FORMATS:
                count = options.square if size == FORMATS[0] else options.other
                encode(size, -(-count * quarter // 4))


if __name__ == "__main__":
    main()

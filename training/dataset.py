"""The world cache: scenes painted once, by all cores, into memory-mapped uint8 files.

Scenes lie in pairs: row 2k is a random scene, row 2k+1 the same layout with one attribute changed. Run
`python -m training.dataset` to make the cache; a finished file is not made again.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from training.common import train_dir
from training.painter import paint
from training.world import FORMATS, Scene, random_scene, random_variant

if TYPE_CHECKING:
    from pathlib import Path

PAIRS = {size: 20_000 if size == FORMATS[0] else 1_500 for size in FORMATS}
"""Pairs of scenes cached for each (width, height)."""

HELD_OUT = 400
"""The last scenes of each file are never trained on."""

_CHUNK = 250  # pairs a worker paints at a time


@dataclass(frozen=True)
class Scenes:
    """One format's cache: images [N, height, width, 3] uint8, codes [N, attributes] uint8, layouts [N] int64."""

    size: tuple[int, int]
    images: np.ndarray[Any, np.dtype[np.uint8]]
    codes: np.ndarray[Any, np.dtype[np.uint8]]
    layouts: np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.layouts)

    @property
    def trained(self) -> int:
        """How many rows, from the first, are for training; the rest is held out."""
        return len(self) - min(HELD_OUT, len(self) // 10 * 2)

    def scene(self, row: int) -> Scene:
        return Scene.from_codes(int(self.layouts[row]), *self.size, self.codes[row])


def layout_seed(size: tuple[int, int], pair: int) -> int:
    """The seed of a pair's layout: no two formats share one."""
    return FORMATS.index(size) * 10_000_000 + pair


def pair_of(size: tuple[int, int], pair: int) -> tuple[Scene, Scene]:
    """The two scenes of a pair: a random one, and its variant in one attribute."""
    seed = layout_seed(size, pair)
    scene = random_scene(seed, size)
    return scene, random_variant(scene, seed)


def _files(size: tuple[int, int]) -> tuple[Path, Path, Path]:
    stem = f"{size[0]}x{size[1]}"
    folder = train_dir() / "world"
    folder.mkdir(exist_ok=True)
    return folder / f"{stem}.images.npy", folder / f"{stem}.codes.npy", folder / f"{stem}.layouts.npy"


def _paint_chunk(size: tuple[int, int], first: int, last: int, path: str) -> tuple[int, Any, Any]:
    images = np.load(path, mmap_mode="r+")
    codes, layouts = [], []
    for pair in range(first, last):
        for side, scene in enumerate(pair_of(size, pair)):
            images[2 * pair + side] = paint(scene)
            codes.append(scene.codes())
            layouts.append(scene.layout)
    images.flush()
    return first, np.stack(codes), np.array(layouts, np.int64)


def make(size: tuple[int, int], pairs: int) -> None:
    """Paint the cache of one format unless it is there; the layouts file, written last, says that it is."""
    images_path, codes_path, layouts_path = _files(size)
    if layouts_path.exists() and len(np.load(layouts_path)) == 2 * pairs:
        return
    width, height = size
    np.lib.format.open_memmap(images_path, "w+", np.uint8, (2 * pairs, height, width, 3)).flush()  # type: ignore[no-untyped-call]
    parts = {}
    with ProcessPoolExecutor() as pool:
        jobs = [
            pool.submit(_paint_chunk, size, first, min(first + _CHUNK, pairs), str(images_path))
            for first in range(0, pairs, _CHUNK)
        ]
        for job in tqdm(jobs, desc=f"world {width}x{height}", unit="chunk"):
            first, codes, layouts = job.result()
            parts[first] = codes, layouts
    ordered = [parts[first] for first in sorted(parts)]
    np.save(codes_path, np.concatenate([codes for codes, _ in ordered]))
    np.save(layouts_path, np.concatenate([layouts for _, layouts in ordered]))


def load(size: tuple[int, int]) -> Scenes:
    """The cache of one format, memory-mapped.

    Raises FileNotFoundError when it was not made; run `python -m training.dataset` first.
    """
    images, codes, layouts = _files(size)
    if not layouts.exists():
        raise FileNotFoundError(f"{layouts} is missing: run `python -m training.dataset` first")
    return Scenes(size, np.load(images, mmap_mode="r"), np.load(codes), np.load(layouts))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.dataset", description=__doc__)
    parser.add_argument("--pairs", type=int, help="pairs of every format (default: as PAIRS says)")
    options = parser.parse_args(arguments)
    for size, pairs in PAIRS.items():
        make(size, pairs if options.pairs is None else options.pairs)


if __name__ == "__main__":
    main()

"""PNG sheets: contact sheets to look at, for people."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from training import dataset, vae
from training.common import train_dir
from training.painter import paint
from training.world import FORMATS, random_scene

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import AutoencoderKL

PUBLISHED = ("first-seed", "negative", "weights", "clip-guidance", "format-384x128", "format-128x256")
"""The sheets that are kept beside the documentation."""

_GAP = 2


def grid(images: np.ndarray[Any, Any], columns: int, path: Path, titles: Sequence[str] = ()) -> None:
    """Images [N, H, W, 3] in rows of `columns`; a row's title, where there is one, stands above it."""
    _, height, width, _ = images.shape
    rows = -(-len(images) // columns)
    bar = 12 if titles else 0
    sheet = Image.new("RGB", (columns * (width + _GAP), rows * (height + _GAP + bar)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top = row * (height + _GAP + bar)
        if bar and column == 0 and row < len(titles):
            draw.text((2, top), titles[row], fill="black")
        sheet.paste(Image.fromarray(np.ascontiguousarray(image)), (column * (width + _GAP), top + bar))
    sheet.save(path)


def labelled(images: np.ndarray[Any, Any], titles: Sequence[str], columns: int, path: Path) -> None:
    """Images [N, H, W, 3] in rows of `columns`, each under its own title."""
    _, height, width, _ = images.shape
    wrapped = [textwrap.wrap(title, width // 6) for title in titles]  # letters are six pixels wide
    bar = 11 * max(map(len, wrapped))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + _GAP), rows * (height + bar + _GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        row, column = divmod(index, columns)
        left, top = column * (width + _GAP), row * (height + bar + _GAP)
        for number, line in enumerate(lines):
            draw.text((left + 1, top + 11 * number), line, fill="black")
        sheet.paste(Image.fromarray(np.ascontiguousarray(image)), (left, top + bar))
    sheet.save(path)


def publish(folder: Path) -> None:
    """Copy the evaluation's sheets into `folder` with 256 colours each: a quarter of the bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted((train_dir() / "sheets").glob("*.png")):
        if source.stem in PUBLISHED:
            with Image.open(source) as sheet:
                sheet.convert("RGB").quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(
                    folder / source.name, optimize=True
                )


def world(path: Path) -> None:
    """The contact sheet of the world: 48 native scenes, then one of each other format."""
    scenes = [paint(random_scene(seed)) for seed in range(48)]
    wide = max(8 * (128 + _GAP), sum(width + _GAP for width, _ in FORMATS[1:]))
    sheet = Image.new("RGB", (wide, 6 * (128 + _GAP) + max(height for _, height in FORMATS)), "white")
    for index, scene in enumerate(scenes):
        sheet.paste(Image.fromarray(scene), ((index % 8) * (128 + _GAP), index // 8 * (128 + _GAP)))
    left = 0
    for index, size in enumerate(FORMATS[1:]):
        sheet.paste(Image.fromarray(paint(random_scene(90 + index, size))), (left, 6 * (128 + _GAP)))
        left += size[0] + _GAP
    sheet.save(path)


def reconstructions(model: AutoencoderKL, path: Path, count: int = 16) -> None:
    """Held-out scenes above their round trips through the autoencoder."""
    truth = np.asarray(dataset.load(FORMATS[0]).images[-count:])
    decoded = vae.round_trip(model, truth)
    half = count // 2
    grid(np.concatenate([truth[:half], decoded[:half], truth[half:], decoded[half:]]), half, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.sheets", description=publish.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to copy into")
    publish(parser.parse_args(arguments).out)


if __name__ == "__main__":
    main()

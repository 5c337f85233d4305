"""Draws docs/clip-guidance.png: pairs of pictures without and with CLIP guidance, from a running server."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from PIL import Image
from sdclient import Client, ClipGuidance

PROMPTS = (
    "a lake at dusk",
    "mountains at night",
    "a green forest, day",
    "the open sea at sunset",
    "a snowy mountain valley, morning",
    "a sailing boat on the sea, storm",
)
SEEDS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="localhost:50051")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs/clip-guidance.png")
    arguments = parser.parse_args()
    with Client(arguments.server, timeout=600) as client:
        rows = []
        for prompt in PROMPTS:
            plain, guided = (
                [
                    Image.open(io.BytesIO(image.data)).convert("RGB")
                    for image in client.generate(prompt, seed=0, image_count=SEEDS, clip_guidance=guidance)
                ]
                for guidance in (None, ClipGuidance())
            )
            rows.append([picture for pair in zip(plain, guided, strict=True) for picture in pair])
    width, height = rows[0][0].size
    gap = width // 16
    columns = len(rows[0])
    sheet = Image.new("RGB", (columns * width + (SEEDS - 1) * gap, len(rows) * height), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * width + x // 2 * gap, y * height))
    sheet.save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()

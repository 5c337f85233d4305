"""Fits an engine's preview map: the linear map from latents to RGB that comes nearest to its decoder.

    python scripts/fit_preview.py tiny-landscape "a lake at dusk" "a forest" "a house at night"

`sdserver engine add` fits one to coloured noise; this one, to the engine's own images, is a little nearer.

It generates images from the prompts, compares their latents with their pixels, and writes `preview_map` into the
engine's descriptor. More, and more different, prompts fit better.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import TYPE_CHECKING

from sdapi.v1 import generation_pb2
from sdmodels.preview_map import fit
from sdserver import wire
from sdserver.admission import Admission
from sdserver.backends.in_process import InProcessBackend
from sdserver.engines import Catalog, load_engine
from sdserver.image_writer import ImageWriter
from sdserver.pipeline import Pipeline
from sdserver.settings import ServeSettings

if TYPE_CHECKING:
    from pathlib import Path

    from sdserver.backends import Floats, Pixels
    from sdserver.engines import Engine

SEEDS = 4


class RecordingBackend(InProcessBackend):
    """Keeps the latents that it decoded and the pixels that they became."""

    def __init__(self, catalog: Catalog, model_repository: Path) -> None:
        super().__init__(catalog, model_repository)
        self.decoded: list[tuple[Floats, Pixels]] = []

    async def decode(self, engine: Engine, latents: Floats) -> Pixels:
        pixels = await super().decode(engine, latents)
        self.decoded += zip(latents, pixels, strict=True)
        return pixels


async def record(engine: Engine, model_repository: Path, prompts: list[str]) -> list[tuple[Floats, Pixels]]:
    """Latents [C, h, w] and pixels [H, W, 3] of SEEDS images of each prompt."""
    catalog = Catalog((engine,))
    backend = RecordingBackend(catalog, model_repository)
    while not await backend.is_ready(engine):
        await asyncio.sleep(0.1)
    async with Pipeline(catalog, backend, Admission(1, 0), 3600.0, 0, ImageWriter(wire.to_json)) as pipeline:
        for prompt in prompts:
            message = generation_pb2.GenerateRequest(
                prompts=[generation_pb2.Prompt(text=prompt)], seed=0, image_count=SEEDS
            )
            async for _ in pipeline.generate(wire.to_request(message, prompt, catalog)):
                pass
            print(f"{len(backend.decoded)} images, {prompt}")
    await backend.close()
    return backend.decoded


def main() -> None:
    """Fits and writes the map of the engine that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", help="id of an engine of the model repository")
    parser.add_argument("prompts", nargs="+", help="what it can draw")
    arguments = parser.parse_args()
    model_repository = ServeSettings().model_repository
    path = model_repository / "engines" / arguments.engine / "engine.json"
    decoded = asyncio.run(record(load_engine(path.parent), model_repository, arguments.prompts))
    found = fit(decoded)
    descriptor = json.loads(path.read_text())
    descriptor["preview_map"] = {"matrix": found.matrix, "bias": found.bias}
    path.write_text(json.dumps(descriptor, indent=2) + "\n")
    print(f"wrote preview_map into {path.name}: it misses the decoder's colours by {found.missed:.3f} of 1 (RMS)")


if __name__ == "__main__":
    main()

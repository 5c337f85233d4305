"""What a file of 768 x 768 pixels costs: encoding by Pillow's own settings and by ours, metadata, and a signature.

The picture is the contact sheet of the README, enlarged, with a little grain: what a decoder draws is not smooth.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from sdapi.v1 import generation_pb2
from sdserver import wire
from sdserver.engines import load_catalog
from sdserver.images import MEDIA_TYPES, encode
from sdserver.metadata import digital_source_type, metadata
from sdserver.settings import ServeSettings
from sdserver.signing import Signer

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdserver.images import Pixels
    from sdserver.request import GenerationRequest

ROOT = Path(__file__).parents[1]
SIZE, REPEATS = 768, 7


def main() -> None:
    """Prints a line a format: milliseconds, the best of REPEATS, and kB."""
    pixels, signer = picture(), a_signer()
    print("            Pillow's own        ours                +metadata           +signature")
    for media_type, (name, _) in MEDIA_TYPES.items():
        request = resolved(media_type)

        def by_pillow(name: str = name, request: GenerationRequest = request) -> bytes:
            file = io.BytesIO()
            options = {} if request.output.quality is None else {"quality": request.output.quality}
            Image.fromarray(pixels).save(file, name, **options)
            return file.getvalue()

        def ours(request: GenerationRequest = request) -> bytes:
            return encode(pixels, request.output)

        def described(request: GenerationRequest = request) -> bytes:
            return encode(pixels, request.output, metadata(request, wire.to_json(request)))

        def signed(request: GenerationRequest = request, media_type: str = media_type) -> bytes:
            return signer.sign(described(request), media_type, digital_source_type(request), "engine", "digest")

        ways: list[Callable[[], bytes]] = [by_pillow, ours, described, signed]
        print(f"{media_type:<12}{''.join(measured(way) for way in ways)}")


def measured(work: Callable[[], bytes]) -> str:
    """The best time and the size of a file."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        size = len(work())
        times.append(time.perf_counter() - start)
    return f"{min(times) * 1000:6.1f} ms {size / 1000:6.1f} kB "


def picture() -> Pixels:
    """[SIZE, SIZE, 3] pixels."""
    sheet = Image.open(ROOT / "docs/contact-sheet.png").convert("RGB")
    side = min(sheet.size)
    enlarged = np.asarray(sheet.crop((0, 0, side, side)).resize((SIZE, SIZE), Image.Resampling.LANCZOS), np.float64)
    grain = np.random.default_rng(0).normal(0, 3, enlarged.shape)
    return (enlarged + grain).round().clip(0, 255).astype(np.uint8)


def resolved(media_type: str) -> GenerationRequest:
    """A plain request for a format."""
    message = generation_pb2.GenerateRequest(
        prompts=[
            generation_pb2.Prompt(text="a lake at dusk, mountains, mist over the water"),
            generation_pb2.Prompt(text="trees, people, text", weight=-1),
        ],
        seed=7,
        output=generation_pb2.Output(media_type=media_type),
    )
    return wire.to_request(message, "benchmark", load_catalog(ServeSettings().model_repository))


def a_signer() -> Signer:
    """A signer with a chain of the tests' making."""
    sys.path.append(str(ROOT / "tests"))
    from c2pa_chain import write_chain

    with tempfile.TemporaryDirectory() as folder:
        return Signer(*write_chain(Path(folder)), "es256")


if __name__ == "__main__":
    main()

"""CLIP guidance through the real Triton and the shipped engine: it helps, harms nothing, and repeats itself."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import open_clip
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from safetensors.torch import load_file
from sdclient import AsyncClient, ClipGuidance, Image, Output, Windows
from sdserver.server import Server
from test_docs import ROOT, blocks, run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from sdserver.engines import Catalog
    from sdserver.settings import ServeSettings

PROMPTS = ("a lake at dusk", "mountains at night", "a green forest, day", "the open sea at sunset")
SEEDS = 4

# Bytes are compared of requests that differ, which the files would tell.
PNG = Output("image/png", metadata=False)

Pixels = NDArray[np.float64]


@pytest.fixture
async def client(triton_settings: ServeSettings) -> AsyncIterator[AsyncClient]:
    async with Server(triton_settings) as server, AsyncClient(f"127.0.0.1:{server.port}", timeout=280) as client:
        yield client


def pixels(image: Image) -> Pixels:
    """[H, W, 3] of a picture, 0 to 1."""
    return np.asarray(Pillow.open(io.BytesIO(image.data)).convert("RGB"), np.float64) / 255


class Judge:
    """The engine's CLIP by open_clip alone, on whole pictures."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "open_clip_config.json").read_text())
        self._clip = open_clip.CLIP(**config["model_cfg"]).eval()
        self._clip.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
        vocabularies = [str(path) for path in folder.glob("bpe_*.txt.gz")]
        self._tokenize = open_clip.SimpleTokenizer(*vocabularies)
        size = config["model_cfg"]["vision_cfg"]["image_size"]
        self._size = (size, size)
        self._mean, self._deviation = (np.array(config["preprocess_cfg"][name]) for name in ("mean", "std"))

    @torch.inference_mode()
    def score(self, image: Image, text: str) -> float:
        picture = Pillow.open(io.BytesIO(image.data)).convert("RGB").resize(self._size, Pillow.Resampling.BICUBIC)
        normal = (np.asarray(picture, np.float64) / 255 - self._mean) / self._deviation
        tensor = torch.tensor(normal, dtype=torch.float32).permute(2, 0, 1)[None]
        seen = self._clip.encode_image(tensor, normalize=True)[0]
        return float(seen @ self._clip.encode_text(self._tokenize([text]), normalize=True)[0])


async def test_pictures_of_the_default_preset_look_more_like_the_prompt_to_clip(
    client: AsyncClient, settings: ServeSettings, catalog: Catalog
) -> None:
    judge = Judge(settings.model_repository / "engines" / catalog.default.id / "clip")
    gains = []
    for prompt in PROMPTS:
        options: Any = {"steps": 25, "seed": 100, "image_count": SEEDS}
        plain = await client.generate(prompt, **options)
        guided = await client.generate(prompt, clip_guidance=ClipGuidance(), **options)
        gains += [judge.score(b, prompt) - judge.score(a, prompt) for a, b in zip(plain, guided, strict=True)]
    assert np.mean(np.array(gains) > 0) >= 0.8
    assert np.mean(gains) > 0.01


async def test_pictures_of_the_default_preset_keep_the_colours_of_what_they_show(client: AsyncClient) -> None:
    async def guided(prompt: str) -> list[Pixels]:
        options: Any = {"steps": 20, "seed": 0, "image_count": 2, "clip_guidance": ClipGuidance()}
        return [pixels(image) for image in await client.generate(prompt, **options)]

    for night in await guided("a meadow at night"):
        assert night.mean() < 0.35
    for forest in await guided("a green forest, day"):
        red, green, blue = np.moveaxis(forest, -1, 0)
        assert np.mean((green > red + 0.08) & (green > blue + 0.08)) > 0.3
    for sea in await guided("the open sea, day"):
        red, green, blue = np.moveaxis(sea[sea.shape[0] // 2 :], -1, 0)
        assert np.mean((blue > red + 0.15) & (blue > green + 0.08)) > 0.5


async def test_guided_pictures_are_as_smooth_as_others(client: AsyncClient) -> None:
    def roughness(image: Image) -> float:
        """Of neighbouring pixels: what a picture made for CLIP's eyes alone would have more of."""
        picture = pixels(image)
        return float(np.abs(picture - (np.roll(picture, 1, 0) + np.roll(picture, 1, 1)) / 2)[1:, 1:].mean())

    options: Any = {"steps": 20, "seed": 0, "image_count": 3}
    plain = await client.generate("a lake at dusk", **options)
    guided = await client.generate("a lake at dusk", clip_guidance=ClipGuidance(), **options)
    assert np.mean([*map(roughness, guided)]) < 1.25 * np.mean([*map(roughness, plain)])


async def test_the_same_request_gives_the_same_bytes_and_scale_0_those_of_no_guidance(client: AsyncClient) -> None:
    async def made(guidance: ClipGuidance | None) -> bytes:
        [image] = await client.generate("a lake", steps=4, seed=1, output=PNG, clip_guidance=guidance)
        return image.data

    plain, off, first, again = [
        await made(guidance) for guidance in (None, ClipGuidance(scale=0.0), ClipGuidance(), ClipGuidance())
    ]
    assert plain == off
    assert first == again != plain


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral", "dpmpp_sde"])
async def test_samplers_of_every_kind_take_it_at_any_size(client: AsyncClient, sampler: Any) -> None:
    options: Any = {"width": 200, "height": 72, "steps": 4, "seed": 1, "sampler": sampler, "image_count": 2}
    plain = await client.generate("a lake, day", **options)
    guided = await client.generate("a lake, day", clip_guidance=ClipGuidance(cutouts=2), **options)
    for before, after in zip(plain, guided, strict=True):
        assert pixels(after).shape == (72, 200, 3)
        assert 0 < np.abs(pixels(before) - pixels(after)).mean() < 0.25


async def test_the_exact_mode_makes_its_own_picture_with_windows_too(client: AsyncClient) -> None:
    options: Any = {"width": 192, "height": 64, "steps": 3, "seed": 1, "windows": Windows(64, 32), "output": PNG}
    plain, usual, exact, again = [
        (await client.generate("a lake", clip_guidance=guidance, **options))[0]
        for guidance in (None, ClipGuidance(), ClipGuidance(exact=True), ClipGuidance(exact=True))
    ]
    assert exact.data == again.data
    assert exact.data not in (plain.data, usual.data)
    assert np.abs(pixels(plain) - pixels(exact)).mean() < 0.25


def test_the_presets_of_the_document_are_those_of_the_engine(catalog: Catalog) -> None:
    assert catalog.default.clip_guidance is not None
    rows = re.findall(r"^\| ([a-z]+) " + r"\| ([\d.]+) " * 5 + r"\|$", document(), re.MULTILINE)
    presets = [
        (p.name, p.scale, p.cutouts, p.start, p.end, p.steps_per_gradient)
        for p in catalog.default.clip_guidance.presets
    ]
    assert [(name, *map(float, numbers)) for name, *numbers in rows] == presets


def document() -> str:
    return (ROOT / "docs/clip-guidance.md").read_text()


async def test_the_code_of_the_document_runs(triton_settings: ServeSettings, tmp_path: Path) -> None:
    async with Server(triton_settings) as server:
        address = f"127.0.0.1:{server.port}"
        commands = [line for block in blocks("sh", "docs/clip-guidance.md") for line in block.splitlines()]
        assert len(commands) == 2
        for command in commands:
            await run(tmp_path, shlex.split(command), SDCLIENT_SERVER=address)
        for code in blocks("python", "docs/clip-guidance.md"):
            await run(tmp_path, [sys.executable, "-c", code.replace("localhost:50051", address)])
    assert {path.name for path in tmp_path.glob("*.png")} == {"dusk.png", "sun.png"}

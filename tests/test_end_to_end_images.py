"""Images from images, through SDK, server and the real Triton with the shipped engine: what the pixels show."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as Pillow
from sdclient import AsyncClient, Image, InitImage, Mask, Outpaint, TwoPass, Variation
from sdserver.server import Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sdserver.settings import ServeSettings

Pixels = NDArray[np.float64]

LAKE, SUNSET = "a lake, sunny day", "a lake at sunset"
STEPS = 10


@pytest.fixture
async def client(triton_settings: ServeSettings) -> AsyncIterator[AsyncClient]:
    async with Server(triton_settings) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        yield client


def pixels(image: Image) -> Pixels:
    return np.asarray(Pillow.open(io.BytesIO(image.data)).convert("RGB"), np.float64)


def distance(one: Pixels, other: Pixels) -> float:
    return float(np.sqrt(np.mean((one - other) ** 2)))


def redness(picture: Pixels) -> float:
    return float(np.mean(picture[..., 0] - picture[..., 2]))


async def generate(client: AsyncClient, prompt: str = LAKE, **options: Any) -> Image:
    [image] = await client.generate(prompt, **{"steps": STEPS, "seed": 3, **options})
    return image


async def test_the_greater_the_strength_the_less_is_left_of_the_image_and_the_more_of_the_prompt(
    client: AsyncClient,
) -> None:
    lake = await generate(client)
    made = [
        pixels(await generate(client, SUNSET, seed=5, init_image=InitImage.of(lake, strength=strength)))
        for strength in (0, 0.3, 0.8, 1)
    ]
    distances = [distance(picture, pixels(lake)) for picture in made]
    assert distances[0] < 12
    assert distances[0] < distances[1] < distances[2] < distances[3]
    assert redness(made[1]) < 0 < redness(made[2])


async def test_what_is_outside_of_the_mask_stays_to_the_bit_and_inside_comes_what_is_asked_for(
    client: AsyncClient,
) -> None:
    lake = await generate(client)
    height, width = pixels(lake).shape[:2]
    box = width // 4, height // 2, width * 3 // 4, height - 8
    drawing = Pillow.new("L", (width, height))
    drawing.paste(255, box)
    made = [
        pixels(await generate(client, prompt, init_image=InitImage.of(lake), mask=Mask.of(drawing, feather=2)))
        for prompt in ("a green forest, day", "the open sea, day")
    ]
    near = np.zeros((height, width), bool)
    near[box[1] - 8 : box[3] + 8, box[0] - 8 : box[2] + 8] = True
    for picture in made:
        np.testing.assert_array_equal(picture[~near], pixels(lake)[~near])
    forest, sea = (picture[box[1] : box[3], box[0] : box[2]].mean(axis=(0, 1)) for picture in made)
    assert sea[2] - sea[1] > forest[2] - forest[1] + 40


async def test_outpainting_keeps_the_image_and_goes_on_with_it(client: AsyncClient) -> None:
    lake = await generate(client)
    height, width = pixels(lake).shape[:2]
    margin = width // 2
    wide = pixels(await generate(client, init_image=InitImage.of(lake), outpaint=Outpaint(right=margin)))
    assert wide.shape == (height, width + margin, 3)
    np.testing.assert_array_equal(wide[:, : width - 16], pixels(lake)[:, : width - 16])
    # Sky beside sky, and ground beside ground: each row of the new part has the colour of the old part's row.
    beside, new = wide[:, width - 40 : width - 16], wide[:, width + 8 :]
    assert distance(beside.mean(axis=1)[: height // 4], new.mean(axis=1)[: height // 4]) < 40
    # No seam: a step between columns at the border is no greater than elsewhere.
    steps = np.abs(np.diff(wide, axis=1)).mean(axis=(0, 2))
    assert steps[width - 20 : width + 8].max() < 2 * np.sort(steps)[-10]


async def test_variations_go_from_the_image_of_one_seed_to_that_of_the_other(client: AsyncClient) -> None:
    async def varied(strength: float) -> Image:
        return await generate(client, seed=1, variation=Variation(strength, seed=2), sampler="euler_ancestral")

    one, other = [await generate(client, seed=seed, sampler="euler_ancestral") for seed in (1, 2)]
    same, near, last = [await varied(strength) for strength in (0, 0.1, 1)]
    np.testing.assert_array_equal(pixels(same), pixels(one))
    np.testing.assert_array_equal(pixels(last), pixels(other))
    assert 0 < distance(pixels(near), pixels(one)) < distance(pixels(other), pixels(one))


async def test_two_passes_give_the_picture_of_the_first_in_more_pixels(client: AsyncClient) -> None:
    [engine] = await client.engines()
    width, height = 2 * engine.native_width, 2 * engine.native_height
    small = await generate(client)
    large = await generate(client, width=width, height=height, two_pass=TwoPass(strength=0.4))
    assert pixels(large).shape == (height, width, 3)
    shrunk = large.to_pil().convert("RGB").resize(small.to_pil().size, Pillow.Resampling.BOX)
    assert distance(np.asarray(shrunk, np.float64), pixels(small)) < 25
    enlarged = small.to_pil().convert("RGB").resize((width, height), Pillow.Resampling.BICUBIC)
    # The second pass adds what enlarging cannot.
    assert distance(np.asarray(enlarged, np.float64), pixels(large)) > 2

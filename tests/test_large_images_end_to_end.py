"""Sizes, panoramas, seamless tiling and tiled decoding of the shipped engine, through the real Triton."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from calls import a_request
from numpy.typing import NDArray
from PIL import Image as Pillow
from sdclient import AsyncClient, Windows
from sdserver.backends.triton import TritonBackend
from sdserver.decoding import decode
from sdserver.engine_schedulers import EngineSchedulers
from sdserver.observation import Observer
from sdserver.server import Server
from sdserver.wire import to_request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sdserver.engines import Catalog
    from sdserver.request import GenerationRequest
    from sdserver.settings import ServeSettings

Pixels = NDArray[np.float64]


@pytest.fixture
async def client(triton_settings: ServeSettings) -> AsyncIterator[AsyncClient]:
    async with Server(triton_settings) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        yield client


async def picture(client: AsyncClient, prompt: str, **options: Any) -> Pixels:
    """[H, W, 3] of an image, 0 to 255."""
    [image] = await client.generate(prompt, **options)
    return np.asarray(Pillow.open(io.BytesIO(image.data)).convert("RGB"), np.float64)


def column_differences(image: Pixels) -> Pixels:
    """[W] mean difference of each column and the next one; the last one's next is the first."""
    differences: Pixels = np.abs(np.roll(image, -1, axis=1) - image).mean(axis=(0, 2))
    return differences


@pytest.mark.parametrize(("width", "height"), [(16, 16), (17, 500), (1000, 333)])
async def test_an_image_is_as_wide_and_high_as_asked_for(client: AsyncClient, width: int, height: int) -> None:
    image = await picture(client, "a lake", width=width, height=height, steps=2, seed=0)
    assert image.shape == (height, width, 3)
    assert image.std() > 5


@pytest.mark.parametrize(("width", "height"), [(768, 128), (256, 256), (1024, 256)])
async def test_a_panorama_is_one_landscape(client: AsyncClient, width: int, height: int) -> None:
    night, day = [
        await picture(client, f"a valley, {time}", width=width, height=height, steps=5, sampler="dpmpp_2m", seed=0)
        for time in ("night", "sunny day")
    ]
    dark, bright = ([third.mean() for third in np.array_split(image, 3, axis=1)] for image in (night, day))
    assert max(dark) < 80 < 110 < min(bright)
    for image in (night, day):
        # The sky is above, everywhere, and of one colour: there is one horizon.
        skies = [third[: height // 8].mean(axis=(0, 1)) for third in np.array_split(image, 3, axis=1)]
        assert np.abs(np.subtract(skies, np.mean(skies, axis=0))).max() < 25


async def test_where_windows_end_nothing_is_to_be_seen(client: AsyncClient) -> None:
    options = {"width": 384, "height": 128, "steps": 8, "seed": 3}
    image = await picture(client, "a meadow, sunny day", windows=Windows(128, 64), **options)
    differences = column_differences(image)[:-1]
    borders = [64 * index - 1 for index in range(1, 6)]
    assert differences[borders].mean() < 1.5 * np.delete(differences, borders).mean()
    whole = await picture(client, "a meadow, sunny day", windows=Windows(0), **options)
    assert np.abs(image - whole).mean() > 1


async def test_a_tiled_image_goes_on_at_its_other_border_as_it_does_inside(client: AsyncClient) -> None:
    for axis, sizes in ((1, (256, 128)), (0, (128, 128))):
        options = {"width": sizes[0], "height": sizes[1], "steps": 12, "seed": 2}
        tile = {"tile_x": True} if axis == 1 else {"tile_y": True}
        plain, tiled = (
            await picture(client, "a green forest, day", **options),
            await picture(client, "a green forest, day", **options, **tile),
        )
        plain, tiled = (np.swapaxes(image, 1, axis) for image in (plain, tiled))
        *inside, border = column_differences(tiled)
        assert border <= max(inside)
        assert column_differences(plain)[-1] > 2 * border


async def test_a_tiled_decode_looks_like_that_of_the_whole(
    triton_settings: ServeSettings, catalog: Catalog, client: AsyncClient
) -> None:
    engine = catalog.default
    assert engine.decode_tile is not None
    image = np.tile(await picture(client, "a lake with trees, day", steps=8, seed=1), (4, 5, 1))
    backend = TritonBackend(triton_settings.triton_url)
    try:
        [latents] = await backend.encode_image(engine, image.astype(np.uint8)[None])
        whole_engine = engine.model_copy(update={"decode_tile": None})

        def request(of: Any) -> GenerationRequest:
            return to_request(a_request(width=640, height=512), "id", type(catalog)((of,)))

        async with EngineSchedulers(engine, backend, None, Observer()) as schedulers:
            tiled, whole = [
                (await decode(schedulers.vae_decoder, request(of), latents)).astype(np.float64)
                for of in (engine, whole_engine)
            ]
    finally:
        await backend.close()
    assert 20 * np.log10(255 / np.sqrt(np.mean((tiled - whole) ** 2))) > 40
    # A tile begins at 128 and one ends at 512.
    differences, plain = column_differences(tiled), column_differences(whole)
    for border in (128, 512):
        assert differences[border - 1] < 1.1 * plain[border - 1] + 0.1

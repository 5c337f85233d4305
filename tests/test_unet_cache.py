"""The UNet in two parts: what they have to do with the whole one, by torch, by OpenVINO and through the real Triton."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image as Pillow
from sdclient import AsyncClient, BlockCache, Output
from sdmodels.errors import InvalidInput
from sdmodels.openvino_unet import OpenVinoUNetCache
from sdmodels.runtimes import load_unet, load_unet_cache
from sdmodels.unet_cache import UNetCache
from sdserver.server import Server
from test_openvino import SHIPPED, Floats, rows

if TYPE_CHECKING:
    from sdclient import Image
    from sdmodels.runtimes import PredictCached, Runtime
    from sdserver.settings import ServeSettings

CHANNELS = 4


@pytest.fixture(scope="module", params=["openvino", "torch"])
def runtime(request: pytest.FixtureRequest) -> Runtime:
    name: Runtime = request.param
    return name


@pytest.fixture(scope="module")
def unet_cache(runtime: Runtime) -> PredictCached:
    return load_unet_cache(SHIPPED, 1, runtime)


def test_the_whole_one_predicts_what_the_plain_one_does(unet_cache: PredictCached, runtime: Runtime) -> None:
    batch = rows(3, 16, 16, 77, 128)
    plain = load_unet(SHIPPED, 1, runtime)  # from here on torch has one thread for both
    made = unet_cache(*batch)
    assert made.shape == (3, CHANNELS + 128, 16, 16)
    assert np.array_equal(made[:, :CHANNELS], plain(*batch))


@pytest.mark.parametrize(("height", "width", "tokens"), [(16, 16, 77), (8, 24, 154)])
def test_from_its_own_features_the_outermost_blocks_predict_the_same(
    unet_cache: PredictCached, height: int, width: int, tokens: int
) -> None:
    batch = rows(3, height, width, tokens, 128)
    made = unet_cache(*batch)
    again = unet_cache(*batch, np.ascontiguousarray(made[:, CHANNELS:]))
    assert np.abs(again - made[:, :CHANNELS]).max() <= 1e-5


def test_features_of_another_step_are_a_prediction_of_nearly_the_same(unet_cache: PredictCached) -> None:
    latents, timesteps, states = rows(1, 16, 16, 77, 128)
    features = np.ascontiguousarray(unet_cache(latents, timesteps, states)[:, CHANNELS:])
    near, far = (unet_cache(latents, timesteps - by, states)[:, :CHANNELS] for by in (20, 400))
    cached = unet_cache(latents, timesteps - 20, states, features)
    assert 0 < np.abs(cached - near).mean() < np.abs(cached - far).mean()


def test_both_runtimes_agree() -> None:
    batch = rows(2, 16, 16, 77, 128)
    expected = UNetCache(SHIPPED)(*batch)
    cache = OpenVinoUNetCache(SHIPPED, 1, "fp32")
    made = cache(*batch)
    assert np.abs(made - expected).max() < 1e-5 * np.abs(expected).max()
    features = np.ascontiguousarray(expected[::-1, CHANNELS:])
    expected = UNetCache(SHIPPED)(*batch, features)
    assert np.abs(cache(*batch, features) - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_rows_bytes_do_not_depend_on_its_company_in_either_part() -> None:
    cache = OpenVinoUNetCache(SHIPPED, 2)
    rng = np.random.default_rng(7)
    batch = rows(8, 16, 16, 77, 128)

    def alone(*arrays: Floats) -> Floats:
        return np.concatenate([cache(*(array[i : i + 1] for array in arrays)) for i in range(8)])

    features = np.ascontiguousarray(cache(*batch)[::-1, CHANNELS:])
    for arrays in (batch, (*batch, features)):
        expected = alone(*arrays)
        for _ in range(4):
            some = rng.permutation(8)[: rng.integers(1, 9)]
            together = cache(*(array[some] for array in arrays))
            assert together.tobytes() == expected[some].tobytes()


def test_rows_that_disagree_are_refused(unet_cache: PredictCached) -> None:
    latents, timesteps, states = rows(2, 16, 16, 77, 128)
    features = np.zeros((1, 128, 16, 16), np.float32)
    with pytest.raises(InvalidInput, match="got 2, 2, 2, 1 rows"):
        unet_cache(latents, timesteps, states, features)


def pixels(image: Image) -> Floats:
    return np.asarray(Pillow.open(io.BytesIO(image.data)).convert("RGB"), np.float32)


async def test_through_triton_an_image_changes_the_more_the_longer_the_interval(triton_settings: ServeSettings) -> None:
    async with Server(triton_settings) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:

        async def generate(interval: int | None) -> Image:
            cache = None if interval is None else BlockCache(interval)
            png = Output("image/png", metadata=False)
            [image] = await client.generate("a lake at dusk", steps=12, seed=7, block_cache=cache, output=png)
            return image

        plain = await generate(None)
        assert (await generate(1)).data == plain.data
        errors = [float(np.square(pixels(await generate(i)) - pixels(plain)).mean()) for i in (2, 3, 6)]
        assert 0 < errors[0] < errors[2]
        # It is still the same picture: more than 20 dB.
        assert errors[0] < 255**2 / 100
        assert (await generate(3)).data == (await generate(3)).data


async def test_the_file_says_the_interval_and_repeats_the_image(triton_settings: ServeSettings) -> None:
    async with Server(triton_settings) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        [image] = await client.generate("a lake at dusk", steps=4, seed=7, block_cache=BlockCache(2))
        metadata = image.metadata
        assert metadata.options["block_cache"] == BlockCache(2)
        [again] = await client.generate(metadata.prompts, **metadata.options)
        assert again.data == image.data
        [engine, *_] = await client.engines()
        assert engine.block_cache

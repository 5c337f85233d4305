"""SDK, server, real Triton, shipped engine: the pictures show what was asked for, and faults of Triton pass."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image as Pillow
from sdclient import (
    AsyncClient,
    Image,
    InvalidRequestError,
    Preview,
    PreviewOptions,
    Progress,
    Prompt,
    UnavailableError,
)
from sdserver.server import Server
from sdserver.triton_process import TritonProcess

from training.heldout import FOREST_PROMPTS, NEGATIVE
from training.pixels import green_share, time_of_day

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sdserver.engines import Catalog
    from sdserver.settings import ServeSettings

SEEDS = 4

Pixels = NDArray[np.float64]


@pytest.fixture
async def client(triton_settings: ServeSettings) -> AsyncIterator[AsyncClient]:
    async with Server(triton_settings) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        yield client


def pixels(image: Image | Preview) -> Pixels:
    """[H, W, 3] of a picture, 0 to 1."""
    return np.asarray(Pillow.open(io.BytesIO(image.data)).convert("RGB"), np.float64) / 255


def bytes_of(picture: Pixels) -> NDArray[np.uint8]:
    return (picture * 255).round().astype(np.uint8)


def share(mask: NDArray[np.bool_]) -> float:
    return float(mask.mean())


def green(picture: Pixels) -> float:
    """Share of pixels in which green leads clearly."""
    red, green, blue = np.moveaxis(picture, -1, 0)
    return share((green > red + 0.08) & (green > blue + 0.08))


def blue_below(picture: Pixels) -> float:
    """Share of the lower half in which blue leads clearly."""
    red, green, blue = np.moveaxis(picture[picture.shape[0] // 2 :], -1, 0)
    return share((blue > red + 0.15) & (blue > green + 0.08))


async def pictures(client: AsyncClient, prompts: str | list[Prompt], steps: int = 20) -> list[Pixels]:
    return [pixels(image) for image in await client.generate(prompts, steps=steps, seed=0, image_count=SEEDS)]


async def test_night_is_dark_and_day_is_bright(client: AsyncClient) -> None:
    nights, days = await asyncio.gather(pictures(client, "a meadow at night"), pictures(client, "a meadow, sunny day"))
    assert max(night.mean() for night in nights) < 0.35 < 0.45 < min(day.mean() for day in days)


async def test_a_forest_is_green_and_a_sea_is_blue(client: AsyncClient) -> None:
    forests, seas = await asyncio.gather(pictures(client, "a green forest, day"), pictures(client, "the open sea, day"))
    for forest, sea in zip(forests, seas, strict=True):
        assert green(forest) > 0.3 > 0.1 > green(sea)
        assert blue_below(sea) > 0.5 > 0.1 > blue_below(forest)


async def test_a_negative_prompt_takes_the_trees_away(client: AsyncClient) -> None:
    prompt = Prompt("a landscape on a sunny day, trees")
    plain = await pictures(client, [prompt])
    without = await pictures(client, [prompt, Prompt("trees, leaves, greenery", -1)])
    assert np.mean([green(picture) for picture in without]) < 0.5 * np.mean([green(picture) for picture in plain])


async def test_a_negative_prompt_takes_the_green_out_of_a_forest_and_leaves_its_time_of_day(
    client: AsyncClient,
) -> None:
    before, after, hours = [], [], []
    for text, hour in FOREST_PROMPTS[::2]:
        negative = [Prompt(text), Prompt(NEGATIVE, -1)]
        plain, without = await asyncio.gather(
            *(pictures(client, each, steps=12) for each in ([Prompt(text)], negative))
        )
        before += [green_share(bytes_of(picture)) for picture in plain]
        after += [green_share(bytes_of(picture)) for picture in without]
        hours += [time_of_day(bytes_of(picture)) == hour for picture in without]
    assert np.mean(before) > 0.25
    assert np.mean(after) <= 0.4 * np.mean(before)
    assert np.mean(hours) >= 0.9


async def test_a_late_preview_has_the_colours_of_the_image(client: AsyncClient) -> None:
    options = PreviewOptions(every_steps=8)
    async with client.stream("a lake at sunset", steps=10, seed=0, preview=options) as events:
        pictures = [event async for event in events if isinstance(event, Preview | Image)]
    preview, image = pictures
    assert isinstance(preview, Preview)
    assert isinstance(image, Image)
    small = Pillow.fromarray((pixels(image) * 255).astype(np.uint8)).resize((16, 16), Pillow.Resampling.BOX)
    difference = pixels(preview) - np.asarray(small, np.float64) / 255
    assert np.sqrt(np.mean(difference**2)) < 0.2


async def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_picture(client: AsyncClient) -> None:
    first, again, other = [(await client.generate("a lake", steps=5, seed=seed))[0] for seed in (0, 0, 1)]
    assert first.data == again.data
    assert not np.array_equal(pixels(first), pixels(other))


async def shares(client: AsyncClient, prompts: list[str]) -> tuple[list[float], list[float]]:
    """Mean share of green, and mean share of blue below, in the pictures of each of the prompts, in prompt syntax."""
    made = await asyncio.gather(*(pictures(client, prompt, steps=12) for prompt in prompts))
    greens, blues = ([float(np.mean([*map(measure, many)])) for many in made] for measure in (green, blue_below))
    return greens, blues


def rises(values: list[float]) -> bool:
    return all(less < more for less, more in pairwise(values))


async def test_the_balance_of_weights_is_the_balance_of_the_picture(client: AsyncClient) -> None:
    greens, blues = await shares(client, ["trees : 1 | sea : 2", "trees : 2 | sea : 1", "trees : 4 | sea : 1"])
    assert rises(greens)
    assert rises(blues[::-1])


async def test_a_negative_prompt_takes_more_away_the_greater_its_weight(client: AsyncClient) -> None:
    syntax = "a landscape on a sunny day, trees | trees, leaves, greenery : {}"
    greens, _ = await shares(client, [syntax.format(weight) for weight in (-1, -0.5, 0)])
    assert rises(greens)


async def test_a_negative_prompt_alone_acts_and_more_so_the_greater_its_weight(client: AsyncClient) -> None:
    prompts = [f"a green forest, day : {weight}" for weight in (-0.01, -0.25, -0.5, -1)]
    hardly, *others = [np.array(await pictures(client, prompt, steps=12)) for prompt in prompts]
    assert rises([float(np.abs(other - hardly).mean()) for other in others])
    greens = [np.mean([green(picture) for picture in made]) for made in (hardly, others[-1])]
    assert greens[1] < 0.1 * greens[0]


async def test_emphasis_on_a_word_moves_its_share(client: AsyncClient) -> None:
    greens, blues = await shares(client, [f"(trees:{factor}), the sea" for factor in (0.5, 1, 1.5, 2)])
    # Weakened, the word has as much green as plain.
    assert rises(greens[1:])
    assert rises(blues[::-1])


async def test_the_last_words_of_a_long_prompt_act(client: AsyncClient) -> None:
    beginning = "a wide landscape, " * 40
    greens, blues = await shares(client, [beginning + "a green forest, day", beginning + "the open sea, day"])
    assert greens[0] > 0.2 > 0.1 > greens[1]
    assert blues[1] > 0.5 > 0.2 > blues[0]


async def test_a_prompt_longer_than_the_engine_takes_is_refused(client: AsyncClient) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await client.generate(["a lake", "tree " * 1201])
    assert caught.value.violations.keys() == {"prompts[1].text"}


async def test_leaving_the_stream_frees_triton(triton_settings: ServeSettings) -> None:
    async with Server(triton_settings) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        async with client.stream("a lake", steps=150) as events:
            async for event in events:
                if isinstance(event, Progress) and event.step >= 2:
                    break
        async with asyncio.timeout(5):
            while server.admission.active:
                await asyncio.sleep(0.01)
        assert (await client.generate("a lake", steps=2))[0].data


async def test_a_killed_triton_is_unavailable_and_the_server_finds_the_next_one_by_itself(
    settings: ServeSettings, catalog: Catalog
) -> None:
    async def start(port: int = 0) -> TritonProcess:
        process = TritonProcess(
            settings.model_repository, catalog.default.models, grpc_port=port, http_port=0, metrics_port=0
        )
        return await process.__aenter__()

    first = await start()
    url = f"127.0.0.1:{first.grpc_port}"
    async with (
        Server(settings.model_copy(update={"triton_url": url})) as server,
        AsyncClient(f"127.0.0.1:{server.port}") as client,
    ):
        assert await client.generate("a lake", steps=2)
        running = asyncio.create_task(client.generate("a lake", steps=150, image_count=4))
        while server.admission.active == 0:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        os.kill(first.pid, signal.SIGKILL)
        with pytest.raises(UnavailableError) as caught:
            await running
        assert caught.value.reason in ("TRITON_UNAVAILABLE", "ENGINE_NOT_READY")
        await first.__aexit__(None, None, None)
        second = await start(first.grpc_port)
        try:
            async with asyncio.timeout(20):
                while not (await client.engines())[0].ready:
                    await asyncio.sleep(0.05)
            assert await client.generate("a lake", steps=2)
        finally:
            await second.__aexit__(None, None, None)


async def test_a_model_whose_process_dies_is_loaded_again(settings: ServeSettings, catalog: Catalog) -> None:
    async with TritonProcess(
        settings.model_repository, catalog.default.models, grpc_port=0, http_port=0, metrics_port=0
    ) as triton:
        url = f"127.0.0.1:{triton.grpc_port}"
        async with (
            Server(settings.model_copy(update={"triton_url": url})) as server,
            AsyncClient(f"127.0.0.1:{server.port}") as client,
        ):
            assert await client.generate("a lake", steps=2)
            for stub in psutil.Process(triton.pid).children(recursive=True):
                if any("unet" in part for part in stub.cmdline()):
                    stub.kill()
            with pytest.raises(UnavailableError):
                await client.generate("a lake", steps=20)
            async with asyncio.timeout(30):
                while not (await client.engines())[0].ready:
                    await asyncio.sleep(0.05)
            assert await client.generate("a lake", steps=2)

"""LoRAs of a request: what may be asked for, whose rows share calls, and how they come and go while the server runs."""

from __future__ import annotations

import asyncio
import io
import json
from typing import TYPE_CHECKING, Any

import pytest
from calls import a_request
from PIL import Image as Pillow
from sdapi.v1 import generation_pb2
from sdclient import (
    AsyncClient,
    BlockCache,
    ClipGuidance,
    InvalidRequestError,
    Lora,
    LoraInfo,
    read_metadata,
)
from sdclient.__main__ import main as sdclient
from sdserver import wire
from sdserver.errors import InvalidRequest
from sdserver.server import Server
from test_engine_watch import Repository

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fakes import FakeBackend
    from sdserver.engines import Catalog
    from sdserver.settings import ServeSettings

INK, DETAIL = "ab" * 32, "cd" * 32
EXACT = ClipGuidance(exact=True)


def describe(folder: Path, name: str, sha256: str, **changes: Any) -> Path:
    """What `sdserver lora add` writes of a LoRA, without its tensors."""
    path = folder / f"engines/first/loras/{name}.json"
    path.parent.mkdir(exist_ok=True)
    said = {"sha256": sha256, "unet_modules": 8, "text_encoder_modules": 0, "rank": 4}
    said |= {"name": name, "source": {"file": "x.safetensors", "sha256": "0" * 64}, **changes}
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps(said))
    unfinished.replace(path)
    return path


@pytest.fixture
def repository(settings: ServeSettings, tmp_path: Path) -> Repository:
    repository = Repository(tmp_path, settings.model_repository)
    repository.add("first")
    licence = {"name": "MIT"}
    describe(tmp_path, "ink", INK, title="Ink", trigger_words=["ink style"], license=licence)
    describe(tmp_path, "detail", DETAIL, text_encoder_modules=6)
    return repository


@pytest.fixture
async def server(settings: ServeSettings, repository: Repository, backend: FakeBackend) -> AsyncIterator[Server]:
    watching = settings.model_copy(update={"model_repository": repository.folder, "engine_watch_seconds": 0.02})
    async with Server(watching, backend) as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        yield client


async def test_an_engine_says_its_loras(client: AsyncClient) -> None:
    [engine] = await client.engines()
    detail, ink = engine.loras
    assert detail == LoraInfo("detail", "", "", (), DETAIL, text_encoder=True)
    assert (ink.title, ink.trigger_words, ink.license and ink.license.name) == ("Ink", ("ink style",), "MIT")


async def test_a_request_says_its_loras_and_the_file_repeats_the_image(client: AsyncClient) -> None:
    [image] = await client.generate("a lake", steps=2, seed=1, loras={"ink": 0.7, "detail": -1.5})
    said = read_metadata(image.data)
    assert said.options["loras"] == (Lora("ink", 0.7, INK), Lora("detail", -1.5, DETAIL))
    text = Pillow.open(io.BytesIO(image.data)).info["parameters"].splitlines()[0]
    assert text == "a lake <lora:ink:0.7> <lora:detail:-1.5>"
    [again] = await client.generate(said.prompts, **said.options)
    assert again.data == image.data
    [other] = await client.generate("a lake", steps=2, seed=1, loras={"ink": 0.7})
    assert other.data != image.data


async def test_a_lora_without_a_weight_has_1_and_with_0_costs_and_changes_nothing(
    client: AsyncClient, backend: FakeBackend
) -> None:
    [plain, off] = [
        image
        for loras in (None, [Lora("ink", 0.0), Lora("detail", 0.0)])
        for image in await client.generate("a lake", steps=2, seed=1, loras=loras)
    ]
    assert plain.to_pil().tobytes() == off.to_pil().tobytes()
    assert (backend.lora_batches, set(backend.text_loras)) == ([], {()})
    [image] = await client.generate("a lake", steps=1, seed=1, loras=[Lora("ink")])
    assert image.metadata.options["loras"] == (Lora("ink", 1.0, INK),)


async def test_the_rows_of_requests_with_different_loras_share_calls(client: AsyncClient, backend: FakeBackend) -> None:
    backend.delay = 0.02
    asked: list[dict[str, float]] = [{"ink": 0.5}, {"ink": 0.5, "detail": 2.0}, {"detail": -1.0}]
    await asyncio.gather(*(client.generate("a lake", steps=6, loras=loras) for loras in asked))
    rows = {digests.shape[0]: (digests, weights) for digests, weights in backend.lora_batches}
    digests, weights = rows[6]
    found = {
        tuple((bytes(digest).hex(), float(weight)) for digest, weight in zip(*row, strict=True) if weight)
        for row in zip(digests, weights, strict=True)
    }
    assert found == {((INK, 0.5),), ((INK, 0.5), (DETAIL, 2.0)), ((DETAIL, -1.0),)}


async def test_texts_are_encoded_anew_only_for_loras_that_change_them(
    client: AsyncClient, backend: FakeBackend
) -> None:
    asked: list[dict[str, float]] = [{}, {"ink": 1.0}, {"detail": 0.5}, {"ink": 2.0, "detail": 0.5}, {"detail": 0.4}]
    for loras in asked:
        await client.generate("a lake", steps=1, loras=loras)
    used = [[(lora.info.name, round(lora.weight, 3)) for lora in loras] for loras in backend.text_loras[::2]]
    assert used == [[], [("detail", 0.5)], [("detail", 0.4)]]


@pytest.mark.parametrize(
    ("loras", "options", "violations"),
    [
        ({"inc": 1.0}, {}, {"loras[0].name": "'inc' is not known; engine first has detail, ink"}),
        ({"ink": 4.5}, {}, {"loras[0].weight": "4.5 is not a number from -4 to 4"}),
        ({"ink": float("nan")}, {}, {"loras[0].weight": "nan is not a number from -4 to 4"}),
        ([Lora("ink"), Lora("ink")], {}, {"loras[1].name": "ink comes twice; add its weights up"}),
        ({str(number): 1.0 for number in range(9)}, {}, {"loras": "9 LoRAs are too many; at most 8"}),
        (
            [Lora("ink", sha256="0" * 64)],
            {},
            {"loras[0].sha256": f"ink is {INK} here, and makes other images than before; leave sha256 out to use it"},
        ),
        (
            {"ink": 1.0},
            {"block_cache": BlockCache()},
            {"loras": "not together with block_cache, whose UNet has none of them; leave one of them out"},
        ),
        (
            {"ink": 1.0},
            {"clip_guidance": EXACT},
            {"loras": "not together with clip_guidance.exact, whose UNet has none of them; leave one of them out"},
        ),
    ],
)
async def test_what_cannot_be_is_refused_by_name(
    client: AsyncClient, loras: Any, options: Any, violations: dict[str, str]
) -> None:
    with pytest.raises(InvalidRequestError) as failure:
        await client.generate("a lake", loras=loras, **options)
    assert failure.value.violations == violations


def test_an_engine_without_loras_says_so(catalog: Catalog) -> None:
    with pytest.raises(InvalidRequest) as failure:
        wire.to_request(a_request(loras=[generation_pb2.Lora(name="ink")]), "r", catalog)
    assert failure.value.violations == {"loras[0].name": "'ink' is not known; engine tiny-landscape has none"}


async def test_caching_of_every_step_goes_with_loras(client: AsyncClient) -> None:
    assert await client.generate("a lake", steps=1, loras={"ink": 1.0}, block_cache=BlockCache(1))


async def until(client: AsyncClient, *loras: str) -> None:
    async with asyncio.timeout(10):
        while [lora.name for lora in (await client.engines())[0].loras] != [*loras]:
            await asyncio.sleep(0.01)


async def test_a_lora_comes_and_goes_while_requests_run_and_nothing_is_loaded_again(
    client: AsyncClient, repository: Repository, backend: FakeBackend
) -> None:
    backend.delay = 0.02
    running = asyncio.create_task(client.generate("a lake", steps=40, loras={"ink": 1.0}))
    before = (await client.engines())[0].digest
    describe(repository.folder, "sketch", "ef" * 32)
    await until(client, "detail", "ink", "sketch")
    assert await client.generate("a lake", steps=1, loras={"sketch": 1.0})
    (repository.folder / "engines/first/loras/ink.json").unlink()
    await until(client, "detail", "sketch")
    with pytest.raises(InvalidRequestError, match="engine first has detail, sketch"):
        await client.generate("a lake", loras={"ink": 1.0})
    assert not running.done()
    assert await running
    assert (backend.loaded, backend.unloaded) == ([], [])
    assert (await client.engines())[0].digest == before


async def test_the_first_lora_is_listed_when_its_model_is_loaded_and_the_engine_serves_meanwhile(
    settings: ServeSettings, tmp_path: Path, backend: FakeBackend
) -> None:
    repository = Repository(tmp_path, settings.model_repository)
    repository.add("first")
    watching = settings.model_copy(update={"model_repository": tmp_path, "engine_watch_seconds": 0.02})
    async with Server(watching, backend) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        await until(client)
        may_load, load = asyncio.Event(), backend.load

        async def slowly(engine: Any) -> None:
            await may_load.wait()
            await load(engine)

        backend.load = slowly  # type: ignore[method-assign]
        describe(tmp_path, "ink", INK)
        await asyncio.sleep(0.2)
        [engine] = await client.engines()
        assert (engine.loras, engine.ready) == ((), True)
        assert await client.generate("a lake", steps=1)
        # What comes and goes meanwhile counts, too.
        describe(tmp_path, "detail", DETAIL)
        await asyncio.sleep(0.1)
        describe(tmp_path, "sketch", "ef" * 32).unlink()
        may_load.set()
        await until(client, "detail", "ink")
        assert set(backend.loaded) == {"first"}
        assert await client.generate("a lake", steps=1, loras={"ink": 1.0})


async def test_a_wrong_description_changes_nothing(client: AsyncClient, repository: Repository) -> None:
    describe(repository.folder, "sketch", "no digest")
    await asyncio.sleep(0.2)
    await until(client, "detail", "ink")


async def test_the_command_line_takes_loras_and_makes_images_again(
    server: Server, repository: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, image = f"127.0.0.1:{server.port}", str(tmp_path / "a.png")

    async def run(*arguments: str) -> int:
        return await asyncio.to_thread(sdclient, [*arguments, "--server", address])

    flags = "--lora", "ink:0.5", "--lora", "detail", "-s", "2", "-o", image
    assert await run("generate", "a lake", *flags) == 0
    assert read_metadata(image).options["loras"] == (Lora("ink", 0.5, INK), Lora("detail", 1.0, DETAIL))
    assert await run("reproduce", image) == 0
    assert "the same pixels" in capsys.readouterr().out
    assert await run("engines") == 0
    assert "detail; ink (ink style) (MIT)" in capsys.readouterr().out

    # As if another file had been added under its name.
    describe(repository.folder, "ink", "12" * 32)
    async with AsyncClient(address) as client, asyncio.timeout(10):
        while (await client.engines())[0].loras[1].sha256 == INK:
            await asyncio.sleep(0.01)
    assert await run("reproduce", image) == 1
    assert f"the LoRA ink is {'12' * 32} on this server, and was {INK}" in capsys.readouterr().err
    assert await run("reproduce", image, "--force") == 0
    (repository.folder / "engines/first/loras/ink.json").unlink()
    async with AsyncClient(address) as client:
        await until(client, "detail")
    assert await run("reproduce", image, "--force") == 1
    assert "was made with the LoRA ink; engine first has detail" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["ink:much", "ink:"])
def test_a_lora_that_is_none_is_wrong_usage(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sdclient(["generate", "a lake", "--lora", text])
    assert "is no LoRA such as ink-style or ink-style:0.8" in capsys.readouterr().err

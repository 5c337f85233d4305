"""Engines come and go while the server runs, and no request is dropped for it."""

from __future__ import annotations

import asyncio
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from sdclient import AsyncClient, Image, NotFoundError
from sdserver.engine_pool import EnginePool
from sdserver.errors import Unavailable
from sdserver.observation import Observer
from sdserver.server import Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fakes import FakeBackend
    from sdserver.engines import Catalog
    from sdserver.settings import ServeSettings


class Repository:
    """A model repository whose engines are descriptors alone, which is all that a fake backend needs."""

    def __init__(self, folder: Path, shipped: Path) -> None:
        self.folder = folder
        self._descriptor = json.loads((shipped / "engines/tiny-landscape/engine.json").read_text())

    def add(self, engine_id: str, **changes: Any) -> None:
        path = self.folder / "engines" / engine_id / "engine.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name("unfinished")
        unfinished.write_text(json.dumps({**self._descriptor, "id": engine_id, **changes}))
        unfinished.replace(path)

    def remove(self, engine_id: str) -> None:
        shutil.rmtree(self.folder / "engines" / engine_id)


@pytest.fixture
def repository(settings: ServeSettings, tmp_path: Path) -> Repository:
    repository = Repository(tmp_path, settings.model_repository)
    repository.add("first")
    return repository


@pytest.fixture
async def client(settings: ServeSettings, repository: Repository, backend: FakeBackend) -> AsyncIterator[AsyncClient]:
    watching = settings.model_copy(update={"model_repository": repository.folder, "engine_watch_seconds": 0.02})
    async with Server(watching, backend) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        yield client


async def until_listed(client: AsyncClient, *engines: str) -> None:
    async with asyncio.timeout(10):
        while [engine.id for engine in await client.engines() if engine.ready] != [*engines]:
            await asyncio.sleep(0.01)


async def test_an_engine_that_is_added_is_loaded_and_served_without_a_restart(
    client: AsyncClient, repository: Repository, backend: FakeBackend
) -> None:
    assert [engine.id for engine in await client.engines()] == ["first"]
    repository.add("second")
    await until_listed(client, "first", "second")
    assert backend.loaded == ["second"]
    assert await client.generate("a lake", engine="second", steps=2)


async def test_an_engine_whose_models_are_not_ready_at_the_start_is_loaded(
    settings: ServeSettings, backend: FakeBackend
) -> None:
    backend.ready = False
    async with Server(settings, backend) as server, asyncio.timeout(5):
        while backend.loaded != [engine.id for engine in server.catalog]:
            await asyncio.sleep(0.01)


async def test_an_engine_that_is_removed_finishes_what_runs_and_takes_nothing_new(
    client: AsyncClient, repository: Repository, backend: FakeBackend
) -> None:
    repository.add("second")
    await until_listed(client, "first", "second")
    backend.delay = 0.05
    running = asyncio.create_task(client.generate("a lake", engine="second", steps=20))
    while backend.running == 0:
        await asyncio.sleep(0.01)
    repository.remove("second")
    await until_listed(client, "first")
    with pytest.raises(NotFoundError, match="second"):
        await client.generate("a lake", engine="second", steps=2)
    assert backend.unloaded == []
    [image] = await running
    assert isinstance(image, Image)
    async with asyncio.timeout(5):
        while backend.unloaded != ["second"]:
            await asyncio.sleep(0.01)


async def test_an_engine_that_changes_is_loaded_again_after_what_runs_and_new_words_load_nothing(
    client: AsyncClient, repository: Repository, backend: FakeBackend
) -> None:
    repository.add("first", name="Another name")
    async with asyncio.timeout(10):
        while (await client.engines())[0].name != "Another name":
            await asyncio.sleep(0.01)
    assert (backend.loaded, backend.unloaded) == ([], [])
    backend.delay = 0.05
    running = asyncio.create_task(client.generate("a lake", steps=10))
    while backend.running == 0:
        await asyncio.sleep(0.01)
    repository.add("first", weights={"unet/config.json": "0" * 64})
    assert await running
    async with asyncio.timeout(5):
        while backend.loaded != ["first"]:
            await asyncio.sleep(0.01)
    assert backend.unloaded == ["first"]
    assert await client.generate("a lake", steps=1)


async def test_an_engine_that_is_leaving_is_unavailable_and_may_come_back(
    catalog: Catalog, backend: FakeBackend
) -> None:
    engine = catalog.default
    async with EnginePool(backend, lambda engine: None, Observer()) as pool:
        await pool.open(engine)
        with pool.use(engine):
            leaving = asyncio.create_task(pool.close(engine.id))
            await asyncio.sleep(0)
            with pytest.raises(Unavailable, match="exchanged"), pool.use(engine):
                pass
            assert not leaving.done()
        await leaving
        await pool.open(engine)
        with pool.use(engine):
            pass


async def test_a_wrong_descriptor_and_an_empty_repository_change_nothing(
    client: AsyncClient, repository: Repository, backend: FakeBackend
) -> None:
    repository.add("second", native_width=0)
    await asyncio.sleep(0.2)
    await until_listed(client, "first")
    repository.remove("second")
    repository.remove("first")
    await asyncio.sleep(0.2)
    assert await client.generate("a lake", engine="first", steps=2)
    assert backend.unloaded == []

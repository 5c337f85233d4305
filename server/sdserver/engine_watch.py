"""Engines that come and go while the server runs: `sdserver engine add` and `remove` need no restart."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from sdserver.engines import DESCRIPTOR, LORAS, EngineError, load_catalog
from sdserver.errors import Unavailable

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from sdserver.backends import Backend
    from sdserver.engine_pool import EnginePool
    from sdserver.engines import Catalog, Engine

log = structlog.get_logger()

# What says nothing about the models, and so changes without loading them again.
WORDS = {"name", "description", "license", "defaults", "preview_map", "source", "digest", "loras"}

Stamp = dict["Path", tuple[int, int, int]]


class EngineWatch:
    """Looks at the descriptors of a model repository each `interval_seconds`. Used as an async context manager.

    The engines of the start are loaded where nobody has done it: Triton may have been there before the server.

    A new engine is listed at once, and ready when its models are loaded. One that is gone takes no new requests; its
    models are unloaded when the generations that run have ended. One whose files have changed does both. LoRAs come
    and go beside what runs; the model of an engine's first one is loaded before it is listed. A descriptor that is
    wrong, or a repository without any engine, changes nothing.
    """

    def __init__(
        self,
        model_repository: Path,
        default_engine: str,
        catalog: Catalog,
        pool: EnginePool,
        backend: Backend,
        interval_seconds: float,
    ) -> None:
        self._repository = model_repository
        self._default_engine = default_engine
        self._catalog = catalog
        self._pool = pool
        self._backend = backend
        self._interval_seconds = interval_seconds
        self._seen = self._stamp()
        self._found: tuple[Engine, ...] = ()
        """Those that lie there, some of which may not be listed yet."""
        self._task: asyncio.Task[None] | None = None
        self._changes: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._work(), name="engine watch")
        self._changes = {
            engine.id: asyncio.create_task(self._load_unless_ready(engine), name=f"load engine {engine.id}")
            for engine in self._catalog
        }
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        tasks = [self._task, *self._changes.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self) -> None:
        while True:
            await asyncio.sleep(self._interval_seconds)
            try:
                stamp = await asyncio.to_thread(self._stamp)
                if stamp == self._seen:
                    continue
                self._seen = stamp
                catalog = await asyncio.to_thread(load_catalog, self._repository, self._default_engine)
            except (EngineError, OSError) as error:
                log.error("the engines have changed, and those of before are kept", error=str(error))
                continue
            self._apply(catalog)

    def _stamp(self) -> Stamp:
        found: Stamp = {}
        engines = self._repository / "engines"
        for path in (*engines.glob(f"*/{DESCRIPTOR}"), *engines.glob(f"*/{LORAS}/*.json")):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found[path] = (status.st_mtime_ns, status.st_size, status.st_ino)
        return found

    def _apply(self, catalog: Catalog) -> None:
        before = {engine.id: engine for engine in self._catalog}
        after = {engine.id: engine for engine in catalog}
        self._found = catalog.engines
        # Those that only need a model more go on as they are until it is there.
        growing = {
            engine_id
            for engine_id in before.keys() & after.keys()
            if _same_models(before[engine_id], after[engine_id])
            and not set(after[engine_id].roles) <= set(before[engine_id].roles)
        }
        # All at once, and before anything is loaded or unloaded: no request sees an engine that is going.
        self._catalog.engines = tuple(before[each.id] if each.id in growing else each for each in catalog)
        for engine_id in before.keys() | after.keys():
            old, new = before.get(engine_id), after.get(engine_id)
            former = self._changes.get(engine_id)
            if new and engine_id in growing:
                change = self._grow(new, former)
            elif old and new and _same_models(old, new):
                continue
            else:
                change = self._exchange(old, new, former)
            self._changes[engine_id] = asyncio.create_task(change, name=f"exchange engine {engine_id}")

    async def _grow(self, new: Engine, former: asyncio.Task[None] | None) -> None:
        if former is not None:
            await asyncio.wait([former])
        await self._load(new)
        if not await self._backend.is_ready(new):
            log.error("the model of an engine's LoRAs could not be loaded, and it goes on without", engine=new.id)
            return
        # Unless it has changed again meanwhile.
        if any(each is new for each in self._found):
            self._catalog.engines = tuple(new if each.id == new.id else each for each in self._catalog)

    async def _exchange(self, old: Engine | None, new: Engine | None, former: asyncio.Task[None] | None) -> None:
        if former is not None:
            await asyncio.wait([former])
        if old is not None:
            await self._pool.close(old.id)
            # A Triton that cannot be reached has nothing to unload: it loads what the repository has when it starts.
            with suppress(Unavailable):
                await self._backend.unload(old)
            log.info("engine is unloaded", engine=old.id)
        if new is not None:
            await self._pool.open(new)
            await self._load(new)

    async def _load_unless_ready(self, engine: Engine) -> None:
        if not await self._backend.is_ready(engine):
            await self._load(engine)

    async def _load(self, engine: Engine) -> None:
        """Has an engine loaded as soon as the models can be reached, unless it goes before."""
        while self._catalog.get(engine.id) is not None:
            with suppress(Unavailable):
                await self._backend.load(engine)
                return
            await asyncio.sleep(self._interval_seconds)


def _same_models(old: Engine, new: Engine) -> bool:
    return old.model_dump(exclude=WORDS) == new.model_dump(exclude=WORDS)

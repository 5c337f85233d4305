"""Text states are computed once, held within a bound, and shared by those who ask at the same time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest
from fakes import FakeBackend
from sdserver.errors import GenerationFailed
from sdserver.request import Emphasis
from sdserver.text_cache import TextCache

if TYPE_CHECKING:
    from sdserver.engines import Catalog, Engine

MANY = 10**9
STRONG = (Emphasis(0, 1, 2.0),)


@pytest.fixture
def engine(catalog: Catalog) -> Engine:
    return catalog.default


def chunk_bytes(engine: Engine) -> int:
    return engine.text_encoder.context_length * engine.text_encoder.width * 4


async def test_a_text_that_comes_again_costs_no_call(backend: FakeBackend, engine: Engine) -> None:
    cache = TextCache(backend, MANY)
    first = await cache.encode_text(engine, "a", ())
    again = await cache.encode_text(engine, "a", ())
    assert backend.texts == ["a"]
    np.testing.assert_array_equal(first.states, again.states)


async def test_engine_text_and_emphasis_are_told_apart(backend: FakeBackend, engine: Engine) -> None:
    cache = TextCache(backend, MANY)
    other = engine.model_copy(update={"digest": "sha256:other"})
    asked = [(engine, "a", ()), (engine, "b", ()), (engine, "a", STRONG), (other, "a", ())]
    for each in asked * 2:
        await cache.encode_text(*each)
    assert backend.texts == ["a", "b", "a", "a"]


async def test_what_was_used_least_recently_goes_first_and_the_bound_holds(
    backend: FakeBackend, engine: Engine
) -> None:
    cache = TextCache(backend, 2 * chunk_bytes(engine))
    for text in ("a", "b", "a", "c", "a", "c", "b"):
        await cache.encode_text(engine, text, ())
        assert cache.held_bytes <= 2 * chunk_bytes(engine)
    assert backend.texts == ["a", "b", "c", "b"]


async def test_a_long_text_counts_with_all_its_chunks(backend: FakeBackend, engine: Engine) -> None:
    cache = TextCache(backend, 2 * chunk_bytes(engine))
    await cache.encode_text(engine, "a", ())
    assert (await cache.encode_text(engine, "b " * 100, ())).chunks == 2
    assert cache.held_bytes == 2 * chunk_bytes(engine)
    await cache.encode_text(engine, "a", ())
    assert backend.texts == ["a", "b " * 100, "a"]


async def test_a_cache_without_room_holds_nothing(backend: FakeBackend, engine: Engine) -> None:
    cache = TextCache(backend, 0)
    for _ in range(2):
        assert (await cache.encode_text(engine, "a", ())).tokens == 1
    assert (backend.texts, cache.held_bytes) == (["a", "a"], 0)


async def test_equal_texts_at_the_same_time_cost_one_call(engine: Engine) -> None:
    backend = FakeBackend(encode_delay=0.02)
    cache = TextCache(backend, 0)
    await asyncio.gather(*(cache.encode_text(engine, text, ()) for text in ("a", "b", "a", "a")))
    assert backend.texts == ["a", "b"]


async def test_who_leaves_does_not_take_the_text_from_the_others(engine: Engine) -> None:
    backend = FakeBackend(encode_delay=0.02)
    cache = TextCache(backend, MANY)
    leaving, staying = (asyncio.create_task(cache.encode_text(engine, "a", ())) for _ in range(2))
    await asyncio.sleep(0.01)
    leaving.cancel()
    assert (await staying).tokens == 1
    assert leaving.cancelled()
    assert backend.texts == ["a"]


async def test_a_call_that_nobody_waits_for_any_more_is_withdrawn_and_joined_by_nobody(engine: Engine) -> None:
    backend = FakeBackend(encode_delay=60)
    cache = TextCache(backend, MANY)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(cache.encode_text(engine, "a", ()), 0.01)
    backend.encode_delay = 0
    assert (await asyncio.wait_for(cache.encode_text(engine, "a", ()), 1)).tokens == 1
    assert backend.texts == ["a"] * 3
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "encode text"]


async def test_an_error_reaches_everybody_who_waits_and_is_not_remembered(engine: Engine) -> None:
    backend = FakeBackend(error=GenerationFailed("gone", "MODEL_ERROR"))
    cache = TextCache(backend, MANY)
    answers = await asyncio.gather(*(cache.encode_text(engine, "a", ()) for _ in range(2)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [GenerationFailed] * 2
    backend.error = None
    assert (await cache.encode_text(engine, "a", ())).tokens == 1


async def test_closing_ends_what_runs(engine: Engine) -> None:
    backend = FakeBackend(encode_delay=60)
    cache = TextCache(backend, MANY)
    waiting = asyncio.create_task(cache.encode_text(engine, "a", ()))
    await asyncio.sleep(0)
    await asyncio.wait_for(cache.close(), 1)
    with pytest.raises(asyncio.CancelledError):
        await waiting

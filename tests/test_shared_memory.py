"""Tensors that a server and a Triton of the same host share, on the real Triton."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from sdserver.backends.shared_memory import FOLDER, PREFIX, SharedMemory
from sdserver.backends.triton import TritonBackend
from tritonclient.grpc.aio import InferenceServerClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from numpy.typing import NDArray
    from sdserver.backends import Floats
    from sdserver.engines import Catalog, Engine
    from sdserver.settings import ServeSettings

HANG = """
import asyncio, sys
from sdserver.backends.shared_memory import SharedMemory
from tritonclient.grpc.aio import InferenceServerClient

async def main():
    client = InferenceServerClient(sys.argv[1])
    block = await SharedMemory(client, sys.argv[1]).take(100)
    print(block.region, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture
async def backend(triton_settings: ServeSettings) -> AsyncIterator[TritonBackend]:
    backend = TritonBackend(triton_settings.triton_url)
    yield backend
    await backend.close()


@pytest.fixture
async def client(triton_settings: ServeSettings) -> AsyncIterator[InferenceServerClient]:
    client = InferenceServerClient(triton_settings.triton_url)
    yield client
    await client.close()


@pytest.fixture
def engine(catalog: Catalog) -> Engine:
    return catalog.default


def rows(engine: Engine, count: int) -> tuple[Floats, Floats, Floats]:
    generator = np.random.default_rng(count)
    latents = generator.standard_normal((count, engine.latents.channels, 16, 16), np.float32)
    states = generator.standard_normal(
        (count, engine.text_encoder.context_length, engine.text_encoder.width), np.float32
    )
    return latents, np.linspace(900, 100, count, dtype=np.float32), states


async def ours(client: InferenceServerClient) -> set[str]:
    """Regions of this and other servers that Triton holds now."""
    status = await client.get_system_shared_memory_status()
    return {region for region in status.regions if region.startswith(PREFIX)}


async def test_tensors_are_the_same_to_the_bit_whichever_way_they_travel(
    backend: TritonBackend, client: InferenceServerClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = rows(engine, 3)
    mapped: list[NDArray[Any]] = [await backend.predict(engine, *arrays), await backend.decode(engine, arrays[0])]
    assert await ours(client)
    elsewhere = TritonBackend(backend._url)
    monkeypatch.setattr(elsewhere, "_memory", SharedMemory(elsewhere._client, "triton.example:8001"))
    sent: list[NDArray[Any]] = [await elsewhere.predict(engine, *arrays), await elsewhere.decode(engine, arrays[0])]
    await elsewhere.close()
    for one, other in zip(mapped, sent, strict=True):
        np.testing.assert_array_equal(one, other)


async def test_an_answer_stays_what_it_was_when_its_memory_is_used_again(
    backend: TritonBackend, engine: Engine
) -> None:
    first, second = rows(engine, 1), rows(engine, 2)
    answer = await backend.predict(engine, *first)
    copy = answer.copy()
    await backend.predict(engine, *second)
    np.testing.assert_array_equal(answer, copy)


async def test_calls_at_the_same_time_do_not_disturb_each_other(backend: TritonBackend, engine: Engine) -> None:
    cases = [rows(engine, count) for count in (1, 2, 3, 4)]
    alone = [await backend.predict(engine, *case) for case in cases]
    together = await asyncio.gather(*(backend.predict(engine, *case) for case in cases))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


async def test_nothing_is_left_in_the_folder_even_while_it_is_used_nor_in_triton_afterwards(
    triton_settings: ServeSettings, client: InferenceServerClient, engine: Engine
) -> None:
    backend = TritonBackend(triton_settings.triton_url)
    before = await ours(client)
    await backend.predict(engine, *rows(engine, 2))
    assert not list(FOLDER.glob(f"{PREFIX}*"))
    assert await ours(client) > before
    await backend.close()
    assert await ours(client) == before


async def test_the_memory_of_a_cancelled_call_is_taken_out_when_triton_is_through_with_it(
    backend: TritonBackend, client: InferenceServerClient, engine: Engine
) -> None:
    before = await ours(client)
    calls = [asyncio.create_task(backend.predict(engine, *rows(engine, 8))) for _ in range(3)]
    # Each call has its block: one that is cancelled earlier leaves its block to others.
    while len(used := await ours(client) - before) < len(calls) or backend._memory._free:
        await asyncio.sleep(0)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    # One that was answered before it could be cancelled has given its block back.
    kept = {block.region for block in backend._memory._free}
    assert kept < used
    expected = rows(engine, 2)
    np.testing.assert_array_equal(await backend.predict(engine, *expected), await backend.predict(engine, *expected))
    async with asyncio.timeout(20):
        while used & await ours(client) != kept:
            await asyncio.sleep(0.1)


async def test_what_a_killed_server_left_is_taken_out_by_the_next(
    triton_settings: ServeSettings, client: InferenceServerClient, engine: Engine
) -> None:
    url = triton_settings.triton_url
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", HANG, url, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        region = (await process.stdout.readline()).decode().strip()
        assert region in await ours(client)
        # Alive: another server leaves it alone.
        living = TritonBackend(url)
        await living.predict(engine, *rows(engine, 1))
        await living.close()
        assert region in await ours(client)
    finally:
        process.kill()
        await process.wait()
    backend = TritonBackend(url)
    await backend.predict(engine, *rows(engine, 1))
    assert region not in await ours(client)
    await backend.close()


async def test_a_triton_that_has_forgotten_the_memory_is_given_new(
    backend: TritonBackend, client: InferenceServerClient, engine: Engine
) -> None:
    arrays = rows(engine, 2)
    expected = await backend.predict(engine, *arrays)
    for region in await ours(client):
        await client.unregister_system_shared_memory(region)
    for _ in range(2):
        np.testing.assert_array_equal(await backend.predict(engine, *arrays), expected)
    assert await ours(client)


@pytest.mark.parametrize("url", ["triton:8001", "10.0.0.7:8001", "localhost.example:8001", "[2001:db8::1]:8001"])
async def test_a_triton_elsewhere_is_not_asked_to_share_memory(client: InferenceServerClient, url: str) -> None:
    before = await ours(client)
    assert await SharedMemory(client, url).take(100) is None
    assert await ours(client) == before

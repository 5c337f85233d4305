"""An image's file does not depend on its company: on who shares its UNet calls, when they came, whether they left.

Through the SDK, the server and the real Triton. `make invariance` compares more files than `make test`.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from typing import TYPE_CHECKING, Any, get_args

import pytest
from sdclient import AsyncClient, BlockCache, ClipGuidance, Image, Sampler
from sdserver.observation import Observer, StepObserver
from sdserver.server import Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sdserver.observation import StepModel
    from sdserver.settings import ServeSettings

CASES = int(os.environ.get("INVARIANCE_CASES", "70"))
TOGETHER = 7

SUBJECTS: list[dict[str, Any]] = [
    *({"prompts": "a lake at dusk", "sampler": sampler, "seed": 5, "steps": 4} for sampler in get_args(Sampler)),
    {"prompts": "a red house : 2 | trees : -1", "seed": 1, "steps": 5, "guidance_rescale": 0.7},
    {"prompts": "a sea | sunset", "seed": 2, "steps": 3, "blending": "composable"},
    {"prompts": "a desert at night", "seed": 3, "steps": 6, "guidance_scale": 1.0},
    {"prompts": "a meadow", "seed": 4, "steps": 4, "clip_guidance": ClipGuidance(scale=0.5)},
    {"prompts": "mountains, snow", "seed": 6, "steps": 3, "width": 96},
    {"prompts": "hills in fog", "seed": 7, "steps": 6, "block_cache": BlockCache(2)},
]
NEIGHBOURS: list[dict[str, Any]] = [
    {"prompts": "a forest", "steps": 3},
    {"prompts": "a boat : 1.5 | sea : 0.5", "steps": 7, "guidance_scale": 9.0},
    {"prompts": "snow", "steps": 2, "image_count": 3},
    {"prompts": "clouds", "steps": 4, "width": 96},
]


class Batches(Observer):
    """Counts UNet calls by their rows."""

    def __init__(self) -> None:
        self.rows: Counter[int] = Counter()

    def steps(self, engine: str, model: StepModel) -> StepObserver:
        rows = self.rows if model == "unet" else Counter[int]()

        class Counts(StepObserver):
            def called(self, of: int, useful: int, bound: int, seconds: float, padded: int = 0) -> None:
                rows[of] += 1

        return Counts()


@pytest.fixture
def batches() -> Batches:
    return Batches()


@pytest.fixture
async def clients(triton_settings: ServeSettings, batches: Batches) -> AsyncIterator[list[AsyncClient]]:
    """Of a server that remembers texts, and of one that does not."""
    bare = triton_settings.model_copy(update={"text_cache_mb": 0})
    async with (
        Server(triton_settings, observers=[batches]) as server,
        Server(bare, observers=[batches]) as forgetful,
        AsyncClient(f"127.0.0.1:{server.port}") as client,
        AsyncClient(f"127.0.0.1:{forgetful.port}") as other,
    ):
        yield [client, other]


async def file_of(client: AsyncClient, subject: dict[str, Any]) -> bytes:
    [image] = await client.generate(**{"width": 64, "height": 64, **subject})
    return image.data


async def neighbour(client: AsyncClient, generator: random.Random) -> None:
    """Comes at any time, and leaves at any event or not at all."""
    await asyncio.sleep(generator.random() * 0.3)
    leaves_at = generator.choice([1, 2, 3, 100])
    options = {"width": 64, "height": 64, "seed": generator.randrange(2**32), **generator.choice(NEIGHBOURS)}
    async with client.stream(**options) as events:
        async for event in events:
            leaves_at -= 1
            if leaves_at == 0 or isinstance(event, Image):
                return


@pytest.mark.timeout(1200)
async def test_no_byte_of_a_file_depends_on_its_company(clients: list[AsyncClient], batches: Batches) -> None:
    generator = random.Random(20221207)
    alone = [await file_of(clients[0], subject) for subject in SUBJECTS]
    assert len(set(alone)) == len(alone)
    assert max(batches.rows) <= 3
    order = [
        index
        for _ in range(-(-CASES // len(SUBJECTS)))
        for index in generator.sample(range(len(SUBJECTS)), len(SUBJECTS))
    ]
    different: list[str] = []
    for start in range(0, CASES, TOGETHER):
        client = generator.choice(clients)
        chosen = order[start : min(start + TOGETHER, CASES)]

        async def late(index: int, client: AsyncClient = client) -> bytes:
            await asyncio.sleep(generator.random() * 0.2)
            return await file_of(client, SUBJECTS[index])

        company = [asyncio.create_task(neighbour(client, generator)) for _ in range(generator.randrange(1, 4))]
        files = await asyncio.gather(*(late(index) for index in chosen))
        await asyncio.gather(*company)
        different += [str(SUBJECTS[index]) for index, file in zip(chosen, files, strict=True) if file != alone[index]]
    assert not different
    # They really had company, of many sizes.
    assert len(batches.rows) > 6
    assert max(batches.rows) > 8

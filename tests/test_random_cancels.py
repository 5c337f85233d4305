"""Callers that leave at any time, through the SDK, the server and the real Triton: nothing of them is left.

`make invariance` lets 1,000 leave, `make test` a few dozen.
"""

from __future__ import annotations

import asyncio
import os
import random
from typing import TYPE_CHECKING, Any

import pytest
from sdclient import AsyncClient, DeadlineExceededError, InitImage
from sdserver.server import Server

if TYPE_CHECKING:
    from sdserver.settings import ServeSettings

CALLERS = int(os.environ.get("RANDOM_CANCELS", "40"))
AT_A_TIME = 8
PLAIN: dict[str, Any] = {"prompts": "a lake", "width": 64, "height": 64, "steps": 4, "seed": 1}


async def leave(address: str, client: AsyncClient, picture: bytes, generator: random.Random) -> str:
    """Asks for something and leaves in some way after a random time; returns how it ended."""
    options: dict[str, Any] = {
        "prompts": generator.choice(["a forest : 2 | sea : -1", "snow", "a red house"]),
        "width": generator.choice([64, 96]),
        "height": 64,
        "steps": generator.choice([3, 8, 20]),
        "image_count": generator.choice([1, 1, 3]),
        "sampler": generator.choice(["ddim", "heun", "dpmpp_sde"]),
    }
    if generator.random() < 0.2:
        options["init_image"] = InitImage(picture, strength=0.9)
    seconds = generator.random() * 0.4
    match generator.choice(["cancel", "deadline", "disconnect"]):
        case "deadline":
            try:
                await client.generate(timeout=seconds + 0.001, **options)
            except DeadlineExceededError:
                return "left"
        case "cancel":
            task = asyncio.create_task(client.generate(**options))
            done, _ = await asyncio.wait([task], timeout=seconds)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return "finished" if done else "left"
        case _:
            async with AsyncClient(address) as other:
                task = asyncio.create_task(other.generate(**options))
                done, _ = await asyncio.wait([task], timeout=seconds)
                # The connection is closed while the task still waits for its answer.
            await asyncio.gather(task, return_exceptions=True)
            return "finished" if done else "left"
    return "finished"


@pytest.mark.timeout(1200)
async def test_nothing_is_left_of_callers_that_leave_at_any_time(triton_settings: ServeSettings) -> None:
    generator = random.Random(20221207)
    async with Server(triton_settings) as server:
        address = f"127.0.0.1:{server.port}"
        async with AsyncClient(address) as client:
            [before] = await client.generate(**PLAIN)
            tasks = len(asyncio.all_tasks())
            places = asyncio.Semaphore(AT_A_TIME)

            async def caller() -> str:
                async with places:
                    return await leave(address, client, before.data, generator)

            ended = await asyncio.gather(*(caller() for _ in range(CALLERS)))
            assert ended.count("left") > CALLERS // 3
            async with asyncio.timeout(20):
                while server.admission.active or server.admission.queued or len(asyncio.all_tasks()) > tasks:
                    await asyncio.sleep(0.02)
            [after] = await client.generate(**PLAIN)
            assert after.data == before.data

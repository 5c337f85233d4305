"""The step scheduler over a function that answers when the test lets it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray
from sdserver.step_scheduler import Row, StepScheduler

Array = NDArray[np.float32]


@dataclass
class Unet:
    """Answers latents + timestep; keeps each call's timesteps; waits while `gate` is closed."""

    calls: list[list[float]] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None

    async def __call__(self, latents: Array, timesteps: Array, text_states: Array) -> Array:
        self.calls.append(timesteps.tolist())
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return latents + timesteps[:, None, None, None]


def rows(*timesteps: float, size: int = 2) -> list[Row]:
    states = np.zeros((3, 5), np.float32)
    return [Row(np.full((4, size, size), 100, np.float32), timestep, states) for timestep in timesteps]


@pytest.fixture
def unet() -> Unet:
    return Unet()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_rows_that_wait_during_a_call_share_the_next_one(unet: Unet) -> None:
    async with StepScheduler(unet, max_rows=8) as scheduler:
        first = asyncio.create_task(scheduler.predict(rows(1)))
        await settle()
        others = [asyncio.create_task(scheduler.predict(rows(t, t + 10))) for t in (2, 3)]
        await settle()
        assert unet.calls == [[1]]
        unet.gate.set()
        answers = await asyncio.gather(first, *others)
        assert unet.calls == [[1], [2, 12, 3, 13]]
        assert [answer[:, 0, 0, 0].tolist() for answer in answers] == [[101], [102, 112], [103, 113]]


async def test_those_who_step_together_stay_together(unet: Unet) -> None:
    unet.gate.set()

    async def steps(timestep: float) -> None:
        for _ in range(5):
            await scheduler.predict(rows(timestep))

    async with StepScheduler(unet, max_rows=8) as scheduler:
        await asyncio.gather(steps(1), steps(2), steps(3))
    assert unet.calls == [[1, 2, 3]] * 5


async def test_only_rows_of_one_shape_share_a_call_and_the_oldest_go_first(unet: Unet) -> None:
    unet.gate.set()
    async with StepScheduler(unet, max_rows=8) as scheduler:
        await asyncio.gather(scheduler.predict(rows(1)), scheduler.predict(rows(2, size=4)), scheduler.predict(rows(3)))
    assert unet.calls == [[1, 3], [2]]


async def test_a_request_of_more_rows_than_fit_takes_several_calls(unet: Unet) -> None:
    unet.gate.set()
    async with StepScheduler(unet, max_rows=2) as scheduler:
        long, short = await asyncio.gather(scheduler.predict(rows(1, 2, 3)), scheduler.predict(rows(4)))
    assert unet.calls == [[1, 2], [3, 4]]
    assert long[:, 0, 0, 0].tolist() == [101, 102, 103]
    assert short[:, 0, 0, 0].tolist() == [104]


async def test_rows_of_a_cancelled_request_are_withdrawn_and_its_neighbours_are_answered(unet: Unet) -> None:
    async with StepScheduler(unet, max_rows=8) as scheduler:
        running = asyncio.create_task(scheduler.predict(rows(1)))
        await settle()
        gone, stays = (asyncio.create_task(scheduler.predict(rows(t))) for t in (2, 3))
        await settle()
        gone.cancel()
        running.cancel()
        await settle()
        unet.gate.set()
        assert (await stays)[0, 0, 0, 0] == 103
    assert unet.calls == [[1], [3]]


async def test_a_failed_call_fails_its_rows_and_the_next_call_works(unet: Unet) -> None:
    unet.gate.set()
    unet.error = RuntimeError("out of memory")
    async with StepScheduler(unet, max_rows=8) as scheduler:
        with pytest.raises(RuntimeError, match="out of memory"):
            await scheduler.predict(rows(1))
        unet.error = None
        assert (await scheduler.predict(rows(2)))[0, 0, 0, 0] == 102


async def test_leaving_it_cancels_whoever_waits(unet: Unet) -> None:
    async with StepScheduler(unet, max_rows=1) as scheduler:
        waiting = [asyncio.create_task(scheduler.predict(rows(t))) for t in (1, 2)]
        await settle()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)

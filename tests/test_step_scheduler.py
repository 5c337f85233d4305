"""The step scheduler over a function that answers when the test lets it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray
from sdserver.observation import StepObserver
from sdserver.step_scheduler import Row, StepScheduler
from virtual_time import VirtualTimeLoop

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


def scheduler_of(unet: Unet, max_rows: int) -> StepScheduler:
    return StepScheduler(unet, lambda places: max_rows)


@pytest.fixture
def unet() -> Unet:
    return Unet()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_rows_that_wait_during_a_call_share_the_next_one(unet: Unet) -> None:
    async with scheduler_of(unet, 8) as scheduler:
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

    async with scheduler_of(unet, 8) as scheduler:
        await asyncio.gather(steps(1), steps(2), steps(3))
    assert unet.calls == [[1, 2, 3]] * 5


async def test_only_rows_of_one_shape_share_a_call_and_the_oldest_go_first(unet: Unet) -> None:
    unet.gate.set()
    async with scheduler_of(unet, 8) as scheduler:
        await asyncio.gather(scheduler.predict(rows(1)), scheduler.predict(rows(2, size=4)), scheduler.predict(rows(3)))
    assert unet.calls == [[1, 3], [2]]


async def test_a_request_of_more_rows_than_fit_takes_several_calls(unet: Unet) -> None:
    unet.gate.set()
    async with scheduler_of(unet, 2) as scheduler:
        long, short = await asyncio.gather(scheduler.predict(rows(1, 2, 3)), scheduler.predict(rows(4)))
    assert unet.calls == [[1, 2], [3, 4]]
    assert long[:, 0, 0, 0].tolist() == [101, 102, 103]
    assert short[:, 0, 0, 0].tolist() == [104]


async def test_rows_of_a_cancelled_request_are_withdrawn_and_its_neighbours_are_answered(unet: Unet) -> None:
    async with scheduler_of(unet, 8) as scheduler:
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
    async with scheduler_of(unet, 8) as scheduler:
        with pytest.raises(RuntimeError, match="out of memory"):
            await scheduler.predict(rows(1))
        unet.error = None
        assert (await scheduler.predict(rows(2)))[0, 0, 0, 0] == 102


async def test_a_full_batch_is_sent_while_another_call_runs(unet: Unet) -> None:
    async with scheduler_of(unet, 2) as scheduler:
        waiting = [asyncio.create_task(scheduler.predict(rows(t, t + 10))) for t in (1, 2, 3)]
        await settle()
        # One runs, one is behind it; the third waits here, where it can still be withdrawn.
        assert unet.calls == [[1, 11], [2, 12]]
        unet.gate.set()
        await asyncio.gather(*waiting)
    assert unet.calls == [[1, 11], [2, 12], [3, 13]]


async def test_a_batch_with_room_waits_for_rows_that_the_running_call_gives_back(unet: Unet) -> None:
    async def two_steps() -> None:
        await scheduler.predict(rows(1))
        await scheduler.predict(rows(2))

    async with scheduler_of(unet, 2) as scheduler:
        first = asyncio.create_task(two_steps())
        await settle()
        second = asyncio.create_task(scheduler.predict(rows(3)))
        await settle()
        assert unet.calls == [[1]]
        unet.gate.set()
        await asyncio.gather(first, second)
    assert unet.calls == [[1], [3, 2]]


async def test_rows_of_another_shape_are_sent_ahead_because_nothing_can_join_them(unet: Unet) -> None:
    async with scheduler_of(unet, 4) as scheduler:
        tasks = [asyncio.create_task(scheduler.predict(rows(t, size=size))) for t, size in ((1, 2), (2, 4))]
        await settle()
        assert unet.calls == [[1], [2]]
        unet.gate.set()
        await asyncio.gather(*tasks)


async def test_a_model_that_answers_two_calls_at_a_time_gets_two_and_one_behind_them(unet: Unet) -> None:
    async with StepScheduler(unet, lambda places: 2, parallel=2) as scheduler:
        first = asyncio.create_task(scheduler.predict(rows(1)))
        await settle()
        others = [asyncio.create_task(scheduler.predict(rows(t))) for t in (2, 3, 4, 5, 6)]
        await settle()
        # Nobody waits while one of the two is idle; behind them goes what is full.
        assert unet.calls == [[1], [2, 3], [4, 5]]
        unet.gate.set()
        await asyncio.gather(first, *others)
    assert unet.calls == [[1], [2, 3], [4, 5], [6]]


def test_a_call_is_sent_ahead_shortly_before_the_running_one_ends_once_it_is_known_how_long_that_takes() -> None:
    sent: list[tuple[float, float]] = []
    free = 0.0

    async def slow(latents: Array, timesteps: Array, text_states: Array) -> Array:
        nonlocal free
        now = asyncio.get_running_loop().time()
        sent.append((timesteps[0], now))
        # One after the other, as Triton takes them.
        free = max(now, free) + 1.0
        await asyncio.sleep(free - now)
        return latents

    async def three_shapes() -> float:
        async with StepScheduler(slow, lambda places: 4) as scheduler:
            await scheduler.predict(rows(1))
            began = asyncio.get_running_loop().time()
            running = asyncio.create_task(scheduler.predict(rows(2)))
            await settle()
            large = asyncio.create_task(scheduler.predict(rows(3, size=4)))
            await asyncio.sleep(0.5)
            assert [timestep for timestep, _ in sent] == [1, 2]
            # It comes later and goes first: the other one waits here, and not behind the running call.
            newcomer = asyncio.create_task(scheduler.predict(rows(4, size=3), "another tenant"))
            await asyncio.gather(running, large, newcomer)
        return began

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        began = runner.run(three_shapes())
    assert [timestep for timestep, _ in sent] == [1, 2, 4, 3]
    # A tenth of it and 2 ms before its end.
    assert sent[2][1] - began == pytest.approx(0.898, abs=1e-3)


async def test_small_images_get_more_of_the_time_than_large_ones(unet: Unet) -> None:
    unet.gate.set()
    finished: list[int] = []

    async def steps(size: int) -> None:
        for _ in range(12):
            await scheduler.predict(rows(size, size=size))
        finished.append(len(unet.calls))

    async with scheduler_of(unet, 4) as scheduler:
        await asyncio.gather(steps(2), steps(8))
    # 16 times the pixels: a 256th of the other's work, and so one row of the large image for many of the small one.
    assert list(unet.calls[: finished[0]]).count([8]) <= 2


async def test_the_bound_is_that_of_the_shape(unet: Unet) -> None:
    unet.gate.set()
    async with StepScheduler(unet, lambda places: 16 // places) as scheduler:
        await asyncio.gather(scheduler.predict(rows(1, 2, 3, 4, 5)), scheduler.predict(rows(6, 7, size=4)))
    assert sorted(unet.calls) == [[1, 2, 3, 4], [5], [6], [7]]


async def test_a_call_for_nobody_is_cancelled(unet: Unet) -> None:
    async with scheduler_of(unet, 2) as scheduler:
        gone = asyncio.create_task(scheduler.predict(rows(1)))
        await settle()
        gone.cancel()
        await settle()
        assert unet.calls == [[1]]
        # Nothing runs any more: the next one does not wait behind it.
        unet.gate.set()
        await scheduler.predict(rows(2))
    assert unet.calls == [[1], [2]]


@pytest.mark.parametrize("turns", range(6))
async def test_nothing_is_kept_of_a_call_whatever_the_moment_at_which_its_caller_leaves(unet: Unet, turns: int) -> None:
    async with scheduler_of(unet, 2) as scheduler:
        gone = asyncio.create_task(scheduler.predict(rows(1)))
        for _ in range(turns):
            await asyncio.sleep(0)
        gone.cancel()
        await settle()
        assert not scheduler._calls
        unet.gate.set()
        await asyncio.wait_for(scheduler.predict(rows(2)), 5)


async def test_who_shares_a_call_with_one_who_left_is_answered(unet: Unet) -> None:
    async with scheduler_of(unet, 4) as scheduler:
        gone, stays = (asyncio.create_task(scheduler.predict(rows(t))) for t in (1, 2))
        await settle()
        assert unet.calls == [[1, 2]]
        gone.cancel()
        await settle()
        unet.gate.set()
        assert (await stays)[0, 0, 0, 0] == 102


async def test_an_observer_hears_what_was_computed_and_for_whom(unet: Unet) -> None:
    heard: list[tuple[int, int, int]] = []

    class Hears(StepObserver):
        def called(self, rows: int, useful: int, bound: int, seconds: float, padded: int = 0) -> None:
            heard.append((rows, useful, bound))

    async with StepScheduler(unet, lambda places: 4, Hears()) as scheduler:
        gone, stays = (asyncio.create_task(scheduler.predict(rows(t, t))) for t in (1, 2))
        await settle()
        gone.cancel()
        await settle()
        unet.gate.set()
        await stays
    assert heard == [(4, 2, 4)]


async def test_nothing_is_kept_of_a_thousand_random_cancels(unet: Unet) -> None:
    generator = random.Random(5)

    async def image(number: int) -> None:
        for step in range(4):
            await asyncio.sleep(0)
            await scheduler.predict(rows(step, step, size=generator.choice([2, 4])), f"tenant {number % 7}")

    async with scheduler_of(unet, 4) as scheduler:
        tasks = [asyncio.create_task(image(number)) for number in range(1000)]
        while cancelled := [task for task in tasks if not task.done()]:
            generator.choice(cancelled).cancel()
            # A call takes a turn or two of the event loop.
            unet.gate.set()
            await asyncio.sleep(0)
        await settle()
        assert scheduler.waiting_rows == 0
        assert not scheduler._asks
        assert not scheduler._calls
        assert not scheduler._queue._tenants


async def test_leaving_it_cancels_whoever_waits(unet: Unet) -> None:
    async with scheduler_of(unet, 1) as scheduler:
        waiting = [asyncio.create_task(scheduler.predict(rows(t))) for t in (1, 2)]
        await settle()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)

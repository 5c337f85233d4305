"""Block caching from the request to the pixels, over a backend without weights: which steps run the whole UNet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from calls import a_request, events_of, failure_of, images_of, violations_of
from numpy.typing import NDArray
from sdapi.v1 import generation_pb2
from sdserver.block_cache import BlockCache
from sdserver.errors import NotSupported
from sdserver.samplers import SAMPLERS, evaluations
from sdserver.step_scheduler import Row, StepScheduler
from sdserver.wire import to_request

if TYPE_CHECKING:
    from fakes import FakeBackend
    from sdapi.v1.generation_pb2_grpc import GenerationServiceAsyncStub
    from sdserver.engines import Catalog

Array = NDArray[np.float32]


def cache(interval: int) -> generation_pb2.BlockCache:
    return generation_pb2.BlockCache(interval=interval)


async def made(
    stub: GenerationServiceAsyncStub, **fields: Any
) -> tuple[list[generation_pb2.Image], generation_pb2.Usage, generation_pb2.GenerateRequest]:
    """Images, usage and the resolved request."""
    events = await events_of(stub, a_request(**{"seed": 3, "steps": 10, "guidance_scale": 1.0, **fields}))
    return images_of(events), events[-1].finished.usage, events[0].accepted.request


def timesteps_of(backend: FakeBackend) -> list[float]:
    """The timesteps of all steps, in their order."""
    return sorted({*backend.whole, *(now for now, _ in backend.cached)}, reverse=True)


@pytest.mark.parametrize("interval", [1, 2, 3, 5, 10, 150])
async def test_every_nth_step_runs_the_whole_unet_and_the_others_take_its_features(
    stub: GenerationServiceAsyncStub, backend: FakeBackend, interval: int
) -> None:
    _, usage, _ = await made(stub, block_cache=cache(interval))
    assert usage.unet_rows == 10
    assert usage.pixel_steps == 10 * 64 * 64
    if interval == 1:
        assert (backend.whole, backend.cached, usage.cached_rows) == ([], [], 0)
        return
    timesteps = timesteps_of(backend)
    assert len(timesteps) == 10
    assert backend.whole == timesteps[::interval]
    expected = [(timesteps[i], timesteps[i - i % interval]) for i in range(10) if i % interval]
    assert backend.cached == expected
    assert usage.cached_rows == len(expected)


async def test_interval_1_is_no_caching_and_the_resolved_request_does_not_have_it(
    stub: GenerationServiceAsyncStub,
) -> None:
    (plain,), _, resolved = await made(stub)
    (image,), _, resolved_of_1 = await made(stub, block_cache=cache(1))
    assert image.data == plain.data
    assert not resolved.HasField("block_cache")
    assert not resolved_of_1.HasField("block_cache")


async def test_the_resolved_request_has_the_interval_and_reproduces_the_image(
    stub: GenerationServiceAsyncStub,
) -> None:
    (image,), _, resolved = await made(stub, block_cache=generation_pb2.BlockCache())
    assert resolved.block_cache.interval == 2
    (again,) = images_of(await events_of(stub, resolved))
    assert again.data == image.data


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if evaluations(name, 2) == 3])
async def test_a_second_evaluation_takes_the_features_of_the_first_one(
    stub: GenerationServiceAsyncStub, backend: FakeBackend, sampler: str
) -> None:
    _, usage, _ = await made(stub, sampler=f"SAMPLER_{sampler.upper()}", block_cache=cache(2))
    assert usage.unet_rows == 19
    assert len(backend.whole) == 5
    assert usage.cached_rows == len(backend.cached) == 14


@pytest.mark.parametrize("sampler", SAMPLERS)
async def test_every_sampler_ends_where_it_does_without(
    stub: GenerationServiceAsyncStub, backend: FakeBackend, sampler: str
) -> None:
    options = {"sampler": f"SAMPLER_{sampler.upper()}", "guidance_scale": 3.0}
    (plain,), _, _ = await made(stub, **options)
    (image,), usage, _ = await made(stub, block_cache=cache(3), **options)
    # What a text means is the same in all steps of this backend.
    assert image.data == plain.data
    assert usage.cached_rows > 0


async def test_each_prompt_of_a_composition_has_features_of_its_own(stub: GenerationServiceAsyncStub) -> None:
    prompts = [generation_pb2.Prompt(text=text, weight=weight) for text, weight in (("a", 1), ("b", 2), ("c", -0.5))]
    options = {"prompts": prompts, "blending": "BLENDING_COMPOSABLE", "guidance_scale": 2.0}
    (plain,), _, _ = await made(stub, **options)
    (image,), usage, _ = await made(stub, block_cache=cache(4), **options)
    assert image.data == plain.data
    assert (usage.unet_rows, usage.cached_rows) == (40, 28)


async def test_a_row_that_the_last_whole_step_did_not_compute_runs_whole(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    interval = generation_pb2.GuidanceInterval(start=0.25, end=0.75)
    await made(stub, guidance_scale=3.0, guidance_interval=interval, block_cache=cache(5))
    timesteps = timesteps_of(backend)
    # The conditional row in steps 1 and 6; the unconditional one in step 4, its first, and again in step 6.
    assert backend.whole == [timesteps[0], timesteps[3], timesteps[5], timesteps[5]]


async def test_every_pass_begins_with_a_whole_step(stub: GenerationServiceAsyncStub, backend: FakeBackend) -> None:
    two_pass = generation_pb2.TwoPass(width=32, height=32, strength=0.4)
    _, usage, _ = await made(stub, two_pass=two_pass, block_cache=cache(3))
    timesteps = timesteps_of(backend)
    assert backend.whole == [timesteps[i] for i in (0, 3, 6, 9, 6, 9)]
    assert usage.cached_rows == 14 - 6


async def test_clip_guidance_goes_with_it_unless_it_is_exact(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    guidance = generation_pb2.ClipGuidance(scale=0.5, steps_per_gradient=1)
    _, usage, _ = await made(stub, clip_guidance=guidance, block_cache=cache(2))
    assert (usage.clip_gradients, usage.cached_rows) == (10, 5)
    guidance.exact = True
    before = backend.calls
    error = await failure_of(stub, a_request(clip_guidance=guidance, block_cache=cache(2)))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "clip_guidance.exact" in violations_of(error)["block_cache"]
    assert backend.calls == before
    await made(stub, clip_guidance=guidance, block_cache=cache(1))


@pytest.mark.parametrize("interval", [0, -1, 151])
async def test_an_interval_out_of_range_is_named(stub: GenerationServiceAsyncStub, interval: int) -> None:
    error = await failure_of(stub, a_request(block_cache=cache(interval), steps=0))
    assert violations_of(error).keys() == {"block_cache.interval", "steps"}
    assert violations_of(error)["block_cache.interval"] == f"{interval} is not an integer from 1 to 150"


def test_an_engine_without_it_says_so(catalog: Catalog) -> None:
    roles = tuple(role for role in catalog.default.optional_roles if role != "unet_cache")
    engine = catalog.default.model_copy(update={"block_cache": None, "optional_roles": roles})
    catalog = type(catalog)((engine,))
    with pytest.raises(NotSupported, match="has no block caching; leave block_cache out"):
        to_request(a_request(block_cache=cache(2)), "id", catalog)


async def test_the_list_of_engines_says_whether_they_take_it(stub: GenerationServiceAsyncStub) -> None:
    response = await stub.ListEngines(generation_pb2.ListEnginesRequest())
    assert response.engines[0].block_cache


async def test_features_come_back_to_the_row_that_they_are_of() -> None:
    asked: list[tuple[Array, Array]] = []

    async def whole(latents: Array, timesteps: Array, text_states: Array) -> Array:
        # One channel of features: a row's window and text.
        features = latents[:, :1, :, :] * 10 + text_states[:, :1, :1, None]
        return np.concatenate([latents, features], axis=1)

    async def outermost(latents: Array, timesteps: Array, text_states: Array, features: Array) -> Array:
        asked.append((latents[:, 0, 0, 0] * 10 + text_states[:, 0, 0], features[:, 0, 0, 0]))
        return latents + 1

    keys = [(text, window) for text in range(2) for window in range(3)]
    rows = [
        Row(np.full((4, 8, 8), window, np.float32), 500.0, np.full((77, 128), text, np.float32))
        for text, window in keys
    ]
    # At most 4 rows a call.
    async with StepScheduler(whole, lambda places: 4) as first, StepScheduler(outermost, lambda places: 4) as second:
        cached = BlockCache(3, first, second, "anonymous", 4)
        # In the first step, only some of them.
        await cached.predict(7, rows[::2], keys[::2])
        predictions = await cached.predict(8, rows, keys)
        assert [float(row[0, 0, 0]) for row in predictions] == [1, 1, 3, 0, 2, 2]
        assert cached.rows == 3
        await cached.predict(9, rows[::-1], keys[::-1])
        assert cached.rows == 9
        await cached.predict(10, rows, keys)
        assert cached.rows == 9
    assert sum(len(wanted) for wanted, _ in asked) == 9
    for wanted, features in asked:
        assert np.array_equal(wanted, features)

"""Windows, seamless tiling and tiled decoding, on a backend without weights."""

from __future__ import annotations

import asyncio
import io
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from calls import a_request, events_of, failure_of, image_of, images_of, violations_of
from fakes import FakeBackend
from PIL import Image
from sdapi.v1 import generation_pb2
from sdserver.decoding import decode
from sdserver.denoiser import Denoiser
from sdserver.engine_schedulers import EngineSchedulers
from sdserver.engines import Windows
from sdserver.guidance import Guidance
from sdserver.observation import Observer
from sdserver.request import GuidanceInterval
from sdserver.samplers import Query
from sdserver.step_scheduler import StepScheduler
from sdserver.wire import to_request

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray
    from sdapi.v1.generation_pb2_grpc import GenerationServiceAsyncStub
    from sdserver.backends import Floats, Pixels
    from sdserver.engines import Catalog, Engine
    from sdserver.request import GenerationRequest
    from sdserver.settings import ServeSettings

SMALL = generation_pb2.Windows(size=64, overlap=32)
OFF = generation_pb2.Windows(size=0)


async def pixels_of(stub: GenerationServiceAsyncStub, **fields: Any) -> NDArray[np.int64]:
    return np.asarray(await image_of(stub, a_request(seed=3, **fields)), np.int64)


async def test_a_unet_that_sees_points_draws_the_same_with_and_without_windows(
    stub: GenerationServiceAsyncStub,
) -> None:
    size = {"width": 300, "height": 200}
    whole = await pixels_of(stub, windows=OFF, **size)
    for windows in (SMALL, generation_pb2.Windows(size=96, overlap=0), None):
        assert np.abs(await pixels_of(stub, windows=windows, **size) - whole).max() <= 1
    for tile in ({"tile_x": True}, {"tile_x": True, "tile_y": True}):
        wide = {"width": 160, "height": 96, "windows": SMALL}
        assert np.abs(await pixels_of(stub, **wide, **tile) - await pixels_of(stub, **wide)).max() <= 1


async def test_an_image_that_is_not_longer_than_a_window_and_an_overlap_has_the_same_bytes_without_windows(
    stub: GenerationServiceAsyncStub,
) -> None:
    for width, height in ((64, 64), (95, 33), (16, 64)):
        data = [
            images_of(await events_of(stub, a_request(width=width, height=height, seed=1, windows=windows)))[0].data
            for windows in (SMALL, OFF)
        ]
        # The files tell their windows; the pixels are the same.
        first, second = (np.asarray(Image.open(io.BytesIO(each))) for each in data)
        assert first.tobytes() == second.tobytes()


async def test_the_rows_of_windows_are_counted_and_share_calls_with_images_of_their_size(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    backend.delay = 0.02
    wide = a_request(width=160, height=64, windows=SMALL, image_count=1)
    events, _ = await asyncio.gather(events_of(stub, wide), events_of(stub, a_request(width=64, height=64)))
    usage = events[-1].finished.usage
    # 160 pixels are four windows of 64 that overlap by 32; two conditions; four steps.
    assert usage.unet_rows == 4 * 2 * 4
    assert usage.pixel_steps == usage.unet_rows * 64 * 64
    assert 10 in backend.batches


async def test_the_resolved_request_has_the_windows_of_the_engine(
    stub: GenerationServiceAsyncStub, catalog: Catalog
) -> None:
    default = catalog.default.windows
    assert default is not None
    for given, resolved in (
        (None, default),
        (generation_pb2.Windows(overlap=64), Windows(size=default.size, overlap=64)),
        (generation_pb2.Windows(size=64), Windows(size=64, overlap=32)),
        (SMALL, Windows(size=64, overlap=32)),
    ):
        events = await events_of(stub, a_request(windows=given, tile_y=True))
        request = events[0].accepted.request
        assert request.windows == generation_pb2.Windows(**resolved.model_dump())
        assert (request.tile_x, request.tile_y) == (False, True)
    off = (await events_of(stub, a_request(windows=OFF)))[0].accepted.request.windows
    assert off.HasField("size")
    assert off.size == 0


async def test_windows_and_sizes_that_cannot_be_are_refused_all_at_once(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    windows = generation_pb2.Windows(size=100)
    error = await failure_of(stub, a_request(width=100, height=65, tile_x=True, tile_y=True, windows=windows))
    violations = violations_of(error)
    assert violations.keys() == {"width", "height", "windows.size"}
    assert "96 or 128" in violations["width"]
    assert "64 or 96" in violations["height"]
    error = await failure_of(stub, a_request(windows=generation_pb2.Windows(size=64, overlap=33)))
    assert violations_of(error).keys() == {"windows.overlap"}
    error = await failure_of(stub, a_request(windows=generation_pb2.Windows(size=-32)))
    assert violations_of(error).keys() == {"windows.size"}
    two_pass = generation_pb2.TwoPass(width=60, height=64)
    error = await failure_of(stub, a_request(width=128, height=128, tile_x=True, two_pass=two_pass))
    assert violations_of(error).keys() == {"two_pass.width"}
    assert backend.calls == 0


async def test_a_first_pass_that_the_server_chooses_can_be_tiled(stub: GenerationServiceAsyncStub) -> None:
    request = a_request(width=416, height=160, tile_x=True, tile_y=True, two_pass=generation_pb2.TwoPass())
    first = (await events_of(stub, request))[0].accepted.request.two_pass
    assert first.width % 32 == first.height % 32 == 0


async def test_an_engine_without_windows_refuses_them_and_lists_none(
    settings: ServeSettings, backend: FakeBackend, catalog: Catalog
) -> None:
    engine = catalog.default.model_copy(update={"windows": None})
    with pytest.raises(Exception, match="has no windows"):
        to_request(a_request(windows=SMALL), "id", type(catalog)((engine,)))
    plain = to_request(a_request(width=512, height=512, tile_x=True), "id", type(catalog)((engine,)))
    assert plain.windows is None
    assert plain.tile_x


async def test_the_engines_list_their_windows(stub: GenerationServiceAsyncStub, catalog: Catalog) -> None:
    [engine] = (await stub.ListEngines(generation_pb2.ListEnginesRequest())).engines
    assert catalog.default.windows is not None
    assert (engine.windows.size, engine.windows.overlap) == (
        catalog.default.windows.size,
        catalog.default.windows.overlap,
    )


@dataclass
class Smoothing:
    """A UNet that means the mean of each window: what it sees decides what it says."""

    rows: int = 0

    async def __call__(self, latents: Floats, timesteps: Floats, text_states: Floats) -> Floats:
        self.rows += len(latents)
        return np.broadcast_to(latents.mean(axis=(2, 3), keepdims=True), latents.shape).astype(np.float32)


async def x0_of(request: GenerationRequest, x: Floats) -> Floats:
    guidance = Guidance(np.zeros((1, 77, 4), np.float32), (1.0,), (0.0,), 1.0, GuidanceInterval(0.0, 1.0))
    async with StepScheduler(Smoothing(), lambda places: 4) as scheduler:
        return await Denoiser(request, guidance, scheduler)(Query(1, x, 2.0))


def request_of(catalog: Catalog, **fields: Any) -> GenerationRequest:
    return to_request(a_request(**fields), "id", catalog)


async def test_turning_the_noise_round_a_ring_turns_the_image_round_it(catalog: Catalog) -> None:
    # By the distance of two windows, so that the windows fall upon each other.
    request = request_of(catalog, width=256, height=64, windows=SMALL, tile_x=True)
    x = np.random.default_rng(0).standard_normal((4, 8, 32)).astype(np.float32)
    plain, turned = await x0_of(request, x), await x0_of(request, np.roll(x, 4, axis=2))
    np.testing.assert_allclose(np.roll(plain, 4, axis=2), turned, atol=1e-5)
    open_ended = replace(request, tile_x=False)
    assert not np.allclose(
        np.roll(await x0_of(open_ended, x), 4, axis=2), await x0_of(open_ended, np.roll(x, 4, axis=2)), atol=1e-3
    )


async def decoded(backend: FakeBackend, request: GenerationRequest, latents: Floats) -> Pixels:
    async with EngineSchedulers(request.engine, backend, None, Observer()) as schedulers:
        return await decode(schedulers.vae_decoder, request, latents)


class Edges(FakeBackend):
    """A decoder that draws a black frame around whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    async def decode(self, engine: Engine, latents: Floats) -> Pixels:
        self.shapes.append(latents.shape[1:])
        await asyncio.sleep(0)
        pixels = (await super().decode(engine, latents)).copy()
        for edge in (np.s_[:, :2], np.s_[:, -2:], np.s_[:, :, :2], np.s_[:, :, -2:]):
            pixels[edge] = 0
        return pixels


async def test_what_a_decoder_draws_at_the_borders_of_tiles_cannot_be_seen_inside(catalog: Catalog) -> None:
    backend = Edges()
    request = request_of(catalog, width=1024, height=640)
    pixels = await decoded(backend, request, np.zeros((4, 80, 128), np.float32))
    assert pixels.shape == (640, 1024, 3)
    assert pixels[2:-2, 2:-2].min() >= 127
    assert len(backend.shapes) == 6
    assert max(height * width for _, height, width in backend.shapes) <= 64 * 64


async def test_a_tiled_image_has_no_frame_where_its_borders_meet(catalog: Catalog) -> None:
    request = request_of(catalog, width=128, height=96, tile_x=True)
    pixels = await decoded(Edges(), request, np.zeros((4, 12, 16), np.float32))
    assert pixels[2:-2].min() >= 125
    assert pixels[0].max() == 0


async def test_cancelling_a_decode_falls_between_tiles(catalog: Catalog) -> None:
    backend = Edges()
    task = asyncio.create_task(
        decoded(backend, request_of(catalog, width=1024, height=1024), np.zeros((4, 128, 128), np.float32))
    )
    while not backend.shapes:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(backend.shapes) < 9

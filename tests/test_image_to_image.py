"""The laws of starting from an image: what is kept, what is repainted, how many steps, and what the answer says."""

from __future__ import annotations

import hashlib
import io
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from calls import TEXT, a_request, events_of, failure_of, image_of, images_of, violations_of
from fakes import FakeBackend, pixel_of
from PIL import Image
from sdapi.v1 import generation_pb2
from sdserver import wire
from sdserver.encoding import encode
from sdserver.engine_schedulers import EngineSchedulers
from sdserver.engines import Catalog, Windows
from sdserver.errors import NotSupported
from sdserver.observation import Observer
from sdserver.passes import steps_of
from sdserver.samplers import SAMPLERS, evaluations

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sdapi.v1.generation_pb2_grpc import GenerationServiceAsyncStub
    from sdserver.backends import Floats, Pixels
    from sdserver.request import GenerationRequest

NAN = float("nan")
NEW = pixel_of(FakeBackend.mean_of(TEXT))
rng = np.random.default_rng(11)


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def a_picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def a_mask(width: int, height: int, left: int, top: int, right: int, bottom: int) -> bytes:
    """White in a box, black elsewhere."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (left, top, right, bottom))
    return png(mask)


def start_from(picture: Image.Image, width: int | None = None, height: int | None = None, **fields: Any) -> Any:
    init = {"data": png(picture), **fields.pop("init", {})}
    request = a_request(init_image=init, guidance_scale=1.0, **fields)
    for name, size in (("width", width), ("height", height)):
        request.ClearField(name)
        if size is not None:
            setattr(request, name, size)
    return request


async def pixels_of(stub: GenerationServiceAsyncStub, request: generation_pb2.GenerateRequest) -> NDArray[np.uint8]:
    return np.asarray(await image_of(stub, request))


def usage_of(events: list[generation_pb2.GenerateResponse]) -> generation_pb2.Usage:
    return events[-1].finished.usage


SMALL = a_picture(48, 32)
SMALL_DATA = png(SMALL)


async def test_without_a_size_the_result_has_that_of_the_image(stub: GenerationServiceAsyncStub) -> None:
    for fields, expected in (
        ({}, (48, 32)),
        ({"outpaint": {"left": 8, "bottom": 5}}, (56, 37)),
        ({"width": 96}, (96, 64)),
        ({"height": 16}, (24, 16)),
        ({"width": 108, "outpaint": {"left": 12}}, (108, 64)),
        ({"width": 20, "height": 100}, (20, 100)),
    ):
        events = await events_of(stub, start_from(SMALL, steps=1, **fields))
        resolved = events[0].accepted.request
        assert (resolved.width, resolved.height) == expected, fields
        assert Image.open(io.BytesIO(images_of(events)[0].data)).size == expected


def test_an_image_beyond_the_engines_limits_is_scaled_down_in_proportion(
    catalog: Catalog,
) -> None:
    limits = catalog.default.limits
    most, side = limits.max_size, int(limits.max_pixels**0.5)
    for size, expected in (
        ((2 * most, most // 8), (most, most // 16)),
        ((2 * side, 2 * side), (side, side)),
        ((limits.min_size // 2, limits.min_size // 4), (limits.min_size, limits.min_size)),
    ):
        request = wire.to_request(start_from(a_picture(*size)), "id", catalog)
        assert (request.width, request.height) == expected


@pytest.mark.parametrize("schedule", ["NATIVE", "KARRAS"])
@pytest.mark.parametrize("sampler", SAMPLERS)
async def test_what_is_not_repainted_is_kept_exactly_with_every_sampler_at_every_size(
    stub: GenerationServiceAsyncStub, sampler: str, schedule: str
) -> None:
    picture = a_picture(77, 50)
    request = start_from(
        picture,
        sampler=f"SAMPLER_{sampler.upper()}",
        schedule=f"SCHEDULE_{schedule}",
        mask={"data": a_mask(77, 50, 30, 20, 50, 40), "feather": 1.0},
    )
    made = await pixels_of(stub, request)
    np.testing.assert_array_equal(made[20:40, 30:50], NEW)
    kept = np.ones((50, 77), bool)
    kept[20 - 4 : 40 + 4, 30 - 4 : 50 + 4] = False
    np.testing.assert_array_equal(made[kept], np.asarray(picture)[kept])


async def test_margins_transparent_pixels_and_borders_are_repainted_and_the_rest_is_kept(
    stub: GenerationServiceAsyncStub,
) -> None:
    picture = a_picture(40, 40)
    clear = picture.convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 10, 40))
    sharp = {"data": a_mask(40, 40, 0, 0, 0, 0), "feather": 0.0}
    outpainted = await pixels_of(stub, start_from(picture, mask=sharp, outpaint={"left": 10, "top": 3}))
    np.testing.assert_array_equal(outpainted[3:, 10:], np.asarray(picture))
    np.testing.assert_array_equal(outpainted[:, :10], NEW)
    contained = await pixels_of(stub, start_from(picture, 60, 40, mask=sharp, init={"fit": "FIT_CONTAIN"}))
    np.testing.assert_array_equal(contained[:, 10:50], np.asarray(picture))
    np.testing.assert_array_equal(contained[:, 50:], NEW)
    transparent = await pixels_of(stub, start_from(clear, mask=sharp))
    np.testing.assert_array_equal(transparent[:, 10:], np.asarray(picture)[:, 10:])
    np.testing.assert_array_equal(transparent[:, :10], NEW)


async def test_strength_is_three_quarters_or_one_where_something_is_repainted(
    stub: GenerationServiceAsyncStub,
) -> None:
    for fields, expected in (({}, 0.75), ({"outpaint": {"top": 1}}, 1.0), ({"mask": {"data": SMALL_DATA}}, 1.0)):
        events = await events_of(stub, start_from(SMALL, **fields))
        resolved = events[0].accepted.request.init_image
        assert (resolved.strength, resolved.fit) == (expected, generation_pb2.FIT_COVER)
        assert events[-2].HasField("image")
        assert usage_of(events).unet_rows == 4 * expected


@pytest.mark.parametrize("sampler", SAMPLERS)
async def test_strength_0_takes_no_step_and_gives_what_the_autoencoder_gives(
    stub: GenerationServiceAsyncStub, sampler: str
) -> None:
    cells = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    sampler = f"SAMPLER_{sampler.upper()}"
    events = await events_of(stub, start_from(Image.fromarray(cells), sampler=sampler, init={"strength": 0.0}))
    assert usage_of(events).unet_rows == 0
    assert [event.progress.steps for event in events if event.HasField("progress")] == [0]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(images_of(events)[0].data))), cells)


async def test_strength_1_is_text_to_image(stub: GenerationServiceAsyncStub) -> None:
    fields: dict[str, Any] = {"seed": 3, "sampler": "SAMPLER_EULER_ANCESTRAL", "output": {"metadata": False}}
    plain = await events_of(stub, a_request(width=48, height=32, guidance_scale=1.0, **fields))
    started = await events_of(stub, start_from(SMALL, init={"strength": 1.0}, **fields))
    assert images_of(plain) == images_of(started)
    assert usage_of(plain) == usage_of(started)


def test_a_strength_runs_its_share_of_the_steps_rounded_down_but_at_least_one() -> None:
    for steps in (1, 7, 10, 25, 50, 150, 1000):
        shares = [float(np.float32(hundredth / 100)) for hundredth in range(101)]
        runs = [steps_of(share, steps) for share in shares]
        assert runs[0] == 0
        assert runs[1:] == [max(hundredth * steps // 100, 1) for hundredth in range(1, 101)]
        assert all(fewer <= more for fewer, more in pairwise(runs))


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_sde"])
async def test_progress_previews_and_usage_count_the_steps_that_are_run(
    stub: GenerationServiceAsyncStub, sampler: str
) -> None:
    request = start_from(
        SMALL, steps=10, sampler=f"SAMPLER_{sampler.upper()}", init={"strength": 0.6}, preview={"every_steps": 2}
    )
    events = await events_of(stub, request)
    progress = [event.progress for event in events if event.HasField("progress")]
    assert (progress[0].step, progress[-1].step, progress[-1].steps) == (0, 6, 6)
    assert {event.preview.step for event in events if event.HasField("preview")} <= {2, 4}
    assert usage_of(events).unet_rows == evaluations(sampler, 6)


async def test_guidance_acts_in_its_part_of_the_schedule_and_not_of_the_steps_that_are_run(
    stub: GenerationServiceAsyncStub,
) -> None:
    for end, rows in ((0.5, 5), (0.75, 8), (1.0, 10)):
        request = start_from(SMALL, steps=10, init={"strength": 0.5}, guidance_interval={"end": end})
        request.guidance_scale = 5.0
        assert usage_of(await events_of(stub, request)).unet_rows == rows


async def test_the_image_is_encoded_once_for_all_images_of_a_request(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    events = await events_of(stub, start_from(SMALL, image_count=3, mask={"data": SMALL_DATA}))
    assert len(images_of(events)) == 3
    [pixels] = backend.encoded
    # Padded to the engine's multiple.
    assert pixels.shape == (32, 64, 3)


async def test_the_resolved_request_has_digests_and_no_data_and_reproduces_with_the_same_files(
    stub: GenerationServiceAsyncStub,
) -> None:
    mask = a_mask(48, 32, 5, 5, 20, 20)
    request = start_from(SMALL, outpaint={"right": 7}, mask={"data": mask}, init={"fit": "FIT_STRETCH"}, image_count=2)
    first = await events_of(stub, request)
    resolved = first[0].accepted.request
    assert resolved.init_image.sha256 == hashlib.sha256(SMALL_DATA).hexdigest()
    assert resolved.mask.sha256 == hashlib.sha256(mask).hexdigest()
    assert not resolved.init_image.data
    assert not resolved.mask.data
    assert (resolved.mask.feather, resolved.outpaint.right) == (4.0, 7)

    error = await failure_of(stub, resolved)
    assert violations_of(error).keys() == {"init_image.data", "mask.data"}
    assert "sha256" in violations_of(error)["init_image.data"]

    again = generation_pb2.GenerateRequest()
    again.CopyFrom(resolved)
    again.init_image.data, again.mask.data = SMALL_DATA, mask
    repeated = await events_of(stub, again)
    assert images_of(repeated) == images_of(first)
    assert repeated[0].accepted.request == resolved


def image_fields(**fields: Any) -> dict[str, Any]:
    return {"init_image": {"data": SMALL_DATA}, **fields}


BAD: list[tuple[dict[str, Any], set[str]]] = [
    ({"init_image": {}}, {"init_image.data"}),
    ({"init_image": {"data": b"x"}}, {"init_image.data"}),
    ({"init_image": {"data": SMALL_DATA[:-200]}}, {"init_image.data"}),
    ({"init_image": {"data": bytes(20_000_001)}}, {"init_image.data"}),
    ({"init_image": {"data": SMALL_DATA, "sha256": "0" * 64}}, {"init_image.sha256"}),
    ({"init_image": {"data": SMALL_DATA, "sha256": "A" * 64}}, {"init_image.sha256"}),
    ({"init_image": {"data": SMALL_DATA, "strength": NAN}}, {"init_image.strength"}),
    ({"init_image": {"data": SMALL_DATA, "strength": 1.01}}, {"init_image.strength"}),
    ({"init_image": {"data": SMALL_DATA, "fit": 99}}, {"init_image.fit"}),
    ({"mask": {"data": SMALL_DATA}}, {"mask"}),
    ({"outpaint": {"left": 1}}, {"outpaint"}),
    (image_fields(mask={}), {"mask.data"}),
    (image_fields(mask={"data": b"\x89PNG\r\n\x1a\n"}), {"mask.data"}),
    (image_fields(mask={"data": SMALL_DATA, "feather": 64.5}), {"mask.feather"}),
    (image_fields(mask={"data": SMALL_DATA, "feather": NAN, "sha256": "x"}), {"mask.feather", "mask.sha256"}),
    (image_fields(outpaint={"left": -1, "top": 10**6}), {"outpaint.left", "outpaint.top"}),
    (image_fields(outpaint={"left": 32, "right": 32}), {"outpaint"}),
    (image_fields(two_pass={}), {"two_pass"}),
    ({"variation": {}}, {"variation.strength"}),
    ({"variation": {"strength": -0.1, "seed": -1}}, {"variation.strength", "variation.seed"}),
    ({"variation": {"strength": 0.5, "seed": 2**63 - 1}, "image_count": 2}, {"variation.seed"}),
    ({"two_pass": {"width": 15, "height": 65}}, {"two_pass.width", "two_pass.height"}),
    ({"two_pass": {"strength": NAN}}, {"two_pass.strength"}),
    ({"init_image": {"data": b"x"}, "mask": {"data": b"y"}, "steps": 0}, {"init_image.data", "mask.data", "steps"}),
]


@pytest.mark.parametrize(("fields", "violated"), BAD)
async def test_bad_fields_are_all_named_at_once_and_never_reach_the_models(
    stub: GenerationServiceAsyncStub, backend: FakeBackend, fields: dict[str, Any], violated: set[str]
) -> None:
    error = await failure_of(stub, a_request(**fields))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert violations_of(error).keys() == violated
    assert backend.calls == 0


@pytest.mark.parametrize("field", ["init_image", "mask", "outpaint", "two_pass"])
def test_an_engine_without_the_encoder_refuses_images_and_says_which_field(catalog: Catalog, field: str) -> None:
    engine = catalog.default.model_copy(update={"optional_roles": ()})
    message = a_request(**{field: {}})
    with pytest.raises(NotSupported) as caught:
        wire.to_request(message, "id", Catalog((engine,)))
    assert caught.value.metadata["field"] == field
    assert not wire.from_engine(engine, ready=True, safety_mode=None).image_to_image
    assert wire.from_engine(catalog.default, ready=True, safety_mode=None).image_to_image


async def test_variations_share_the_seed_and_count_up_their_own(stub: GenerationServiceAsyncStub) -> None:
    variation = {"strength": 0.25, "seed": 9}
    events = await events_of(stub, a_request(seed=5, image_count=3, variation=variation))
    assert [image.seed for image in images_of(events)] == [5, 5, 5]
    resolved = events[0].accepted.request
    assert (resolved.seed, resolved.image_count, list(resolved.seeds)) == (5, 3, [])
    assert (resolved.variation.seed, resolved.variation.strength) == (9, 0.25)
    again = await events_of(stub, resolved)
    assert images_of(again) == images_of(events)
    assert again[0].accepted.request == resolved
    seeds = await events_of(stub, a_request(seeds=[1, 7], variation=variation))
    assert [image.seed for image in images_of(seeds)] == [1, 7]
    chosen = (await events_of(stub, a_request(variation={"strength": 1.0})))[0].accepted.request.variation
    assert chosen.HasField("seed")


def test_one_image_of_several_variations_can_be_asked_for_alone(catalog: Catalog) -> None:
    message = a_request(seed=5, image_count=3, variation={"strength": 0.25, "seed": 9})
    alone = wire.to_request(message, "id", catalog).alone(2)
    assert wire.from_request(alone).variation.seed == 11
    assert wire.from_request(alone).seed == 5


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"width": 64, "height": 64}, (64, 64)),
        ({"width": 200, "height": 100, "two_pass": {"width": 100}}, (100, 50)),
        ({"width": 200, "height": 100, "two_pass": {"height": 40}}, (80, 40)),
        ({"width": 200, "height": 100, "two_pass": {"width": 33, "height": 100}}, (33, 100)),
        ({"width": 512, "height": 16, "two_pass": {"width": 16}}, (16, 16)),
    ],
)
async def test_the_first_pass_has_the_size_asked_for_and_what_is_left_out_in_proportion(
    stub: GenerationServiceAsyncStub, fields: dict[str, Any], expected: tuple[int, int]
) -> None:
    resolved = (await events_of(stub, a_request(**{"two_pass": {}, "steps": 1, **fields})))[0].accepted.request
    assert (resolved.two_pass.width, resolved.two_pass.height, resolved.two_pass.strength) == (*expected, 0.5)
    assert (resolved.width, resolved.height) == (fields["width"], fields["height"])


def test_the_first_pass_has_the_engines_pixels_and_the_requests_proportions(catalog: Catalog) -> None:
    side = int((catalog.default.native_width * catalog.default.native_height) ** 0.5)
    for size, expected in (
        ((2 * side, 2 * side), (side, side)),
        ((4 * side, side), (2 * side, side // 2)),
        ((side, side), (side, side)),
    ):
        message = a_request(width=size[0], height=size[1], two_pass={})
        two_pass = wire.to_request(message, "id", catalog).two_pass
        assert two_pass is not None
        assert (two_pass.width, two_pass.height) == expected


def test_the_first_pass_of_what_is_tiled_can_be_tiled(catalog: Catalog) -> None:
    multiple = catalog.default.limits.size_multiple
    message = a_request(width=9 * multiple, height=7 * multiple, two_pass={}, tile_x=True)
    two_pass = wire.to_request(message, "id", catalog).two_pass
    assert two_pass is not None
    assert two_pass.width % multiple == 0


async def encoded(backend: FakeBackend, request: GenerationRequest, pixels: Pixels) -> Floats:
    async with EngineSchedulers(request.engine, backend, None, Observer()) as schedulers:
        assert schedulers.vae_encoder is not None
        return await encode(schedulers.vae_encoder, request, pixels)


async def test_a_large_image_is_encoded_in_tiles_and_the_latents_are_the_same(
    catalog: Catalog, backend: FakeBackend
) -> None:
    small_tiles = catalog.default.model_copy(update={"decode_tile": Windows(size=64, overlap=32)})
    pixels = np.asarray(a_picture(192, 96))
    for fields in ({}, {"tile_x": True}, {"tile_x": True, "tile_y": True}):
        message = a_request(**fields)
        whole, tiled = [
            await encoded(backend, wire.to_request(message, "id", Catalog((engine,))), pixels)
            for engine in (catalog.default, small_tiles)
        ]
        np.testing.assert_allclose(tiled, whole, atol=1e-5)
    assert max(picture.shape[0] for picture in backend.encoded if picture.shape[1] < 192) == 64


async def test_two_passes_are_counted_together_and_the_second_starts_from_the_first_enlarged(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    request = a_request(
        width=96, height=60, steps=6, guidance_scale=1.0, image_count=2, preview={"every_steps": 1},
        two_pass={"width": 48, "height": 30, "strength": 0.5},
    )  # fmt: skip
    events = await events_of(stub, request)
    progress = [event.progress for event in events if event.HasField("progress")]
    assert (progress[-1].step, progress[-1].steps) == (9, 9)
    usage = usage_of(events)
    assert (usage.unet_rows, usage.pixel_steps) == (2 * 9, 2 * (6 * 64 * 32 + 3 * 96 * 64))
    sizes = {(event.preview.width, event.preview.height) for event in events if event.HasField("preview")}
    assert sizes <= {(6, 4), (12, 8)}
    assert [pixels.shape for pixels in backend.encoded] == [(64, 96, 3)] * 2
    assert (backend.encoded[0] == NEW).all()
    again = await events_of(stub, events[0].accepted.request)
    assert images_of(again) == images_of(events)


async def test_the_second_pass_can_run_everything_or_nothing(stub: GenerationServiceAsyncStub) -> None:
    for strength, rows in ((0.0, 4), (1.0, 8), (0.01, 5)):
        request = a_request(guidance_scale=1.0, two_pass={"width": 32, "strength": strength})
        assert usage_of(await events_of(stub, request)).unet_rows == rows

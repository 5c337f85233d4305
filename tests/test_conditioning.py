"""The laws of engines whose UNet takes more than noisy latents, over a backend without weights."""

from __future__ import annotations

import hashlib
import io
import json
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
import torch
from calls import a_request, events_of, failure_of, image_of, images_of, violations_of
from diffusers import DDPMScheduler
from PIL import Image
from sdapi.v1 import engine_pb2, generation_pb2
from sdapi.v1.generation_pb2_grpc import GenerationServiceStub
from sdserver import wire
from sdserver.canvas import Canvas
from sdserver.depth import depth_channel
from sdserver.engines import Engine
from sdserver.errors import NotSupported
from sdserver.images import crop
from sdserver.noise import ImageNoise
from sdserver.server import Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fakes import FakeBackend
    from sdapi.v1.generation_pb2_grpc import GenerationServiceAsyncStub
    from sdserver.engines import Catalog
    from sdserver.settings import ServeSettings

# What an engine has to be without once it lacks the roles for it.
BARE: dict[str, Any] = {"block_cache": None, "clip_guidance": None}

rng = np.random.default_rng(11)
PICTURE = Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def a_mask(box: tuple[int, int, int, int]) -> bytes:
    mask = Image.new("L", PICTURE.size, 0)
    mask.paste(255, box)
    return png(mask)


@pytest.fixture
def engine(request: pytest.FixtureRequest, catalog: Catalog, tmp_path: Path) -> Engine:
    """The shipped engine with another conditioning, by indirect parametrisation."""
    folder = tmp_path / "engines" / catalog.default.id
    folder.mkdir(parents=True)
    descriptor = catalog.default.model_dump(mode="json", exclude={"digest"}) | request.param
    (folder / "engine.json").write_text(json.dumps(descriptor))
    return Engine.model_validate(descriptor)


@pytest.fixture
async def stub(
    engine: Engine, settings: ServeSettings, backend: FakeBackend, tmp_path: Path
) -> AsyncIterator[GenerationServiceAsyncStub]:
    async with (
        Server(settings.model_copy(update={"model_repository": tmp_path}), backend) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield GenerationServiceStub(channel)


inpainting = pytest.mark.parametrize("engine", [{"conditioning": "inpainting"}], indirect=True)


def repainting(box: tuple[int, int, int, int], **fields: Any) -> generation_pb2.GenerateRequest:
    init = {"data": png(PICTURE), **fields.pop("init", {})}
    mask = {"data": a_mask(box), "feather": fields.pop("feather", 0)}
    return a_request(init_image=init, mask=mask, width=96, height=64, **fields)


@inpainting
async def test_an_inpainting_unet_sees_in_every_step_what_is_kept_and_nothing_of_the_rest(
    stub: GenerationServiceAsyncStub, backend: FakeBackend, engine: Engine
) -> None:
    # The second row and column of places begin within the box, the last ones of it end there.
    await events_of(stub, repainting((3, 8, 31, 24)))
    [shown] = backend.encoded
    hidden = np.zeros((64, 96), np.bool_)
    hidden[8:24, 3:31] = True
    assert np.array_equal(shown[..., 3] == 0, hidden)
    assert np.array_equal(shown[~hidden][:, :3], np.asarray(PICTURE)[~hidden])
    assert len(backend.conditionings) == 8
    mask, *latents = backend.conditionings[0]
    expected = np.zeros((8, 12), np.float32)
    expected[1:3, 1:4] = 1
    assert np.array_equal(mask, expected)
    assert np.array_equal(latents, (await backend.encode_image(engine, shown[None]))[0])
    for other in backend.conditionings:
        assert np.array_equal(other, backend.conditionings[0])


@inpainting
@pytest.mark.parametrize("sampler", ["DDIM", "HEUN", "DPMPP_2M_SDE", "LCM"])
async def test_what_an_inpainting_engine_is_not_to_repaint_is_kept_exactly(
    stub: GenerationServiceAsyncStub, sampler: str
) -> None:
    request = repainting((16, 16, 48, 40), feather=2, sampler=f"SAMPLER_{sampler}")
    pixels = np.asarray(await image_of(stub, request))
    far = np.ones((64, 96), np.bool_)
    far[8:48, 8:56] = False
    assert np.array_equal(pixels[far], np.asarray(PICTURE)[far])
    assert not np.array_equal(pixels[20:36, 20:44], np.asarray(PICTURE)[20:36, 20:44])


@inpainting
@pytest.mark.parametrize(
    "fields",
    [{}, {"init_image": {"data": png(PICTURE)}}, {"two_pass": {"width": 48}}],
    ids=["text to image", "image to image", "two passes"],
)
async def test_where_nothing_is_kept_an_inpainting_unet_sees_nothing(
    stub: GenerationServiceAsyncStub, backend: FakeBackend, fields: dict[str, Any]
) -> None:
    await events_of(stub, a_request(width=96, height=64, **fields))
    assert all(np.array_equal(mask, np.ones_like(mask)) for mask, *_ in backend.conditionings)
    assert any(pixels.shape[-1] == 4 and not pixels[..., 3].any() for pixels in backend.encoded)
    # What it starts from is seen as it is.
    assert all(pixels.shape[-1] == 3 or pixels[..., 3].max() == 0 for pixels in backend.encoded)


@inpainting
async def test_the_margins_of_an_extended_image_are_hidden(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    await events_of(stub, a_request(init_image={"data": png(PICTURE)}, outpaint={"left": 32}, width=128, height=64))
    expected = np.zeros((8, 16), np.float32)
    expected[:, :4] = 1
    assert np.array_equal(backend.conditionings[0][0], expected)


@inpainting
async def test_windows_and_block_caching_show_each_row_its_own_part(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    request = repainting((0, 0, 32, 64), windows={"size": 32, "overlap": 0}, block_cache={"interval": 2})
    request.width, request.height = 96, 32
    request.guidance_scale = 1
    await events_of(stub, request)
    masks = [bool(mask.all()) for mask, *_ in backend.conditionings]
    assert masks == [True, False, False] * 4
    assert len(backend.cached) == 6


@inpainting
async def test_the_gradient_goes_to_the_noisy_latents_alone(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    await events_of(stub, repainting((0, 0, 32, 64), clip_guidance={"exact": True, "steps_per_gradient": 1}))
    assert backend.unet_gradients


@inpainting
async def test_engines_say_what_their_unets_take(stub: GenerationServiceAsyncStub) -> None:
    [engine] = (await stub.ListEngines(generation_pb2.ListEnginesRequest())).engines
    assert engine.conditioning == engine_pb2.CONDITIONING_INPAINTING


def test_an_inpainting_engine_needs_an_encoder(catalog: Catalog) -> None:
    descriptor = catalog.default.model_dump() | {"conditioning": "inpainting", "optional_roles": ("clip_guidance",)}
    with pytest.raises(ValueError, match="vae_encoder"):
        Engine.model_validate(descriptor | {"block_cache": None})


# Depth


depth = pytest.mark.parametrize("engine", [{"conditioning": "depth"}], indirect=True)
estimating = pytest.mark.parametrize(
    "engine", [{"conditioning": "depth", "optional_roles": ["vae_encoder", "depth_estimator"], **BARE}], indirect=True
)
DEPTHS = Image.fromarray(rng.integers(0, 65536, (64, 96), dtype=np.uint16))


@pytest.mark.parametrize("size", [(64, 96), (384, 384), (8, 12), (5, 7), (100, 3)])
def test_depths_are_resampled_and_normalised_as_in_diffusers(size: tuple[int, int]) -> None:
    depths = rng.standard_normal(size).astype(np.float32)
    wanted = torch.nn.functional.interpolate(
        torch.from_numpy(depths)[None, None], size=(8, 12), mode="bicubic", align_corners=False
    )[0, 0]
    expected = 2 * (wanted - wanted.min()) / (wanted.max() - wanted.min()) - 1
    np.testing.assert_allclose(depth_channel(depths, 8, 12), expected.numpy(), atol=1e-5)


def test_depths_without_differences_say_nothing() -> None:
    assert not depth_channel(np.full((64, 64), 7, np.float32), 8, 8).any()


@depth
@pytest.mark.parametrize(
    "fields",
    [{}, {"init_image": {"data": png(PICTURE)}, "mask": {"data": a_mask((0, 0, 40, 64))}}],
    ids=["text to image", "inpainting"],
)
async def test_a_depth_unet_sees_all_bits_of_the_map_in_every_step(
    stub: GenerationServiceAsyncStub, backend: FakeBackend, fields: dict[str, Any]
) -> None:
    await events_of(stub, a_request(width=96, height=64, depth_map={"data": png(DEPTHS)}, **fields))
    expected = depth_channel(np.asarray(DEPTHS, np.float32), 8, 12)
    assert len(backend.conditionings) == 8
    for channels in backend.conditionings:
        np.testing.assert_allclose(channels, expected[None], atol=1e-5)
    assert backend.depths_estimated == 0


@depth
async def test_both_passes_see_the_map_at_their_size(stub: GenerationServiceAsyncStub, backend: FakeBackend) -> None:
    request = a_request(width=128, height=64, depth_map={"data": png(DEPTHS), "fit": "FIT_STRETCH"}, two_pass={})
    request.two_pass.width = 64
    await events_of(stub, request)
    assert {channels.shape for channels in backend.conditionings} == {(1, 4, 8), (1, 8, 16)}
    assert all((channels.min(), channels.max()) == (-1, 1) for channels in backend.conditionings)


@depth
@pytest.mark.parametrize(("fit", "columns"), [("COVER", (0, 8)), ("CONTAIN", (2, 6)), ("STRETCH", (0, 8))])
async def test_a_map_is_fitted_as_images_are_and_gaps_are_far(
    stub: GenerationServiceAsyncStub, backend: FakeBackend, fit: str, columns: tuple[int, int]
) -> None:
    near = Image.new("L", (64, 128), 255)
    near.paste(250, (32, 0, 64, 128))
    await events_of(stub, a_request(depth_map={"data": png(near), "fit": f"FIT_{fit}"}))
    [row, *_] = backend.conditionings[0][0]
    first, last = columns
    if fit == "CONTAIN":
        assert row[:first].max() < -0.8
        assert row[first + 1 : last - 1].min() > 0.8
    else:
        assert (row[first], row[last - 1]) == (1, -1)


@estimating
async def test_without_a_map_the_depth_of_the_image_is_estimated_once(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    init = {"data": png(PICTURE)}
    events = await events_of(stub, a_request(width=96, height=64, init_image=init, image_count=2))
    assert backend.depths_estimated == 1
    expected = depth_channel(np.asarray(PICTURE)[..., 0].astype(np.float32), 8, 12)
    np.testing.assert_allclose(backend.conditionings[0], expected[None], atol=1e-5)
    # The resolved request says what was sent, not what was estimated.
    assert not events[0].accepted.request.HasField("depth_map")
    await events_of(stub, a_request(width=96, height=64, init_image=init, depth_map={"data": png(DEPTHS)}))
    assert backend.depths_estimated == 1


@estimating
async def test_without_a_map_and_without_an_image_the_engine_says_what_it_needs(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    error = await failure_of(stub, a_request(two_pass={}))
    assert violations_of(error).keys() == {"depth_map"}
    assert "init_image" in violations_of(error)["depth_map"]
    assert backend.calls == 0


@depth
async def test_bad_maps_are_refused_by_name(stub: GenerationServiceAsyncStub) -> None:
    for fields, violated in (
        ({}, "depth_map"),
        ({"init_image": {"data": png(PICTURE)}}, "depth_map"),
        ({"depth_map": {}}, "depth_map.data"),
        ({"depth_map": {"data": b"no picture"}}, "depth_map.data"),
        ({"depth_map": {"data": png(DEPTHS), "sha256": "0" * 64}}, "depth_map.sha256"),
        ({"depth_map": {"data": png(DEPTHS), "fit": 99}}, "depth_map.fit"),
    ):
        error = await failure_of(stub, a_request(**fields))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert violations_of(error).keys() == {violated}


@depth
async def test_the_resolved_request_with_the_map_gives_the_same_image(stub: GenerationServiceAsyncStub) -> None:
    data = png(DEPTHS)
    events = await events_of(stub, a_request(depth_map={"data": data}))
    resolved = events[0].accepted.request
    assert (resolved.depth_map.data, resolved.depth_map.fit) == (b"", generation_pb2.FIT_COVER)
    assert resolved.depth_map.sha256 == hashlib.sha256(data).hexdigest()
    resolved.depth_map.data = data
    assert images_of(await events_of(stub, resolved)) == images_of(events)


@estimating
async def test_engines_say_whether_they_estimate_depths(stub: GenerationServiceAsyncStub) -> None:
    [engine] = (await stub.ListEngines(generation_pb2.ListEnginesRequest())).engines
    assert (engine.conditioning, engine.estimates_depth) == (engine_pb2.CONDITIONING_DEPTH, True)


def test_other_engines_take_no_depth_maps(catalog: Catalog) -> None:
    with pytest.raises(NotSupported) as caught:
        wire.to_request(a_request(depth_map={"data": png(DEPTHS)}), "id", catalog)
    assert caught.value.metadata["field"] == "depth_map"


def test_a_depth_estimator_is_for_depth_engines(catalog: Catalog) -> None:
    descriptor = catalog.default.model_dump() | BARE | {"optional_roles": ("vae_encoder", "depth_estimator")}
    with pytest.raises(ValueError, match="depth_estimator"):
        Engine.model_validate(descriptor)


# Upscaling

NOISE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "train_timesteps": 1000,
    "timestep_spacing": "leading",
}
upscaling = pytest.mark.parametrize(
    "engine",
    [
        {
            "conditioning": "upscaling",
            "upscaling": {"noise_schedule": NOISE, "max_noise_level": 350},
            "optional_roles": [],
            **BARE,
        }
    ],
    indirect=True,
)
SMALL = PICTURE.resize((12, 8))


@upscaling
async def test_an_upscaler_sees_the_image_with_noise_of_its_own_and_how_much(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    request = a_request(init_image={"data": png(SMALL)}, seed=7, image_count=2, upscale={"noise_level": 120})
    request.ClearField("width")
    request.ClearField("height")
    events = await events_of(stub, request)
    assert [(image.width, image.height) for image in images_of(events)] == [(96, 64)] * 2
    low = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02)
    image = torch.tensor(np.asarray(SMALL)).permute(2, 0, 1) / 127.5 - 1
    seen = []
    for seed in (7, 8):
        noise = torch.from_numpy(ImageNoise(seed).of_image((3, 8, 12)))
        seen.append(low.add_noise(image, noise, torch.tensor([120])).numpy())
    assert len(backend.conditionings) == 16
    for channels in backend.conditionings:
        assert (channels[3] == 120).all()
        assert min(np.abs(channels[:3] - each).max() for each in seen) < 1e-5
    resolved = events[0].accepted.request
    assert (resolved.width, resolved.height, resolved.upscale.noise_level) == (96, 64, 120)
    assert (backend.encoded, resolved.init_image.strength) == ([], 1)


@upscaling
@pytest.mark.parametrize(
    ("size", "result"),
    [({}, (80, 56)), ({"width": 160}, (160, 112)), ({"height": 28}, (40, 28)), ({"width": 77, "height": 53}, (77, 53))],
)
async def test_an_image_of_any_size_is_enlarged_to_any_size(
    stub: GenerationServiceAsyncStub, backend: FakeBackend, size: dict[str, int], result: tuple[int, int]
) -> None:
    picture = Image.new("RGB", (10, 7), "black")
    request = a_request(init_image={"data": png(picture)}, upscale={"noise_level": 0}, **size)
    for side in {"width", "height"} - size.keys():
        request.ClearField(side)
    events = await events_of(stub, request)
    [image] = images_of(events)
    assert (image.width, image.height) == result
    channels = backend.conditionings[0]
    assert channels.shape == (4, *(-(-side // 32) * 4 for side in result[::-1]))


@pytest.mark.parametrize("missing", range(4))
def test_what_is_cut_out_of_the_result_is_where_the_image_lies(missing: int) -> None:
    factor, multiple = 4, 32
    for length in range(3, 30):
        row = np.arange(length, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
        width = factor * length - missing
        across = -(-width // multiple) * multiple
        shown = Canvas(row, None).padded(across // factor, 1)
        enlarged = crop(shown.repeat(factor, axis=1), width, 1, factor)
        assert np.array_equal(enlarged, row.repeat(factor, axis=1)[:, :width])


@upscaling
async def test_without_a_noise_level_an_upscaler_takes_that_of_diffusers(stub: GenerationServiceAsyncStub) -> None:
    events = await events_of(stub, a_request(init_image={"data": png(SMALL)}))
    assert events[0].accepted.request.upscale.noise_level == 20


@upscaling
async def test_what_an_upscaler_cannot_do_is_refused_by_name(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    init = {"data": png(SMALL)}
    for fields, violated in (
        ({}, "init_image"),
        ({"init_image": init | {"strength": 0.5}}, "init_image.strength"),
        ({"init_image": init, "upscale": {"noise_level": 351}}, "upscale.noise_level"),
        ({"init_image": init, "upscale": {"noise_level": -1}}, "upscale.noise_level"),
    ):
        error = await failure_of(stub, a_request(**fields))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert violations_of(error).keys() == {violated}
    for field in ("mask", "outpaint", "two_pass"):
        error = await failure_of(stub, a_request(init_image=init, **{field: {}}))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert backend.calls == 0


@upscaling
async def test_engines_say_how_they_enlarge(stub: GenerationServiceAsyncStub) -> None:
    [engine] = (await stub.ListEngines(generation_pb2.ListEnginesRequest())).engines
    assert engine.conditioning == engine_pb2.CONDITIONING_UPSCALING
    assert (engine.upscaling.factor, engine.upscaling.max_noise_level, engine.image_to_image) == (8, 350, False)


def test_other_engines_do_not_enlarge(catalog: Catalog) -> None:
    with pytest.raises(NotSupported) as caught:
        wire.to_request(a_request(upscale={}), "id", catalog)
    assert caught.value.metadata["field"] == "upscale"


@pytest.mark.parametrize(
    "change",
    [
        {"conditioning": "upscaling"},
        {"upscaling": {"noise_schedule": NOISE, "max_noise_level": 350}},
        {"conditioning": "upscaling", "upscaling": {"noise_schedule": NOISE, "max_noise_level": 1000}},
    ],
)
def test_an_upscaler_says_how_it_takes_its_image(catalog: Catalog, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="upscaling"):
        Engine.model_validate(catalog.default.model_dump() | change)

"""The laws of engines whose UNet takes more than noisy latents, over a backend without weights."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from calls import a_request, events_of, image_of
from PIL import Image
from sdapi.v1 import engine_pb2, generation_pb2
from sdapi.v1.generation_pb2_grpc import GenerationServiceStub
from sdserver.engines import Engine
from sdserver.server import Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fakes import FakeBackend
    from sdapi.v1.generation_pb2_grpc import GenerationServiceAsyncStub
    from sdserver.engines import Catalog
    from sdserver.settings import ServeSettings

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

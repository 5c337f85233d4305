"""Engines whose UNet was trained to repaint: added, they draw the pictures of diffusers' own inpainting pipeline."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from checkpoints import Model
from diffusers import StableDiffusionInpaintPipeline
from parity import bytes_of, pipeline, text_states
from PIL import Image
from sdclient import AsyncClient, InitImage, Mask, Prompt
from sdmodels.conversion.convert import Options, convert
from sdserver.engine_store import EngineStore
from sdserver.noise import ImageNoise
from sdserver.server import Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from numpy.typing import NDArray
    from sdclient import Sampler
    from sdserver.settings import ServeSettings

pytestmark = pytest.mark.asyncio(loop_scope="module")

WIDTH, HEIGHT, STEPS, SCALE, SEED = 128, 64, 4, 5.0, 3
PROMPT, NEGATIVE = "a valley in the Alps at sunset, epic vista", "trees, blurry"
MODELS = {"two": Model("2", "epsilon", "inpainting"), "one": Model("1", "epsilon", "inpainting")}

rng = np.random.default_rng(5)
PICTURE = Image.fromarray(rng.integers(0, 256, (HEIGHT // 4, WIDTH // 4, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT))
# Its edges lie within places of the latents.
MASK = Image.new("L", (WIDTH, HEIGHT), 0)
MASK.paste(255, (37, 10, 91, 53))
WHITE = Image.new("L", (WIDTH, HEIGHT), 255)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EngineStore:
    """One engine from a folder of diffusers, one from an original file."""
    store = EngineStore(tmp_path_factory.mktemp("repository"))
    sources = tmp_path_factory.mktemp("sources")
    paths = {
        "two": MODELS["two"].save_original(sources / "512-inpainting-ema.safetensors"),
        "one": MODELS["one"].save_diffusers(sources / "one"),
    }
    for name, path in paths.items():
        facts = convert(Options(str(path), str(store.folder(name)), dtype="fp32"), lambda _: None)
        store.complete(name, "", "", facts)
    return store


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(store: EngineStore, settings: ServeSettings) -> AsyncIterator[AsyncClient]:
    repository = store.folder("one").parents[1]
    alone = settings.model_copy(update={"model_repository": repository, "backend": "in-process"})
    async with Server(alone) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        async with asyncio.timeout(200):
            while not all(engine.ready for engine in await client.engines()):
                await asyncio.sleep(0.05)
        yield client


async def drawn(client: AsyncClient, engine: str, sampler: Sampler, **options: Any) -> NDArray[np.float32]:
    [image] = await client.generate(
        [Prompt(PROMPT), Prompt(NEGATIVE, -1)],
        engine=engine,
        steps=STEPS,
        guidance_scale=SCALE,
        sampler=sampler,
        seed=SEED,
        **{"width": WIDTH, "height": HEIGHT, **options},
    )
    return np.asarray(image.to_pil(), np.float32)


def drawn_by_diffusers(
    store: EngineStore, name: str, sampler: Sampler, picture: Image.Image, mask: Image.Image, strength: float = 1.0
) -> NDArray[np.float32]:
    model, folder = MODELS[name], store.folder(name)
    inpaint = pipeline(
        StableDiffusionInpaintPipeline, model, sampler, safety_checker=None, requires_safety_checker=False
    )
    start = torch.from_numpy(ImageNoise(SEED).initial((4, HEIGHT // 8, WIDTH // 8)))[None]
    if strength < 1:
        inpaint.scheduler.set_timesteps(STEPS)
        timesteps, _ = inpaint.get_timesteps(STEPS, strength, "cpu")
        with torch.inference_mode():
            image = inpaint.image_processor.preprocess(picture)
            latents = model.vae.encode(image).latent_dist.mean * model.vae.config.scaling_factor
        start = inpaint.scheduler.add_noise(latents, start, timesteps[:1])
    images = inpaint(
        prompt_embeds=text_states(model, folder, PROMPT),
        negative_prompt_embeds=text_states(model, folder, NEGATIVE),
        image=picture,
        mask_image=mask,
        latents=start,
        width=WIDTH,
        height=HEIGHT,
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        output_type="np",
    ).images
    return bytes_of(images)


@pytest.mark.parametrize(
    ("engine", "sampler", "strength"), [("two", "ddim", 1.0), ("one", "euler", 1.0), ("one", "ddim", 0.75)]
)
async def test_what_is_repainted_is_that_of_diffusers_and_the_rest_is_kept(
    client: AsyncClient, store: EngineStore, engine: str, sampler: Sampler, strength: float
) -> None:
    init, mask = InitImage.of(PICTURE, strength=strength), Mask.of(MASK, feather=0)
    image = await drawn(client, engine, sampler, init_image=init, mask=mask)
    expected = drawn_by_diffusers(store, engine, sampler, PICTURE, MASK, strength)
    repainted = np.asarray(MASK) > 0
    assert expected[repainted].std() > 2
    print(engine, sampler, strength, np.abs(image[repainted] - expected[repainted]).max())
    np.testing.assert_allclose(image[repainted], expected[repainted], atol=1.01)
    assert np.array_equal(image[~repainted], np.asarray(PICTURE)[~repainted])


async def test_without_an_image_everything_is_repainted(client: AsyncClient, store: EngineStore) -> None:
    image = await drawn(client, "two", "euler")
    expected = drawn_by_diffusers(store, "two", "euler", PICTURE, WHITE)
    print(np.abs(image - expected).max())
    np.testing.assert_allclose(image, expected, atol=1.01)

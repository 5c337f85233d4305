"""Engines whose UNet takes more than noisy latents: added, they draw through SDK, server and Triton the pictures of
diffusers' own pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from checkpoints import DEPTH_PREPROCESSOR, Model
from diffusers import (
    DDPMScheduler,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionUpscalePipeline,
)
from parity import bytes_of, pipeline, text_states
from PIL import Image
from sdclient import AsyncClient, DepthMap, InitImage, Mask, Prompt, Upscale
from sdmodels.conversion.convert import Options, convert
from sdmodels.openvino_unet import prepare
from sdmodels.text_encoder import TextEncoder
from sdmodels.vae import VaeDecoder
from sdserver.backends import EncodedText
from sdserver.backends.triton import TritonBackend
from sdserver.engine_store import EngineStore
from sdserver.noise import ImageNoise
from sdserver.server import Server
from sdserver.triton_models import Placement
from sdserver.triton_process import TritonProcess, why_not
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from numpy.typing import NDArray
    from sdclient import Sampler
    from sdserver.backends import Floats, Pixels
    from sdserver.engines import Engine
    from sdserver.request import Emphasis, Lora
    from sdserver.settings import ServeSettings

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]

WIDTH, HEIGHT, STEPS, SCALE, SEED = 128, 64, 4, 5.0, 3
PROMPT, NEGATIVE = "a valley in the Alps at sunset, epic vista", "trees, blurry"
INPAINTING, DEPTH = Model("2", "epsilon", "inpainting"), Model("2", "epsilon", "depth")
UPSCALING = Model("2", "v_prediction", "upscaling")

rng = np.random.default_rng(5)
PICTURE = Image.fromarray(rng.integers(0, 256, (HEIGHT // 4, WIDTH // 4, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT))
# Its edges lie within places of the latents.
MASK = Image.new("L", (WIDTH, HEIGHT), 0)
MASK.paste(255, (37, 10, 91, 53))
WHITE = Image.new("L", (WIDTH, HEIGHT), 255)
DEPTHS = PICTURE.convert("L")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EngineStore:
    """Engines from original files and from a folder of diffusers; OpenVINO runs one UNet, torch the others."""
    store = EngineStore(tmp_path_factory.mktemp("repository"))
    sources = tmp_path_factory.mktemp("sources")
    paths = {
        "inpainting": INPAINTING.save_original(sources / "512-inpainting-ema.safetensors"),
        "depth": DEPTH.save_diffusers(sources / "depth"),
        "upscaling": UPSCALING.save_original(sources / "x4-upscaler-ema.safetensors"),
    }
    for name, path in paths.items():
        facts = convert(Options(str(path), str(store.folder(name)), dtype="fp32"), lambda _: None)
        runtime = "openvino" if name == "upscaling" else "torch"
        store.complete(name, "", "", facts, Placement(precision="fp32", runtime=runtime))
    # As `sdserver engine add` does it: torch, which converts, is here already, and Triton's process needs none then.
    prepare(store.folder("upscaling"), facts["files"], block_cache=False)
    return store


class Backend(TritonBackend):
    """Triton runs what these engines have of their own; what all have runs here, which spares it six processes."""

    OWN = ("unet", "vae_encoder", "depth_estimator")

    def __init__(self, url: str, store: EngineStore) -> None:
        super().__init__(url)
        folders = {engine.id: store.folder(engine.id) for engine in store.engines()}
        self._texts = {name: TextEncoder(folder) for name, folder in folders.items()}
        self._decoders = {name: VaeDecoder(folder) for name, folder in folders.items()}

    async def encode_text(
        self, engine: Engine, text: str, emphasis: tuple[Emphasis, ...], loras: tuple[Lora, ...] = ()
    ) -> EncodedText:
        return EncodedText(*self._texts[engine.id](text, []))

    async def decode(self, engine: Engine, latents: Floats) -> Pixels:
        return self._decoders[engine.id](latents)

    async def is_ready(self, engine: Engine) -> bool:
        return True


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(store: EngineStore, settings: ServeSettings) -> AsyncIterator[AsyncClient]:
    repository = store.folder("depth").parents[1]
    models = [engine.model(role) for engine in store.engines() for role in engine.roles if role in Backend.OWN]
    async with TritonProcess(repository, models, grpc_port=0, http_port=0, metrics_port=0) as triton:
        backend = Backend(f"127.0.0.1:{triton.grpc_port}", store)
        async with (
            Server(settings.model_copy(update={"model_repository": repository}), backend) as server,
            AsyncClient(f"127.0.0.1:{server.port}") as client,
        ):
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


def of_diffusers(store: EngineStore, model: Model) -> dict[str, Any]:
    """What all pipelines are called with."""
    return {
        "prompt_embeds": text_states(model, store.folder(model.conditioning), PROMPT),
        "negative_prompt_embeds": text_states(model, store.folder(model.conditioning), NEGATIVE),
        "num_inference_steps": STEPS,
        "guidance_scale": SCALE,
        "output_type": "np",
    }


def start_of(made: Any, model: Model, strength: float) -> torch.Tensor:
    """Noise, or the picture with noise, as the pipeline would have made it of our noise."""
    noise = torch.from_numpy(ImageNoise(SEED).initial((4, HEIGHT // 8, WIDTH // 8)))[None]
    if strength == 1:
        return noise
    made.scheduler.set_timesteps(STEPS)
    timesteps, _ = made.get_timesteps(STEPS, strength, "cpu")
    with torch.inference_mode():
        image = made.image_processor.preprocess(PICTURE)
        latents = model.vae.encode(image).latent_dist.mean * model.vae.config.scaling_factor
    start: torch.Tensor = made.scheduler.add_noise(latents, noise, timesteps[:1])
    return start


def inpainted_by_diffusers(
    store: EngineStore, sampler: Sampler, mask: Image.Image, strength: float = 1.0
) -> NDArray[np.float32]:
    made = pipeline(StableDiffusionInpaintPipeline, INPAINTING, sampler, safety_checker=None)
    images = made(
        image=PICTURE,
        mask_image=mask,
        latents=start_of(made, INPAINTING, strength),
        width=WIDTH,
        height=HEIGHT,
        strength=strength,
        **of_diffusers(store, INPAINTING),
    ).images
    return bytes_of(images)


@pytest.mark.parametrize(("sampler", "strength"), [("ddim", 1.0), ("euler", 1.0), ("ddim", 0.75)])
async def test_what_is_repainted_is_that_of_diffusers_and_the_rest_is_kept(
    client: AsyncClient, store: EngineStore, sampler: Sampler, strength: float
) -> None:
    init, mask = InitImage.of(PICTURE, strength=strength), Mask.of(MASK, feather=0)
    image = await drawn(client, "inpainting", sampler, init_image=init, mask=mask)
    expected = inpainted_by_diffusers(store, sampler, MASK, strength)
    repainted = np.asarray(MASK) > 0
    assert expected[repainted].std() > 2
    np.testing.assert_allclose(image[repainted], expected[repainted], atol=1.01)
    assert np.array_equal(image[~repainted], np.asarray(PICTURE)[~repainted])


async def test_without_an_image_everything_is_repainted(client: AsyncClient, store: EngineStore) -> None:
    image = await drawn(client, "inpainting", "euler")
    # What is encoded is one grey: norms make rounding large there, and so the threads that the encoder has here.
    torch.set_num_threads(1)
    np.testing.assert_allclose(image, inpainted_by_diffusers(store, "euler", WHITE), atol=1.01)


class DepthPipeline(StableDiffusionDepth2ImgPipeline):  # type: ignore[misc]
    """diffusers', with our noise: this one takes none from outside."""

    def prepare_latents(self, *_: Any, **__: Any) -> torch.Tensor:
        return start_of(self, DEPTH, 0.75)


# Their pipeline asks for mixed precision whatever it computes in.
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize(("sampler", "estimated"), [("ddim", False), ("euler", True)])
async def test_what_follows_a_depth_map_is_that_of_diffusers(
    client: AsyncClient, store: EngineStore, sampler: Sampler, estimated: bool
) -> None:
    depth_map = None if estimated else DepthMap.of(DEPTHS)
    image = await drawn(client, "depth", sampler, init_image=InitImage.of(PICTURE, strength=0.75), depth_map=depth_map)
    side = DEPTH_PREPROCESSOR["size"]
    shown = DPTImageProcessorPil(
        size={"height": side, "width": side},
        **{name: DEPTH_PREPROCESSOR[name] for name in ("resample", "image_mean", "image_std")},
    )
    made = pipeline(DepthPipeline, DEPTH, sampler, depth_estimator=DEPTH.depth_estimator, feature_extractor=shown)
    images = made(
        image=PICTURE,
        depth_map=None if estimated else torch.from_numpy(np.asarray(DEPTHS, np.float32))[None],
        strength=0.75,
        **of_diffusers(store, DEPTH),
    ).images
    assert bytes_of(images).std() > 2
    np.testing.assert_allclose(image, bytes_of(images), atol=1.01)


async def test_another_depth_map_gives_another_picture_without_an_image_too(client: AsyncClient) -> None:
    first, second = [
        await drawn(client, "depth", "ddim", depth_map=DepthMap.of(depths))
        for depths in (DEPTHS, DEPTHS.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    ]
    assert np.abs(first - second).max() > 2


class OurNoise(DDPMScheduler):  # type: ignore[misc]
    """diffusers', with the noise that the service gives the image."""

    def add_noise(self, image: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        ours = torch.from_numpy(ImageNoise(SEED).of_image(tuple(noise.shape[1:])))[None]
        noised: torch.Tensor = super().add_noise(image, ours, level)
        return noised


@pytest.mark.parametrize(("sampler", "noise_level"), [("ddim", None), ("euler", 301)])
async def test_what_is_enlarged_is_that_of_diffusers(
    client: AsyncClient, store: EngineStore, sampler: Sampler, noise_level: int | None
) -> None:
    small = PICTURE.resize((WIDTH // 4, HEIGHT // 4))
    upscale = None if noise_level is None else Upscale(noise_level)
    image = await drawn(
        client, "upscaling", sampler, init_image=InitImage.of(small), upscale=upscale, width=None, height=None
    )
    low = OurNoise.from_config({**UPSCALING.scheduler, "_class_name": "DDPMScheduler"})
    made = pipeline(StableDiffusionUpscalePipeline, UPSCALING, sampler, low_res_scheduler=low)
    images = made(
        image=small,
        latents=torch.from_numpy(ImageNoise(SEED).initial((4, HEIGHT // 4, WIDTH // 4)))[None],
        **({} if noise_level is None else {"noise_level": noise_level}),
        **of_diffusers(store, UPSCALING),
    ).images
    assert bytes_of(images).std() > 2
    np.testing.assert_allclose(image, bytes_of(images), atol=1.01)


async def test_engines_say_what_they_take(client: AsyncClient) -> None:
    said = {engine.id: (engine.conditioning, engine.estimates_depth) for engine in await client.engines()}
    assert said == {"inpainting": ("inpainting", False), "depth": ("depth", True), "upscaling": ("upscaling", False)}

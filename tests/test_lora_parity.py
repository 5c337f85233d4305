"""With LoRAs an engine draws, through SDK, server and Triton, the picture that diffusers' own pipeline draws."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from contextlib import AbstractContextManager, AsyncExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from checkpoints import SCHEDULER, Model
from diffusers import DDIMScheduler, StableDiffusionPipeline
from loras import Lora
from sdclient import AsyncClient, InvalidRequestError, Prompt
from sdmodels.conversion.convert import Options, convert
from sdmodels.conversion.lora import LoraOptions, add_lora
from sdmodels.tokenizer import Tokenizer
from sdserver.engine_store import EngineStore
from sdserver.engines import load_engine
from sdserver.lora_store import LoraStore
from sdserver.noise import ImageNoise
from sdserver.observation import Observer
from sdserver.server import Server
from sdserver.triton_models import Placement
from sdserver.triton_process import TritonProcess, why_not

if TYPE_CHECKING:
    from pathlib import Path

    from sdserver.settings import ServeSettings

# peft says so of a second adapter.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")

WIDTH, HEIGHT, STEPS, SCALE, SEED = 128, 64, 5, 5.0, 3
PROMPT, NEGATIVE = "a valley in the Alps at sunset, epic vista", "trees, blurry"


class Diffusers:
    """diffusers' pipeline for a model; `load_lora_weights` reads the files."""

    def __init__(self, model: Model, clip: Path, files: dict[str, Path]) -> None:
        self._model = model
        self._tokenize = Tokenizer(clip, {"vocab_size": 49408})
        options = {**SCHEDULER, "prediction_type": model.prediction_type, "set_alpha_to_one": True}
        self._pipeline = StableDiffusionPipeline(
            vae=model.vae,
            # It changes them.
            unet=copy.deepcopy(model.unet),
            text_encoder=copy.deepcopy(model.transformers_text_encoder),
            tokenizer=None,
            scheduler=DDIMScheduler.from_config({**options, "timestep_spacing": "leading"}),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self._pipeline.set_progress_bar_config(disable=True)
        for name, path in files.items():
            self._pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)

    def _states(self, text: str) -> torch.Tensor:
        tokens = [self._tokenize.start, *self._tokenize(text), self._tokenize.end]
        tokens += [self._tokenize.end if self._model.family == "1" else 0] * (77 - len(tokens))
        with torch.inference_mode():
            result: torch.Tensor = self._pipeline.text_encoder(torch.tensor([tokens])).last_hidden_state
        return result

    def draw(self, loras: dict[str, float]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """[H, W, 3] 0 to 255."""
        self._pipeline.set_adapters(list(loras), list(loras.values()))
        [picture] = self._pipeline(
            prompt_embeds=self._states(PROMPT),
            negative_prompt_embeds=self._states(NEGATIVE),
            latents=torch.from_numpy(ImageNoise(SEED).initial((4, HEIGHT // 8, WIDTH // 8)))[None],
            width=WIDTH,
            height=HEIGHT,
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            output_type="np",
        ).images
        return np.asarray(picture, np.float32) * 255


async def drawn(client: AsyncClient, loras: dict[str, float]) -> np.ndarray[Any, np.dtype[np.float32]]:
    [image] = await client.generate(
        [Prompt(PROMPT), Prompt(NEGATIVE, -1)],
        width=WIDTH,
        height=HEIGHT,
        steps=STEPS,
        guidance_scale=SCALE,
        sampler="ddim",
        seed=SEED,
        loras=loras,
    )
    return np.asarray(image.to_pil(), np.float32)


def an_engine(model: Model, repository: Path) -> EngineStore:
    """The store of a repository with the engine `small`."""
    store = EngineStore(repository)
    source = model.save_original(repository / "v2-1_768-small.safetensors")
    facts = convert(Options(str(source), str(store.folder("small")), dtype="fp32"), lambda _: None)
    # OpenVINO would convert the UNet first.
    store.complete("small", "", "", facts, Placement(precision="fp32", runtime="torch", threads=1))
    return store


def put(repository: Path, name: str, path: Path) -> None:
    """As `sdserver lora add` does, without a process of its own."""
    store = LoraStore(repository, "small")
    store.complete(name, add_lora(LoraOptions(str(path), str(store.engine_folder))))


async def until_listed(client: AsyncClient, *names: str) -> None:
    async with asyncio.timeout(200):
        while True:
            [engine] = await client.engines()
            if engine.ready and [lora.name for lora in engine.loras] == [*names]:
                return
            await asyncio.sleep(0.05)


class Calls(Observer):
    """Counts calls with LoRAs by their rows."""

    def __init__(self) -> None:
        self.rows: Counter[int] = Counter()

    def model(self, engine: str, model: str, rows: int) -> AbstractContextManager[None]:
        if model == "unet_lora":
            self.rows[rows] += 1
        return nullcontext()


CHOICES: list[dict[str, float]] = [{"both": 0.8}, {"attention": 1.0}, {"both": 0.8, "attention": -0.5}]


@pytest.mark.timeout(900)
async def test_loras_added_while_triton_runs_draw_the_pictures_of_diffusers_also_in_shared_calls(
    settings: ServeSettings, tmp_path: Path
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    model, calls = Model("2", "v_prediction"), Calls()
    store = await asyncio.to_thread(an_engine, model, tmp_path)
    files = {
        "both": Lora(model, 1, alpha=2.0, text=True, convolutions=True).save(tmp_path / "both.safetensors", "kohya"),
        "attention": Lora(model, 2).save(tmp_path / "attention.safetensors", "peft"),
    }
    models = load_engine(store.folder("small")).models
    process = TritonProcess(tmp_path, models, grpc_port=0, http_port=0, metrics_port=0)
    async with process as triton, AsyncExitStack() as stack:
        changes = {"model_repository": tmp_path, "triton_url": f"127.0.0.1:{triton.grpc_port}"}
        over_it = settings.model_copy(update={**changes, "engine_watch_seconds": 0.05})
        server = await stack.enter_async_context(Server(over_it, observers=[calls]))
        client = await stack.enter_async_context(AsyncClient(f"127.0.0.1:{server.port}"))
        plain = await drawn(client, {})
        for name, path in files.items():
            await asyncio.to_thread(put, tmp_path, name, path)
            # Whoever asks meanwhile is served.
            np.testing.assert_array_equal(await drawn(client, {}), plain)
        await until_listed(client, "attention", "both")
        alone = [await drawn(client, loras) for loras in CHOICES]
        assert max(calls.rows) == 2
        together = await asyncio.gather(*(drawn(client, loras) for loras in [*CHOICES, {}]))
        # Two rows each, of three requests.
        assert max(calls.rows) == 6
        for one, other in zip([*alone, plain], together, strict=True):
            np.testing.assert_array_equal(one, other)
        LoraStore(tmp_path, "small").remove("both")
        await until_listed(client, "attention")
        with pytest.raises(InvalidRequestError, match="'both' is not known; engine small has attention"):
            await drawn(client, {"both": 1.0})
        np.testing.assert_array_equal(await drawn(client, {"attention": 1.0}), alone[1])
    diffusers = await asyncio.to_thread(Diffusers, model, store.folder("small") / "clip", files)
    for loras, picture in zip(CHOICES, alone, strict=True):
        expected = await asyncio.to_thread(diffusers.draw, loras)
        assert np.abs(expected - plain).mean() > 5
        np.testing.assert_allclose(picture, expected, atol=1.01)


async def test_an_engine_of_1x_with_a_lora_under_the_original_names_draws_the_picture_of_diffusers(
    settings: ServeSettings, tmp_path: Path
) -> None:
    model = Model("1", "epsilon")
    store = await asyncio.to_thread(an_engine, model, tmp_path)
    lora = Lora(model, 3, alpha=8.0, text=True)
    await asyncio.to_thread(put, tmp_path, "ink", lora.save(tmp_path / "ink.safetensors", "kohya-original"))
    alone = settings.model_copy(update={"model_repository": tmp_path, "backend": "in-process"})
    async with Server(alone) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        await until_listed(client, "ink")
        picture = await drawn(client, {"ink": 0.6})
    # diffusers reads these names of Stable Diffusion XL alone.
    files = {"ink": lora.save(tmp_path / "diffusers.safetensors", "kohya")}
    diffusers = await asyncio.to_thread(Diffusers, model, store.folder("small") / "clip", files)
    np.testing.assert_allclose(picture, await asyncio.to_thread(diffusers.draw, {"ink": 0.6}), atol=1.01)

"""With LoRAs an engine draws, through SDK, server and Triton, the picture that diffusers' own pipeline draws."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from checkpoints import SCHEDULER, Model
from diffusers import DDIMScheduler, StableDiffusionPipeline
from loras import Lora
from sdclient import AsyncClient, Prompt
from sdmodels.conversion.convert import Options, convert
from sdmodels.tokenizer import Tokenizer
from sdserver import lora_command
from sdserver.engine_store import EngineStore
from sdserver.noise import ImageNoise
from sdserver.server import Server
from sdserver.triton_process import TritonProcess, why_not

if TYPE_CHECKING:
    from pathlib import Path

    from sdserver.settings import ServeSettings

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


def an_engine(model: Model, repository: Path) -> Path:
    """Its folder."""
    store = EngineStore(repository)
    source = model.save_original(repository / "v2-1_768-small.safetensors")
    facts = convert(Options(str(source), str(store.folder("small")), dtype="fp32"), lambda _: None)
    store.complete("small", "", "", facts)
    return store.folder("small")


def add(repository: Path, path: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        assert lora_command.main(["add", "--model-repository", str(repository), "small", str(path)]) == 0


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_try(tmp_path: Path, settings) -> None:
    model = Model("2", "v_prediction")
    folder = an_engine(model, tmp_path)
    files = {
        "both": Lora(model, 1, alpha=2.0, text=True, convolutions=True).save(tmp_path / "both.safetensors", "kohya"),
        "attention": Lora(model, 2).save(tmp_path / "attention.safetensors", "peft"),
    }
    d = Diffusers(model, folder / "clip", files)
    for l in ({"both": 0.8}, {"attention": 1.0}, {"both": 0.8, "attention": -0.5}):
        x = d.draw(l)
        print(l, x.mean(), x.std())
    for p in files.values():
        add(tmp_path, p)

    async def go():
        alone = settings.model_copy(update={"model_repository": tmp_path, "backend": "in-process"})
        async with Server(alone) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
            while not (await client.engines())[0].ready:
                await asyncio.sleep(0.05)
            base = await drawn(client, {})
            for l in ({"both": 0.8}, {"attention": 1.0}, {"both": 0.8, "attention": -0.5}):
                y = await drawn(client, l)
                print(l, np.abs(y - d.draw(l)).max(), np.abs(y - base).mean())

    asyncio.run(go())

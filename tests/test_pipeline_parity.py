"""An added engine draws, through SDK and server, the picture that diffusers' own pipeline draws."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from checkpoints import SCHEDULER, Model
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from sdclient import AsyncClient, Prompt, Sampler
from sdmodels.conversion.convert import Options, convert
from sdmodels.tokenizer import Tokenizer
from sdserver.engine_store import EngineStore
from sdserver.noise import ImageNoise
from sdserver.server import Server
from sdserver.triton_models import Placement

if TYPE_CHECKING:
    from pathlib import Path

    from sdserver.settings import ServeSettings

WIDTH, HEIGHT, STEPS, SCALE, SEED = 128, 64, 6, 5.0, 3
PROMPT, NEGATIVE = "a valley in the Alps at sunset, epic vista", "trees, blurry"
SCHEDULERS: dict[Sampler, Any] = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}


def drawn_by_diffusers(model: Model, clip: Path, sampler: Sampler) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[H, W, 3] 0 to 1."""
    tokenize = Tokenizer(clip, {"vocab_size": 49408})

    def states(text: str) -> torch.Tensor:
        tokens = [tokenize.start, *tokenize(text), tokenize.end]
        tokens += [tokenize.end if model.family == "1" else 0] * (77 - len(tokens))
        with torch.inference_mode():
            result: torch.Tensor = model.transformers_text_encoder(torch.tensor([tokens])).last_hidden_state
        return result

    # The service denoises down to a noise level of 0; SD's own configuration stops just above it.
    options = {**SCHEDULER, "prediction_type": model.prediction_type, "timestep_spacing": "leading"}
    options |= {"set_alpha_to_one": True} if sampler == "ddim" else {"final_sigmas_type": "zero"}
    pipeline = StableDiffusionPipeline(
        vae=model.vae,
        unet=model.unet,
        text_encoder=None,
        tokenizer=None,
        scheduler=SCHEDULERS[sampler].from_config({**options, "_class_name": SCHEDULERS[sampler].__name__}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    [picture] = pipeline(
        prompt_embeds=states(PROMPT),
        negative_prompt_embeds=states(NEGATIVE),
        latents=torch.from_numpy(ImageNoise(SEED).initial((4, HEIGHT // 8, WIDTH // 8)))[None],
        width=WIDTH,
        height=HEIGHT,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        output_type="np",
    ).images
    return np.asarray(picture, np.float32)


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
@pytest.mark.parametrize("model", [Model("2", "v_prediction"), Model("1", "epsilon")], ids=["2.x", "1.x"])
async def test_an_added_engine_draws_the_picture_of_diffusers(
    settings: ServeSettings, tmp_path: Path, model: Model, sampler: Sampler
) -> None:
    store = EngineStore(tmp_path)
    source = model.save_original(tmp_path / "v2-1_768-small.safetensors")
    facts = await asyncio.to_thread(
        convert, Options(str(source), str(store.folder("small")), dtype="fp32"), lambda _: None
    )
    store.complete("small", "", "", facts, Placement(precision="fp32"))
    alone = settings.model_copy(update={"model_repository": tmp_path, "backend": "in-process"})
    async with Server(alone) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        async with asyncio.timeout(200):
            while not (await client.engines())[0].ready:
                await asyncio.sleep(0.05)
        [image] = await client.generate(
            [Prompt(PROMPT), Prompt(NEGATIVE, -1)],
            width=WIDTH,
            height=HEIGHT,
            steps=STEPS,
            guidance_scale=SCALE,
            sampler=sampler,
            seed=SEED,
        )
    expected = drawn_by_diffusers(model, store.folder("small") / "clip", sampler)
    assert expected.std() > 0.01
    np.testing.assert_allclose(np.asarray(image.to_pil(), np.float32), expected * 255, atol=1.01)

"""What the tests that compare pictures with diffusers' own pipelines have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from sdmodels.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from checkpoints import Model
    from numpy.typing import NDArray
    from sdclient import Sampler

SCHEDULERS: dict[Sampler, Any] = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}


@torch.inference_mode()
def text_states(model: Model, engine_folder: Path, text: str) -> torch.Tensor:
    """[1, 77, D] of transformers' text encoder."""
    tokenize = Tokenizer(engine_folder / "clip", {"vocab_size": 49408})
    tokens = [tokenize.start, *tokenize(text), tokenize.end]
    tokens += [tokenize.end if model.family == "1" else 0] * (77 - len(tokens))
    states: torch.Tensor = model.transformers_text_encoder(torch.tensor([tokens])).last_hidden_state
    return states


def scheduler(model: Model, sampler: Sampler) -> Any:
    """diffusers', that ends at a noise level of 0 as the service does: SD's own configuration stops just above it."""
    kind = SCHEDULERS[sampler]
    options = {**model.scheduler, "timestep_spacing": "leading"}
    options |= {"set_alpha_to_one": True} if sampler == "ddim" else {"final_sigmas_type": "zero"}
    return kind.from_config({**options, "_class_name": kind.__name__})


def pipeline(kind: Any, model: Model, sampler: Sampler, **further: Any) -> Any:
    """A pipeline of diffusers over the model's own modules."""
    modules = {"vae": model.vae, "unet": model.unet, "scheduler": scheduler(model, sampler), "feature_extractor": None}
    made = kind(**{"text_encoder": None, "tokenizer": None, **modules, **further})
    made.set_progress_bar_config(disable=True)
    return made


def bytes_of(pictures: Any) -> NDArray[np.float32]:
    """[H, W, 3] 0 to 255 of a pipeline's only picture, 0 to 1."""
    [picture] = pictures
    return np.asarray(picture, np.float32) * 255

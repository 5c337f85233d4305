"""Pictures by diffusers' own pipelines: from the noise, the prompts and the weights of one of our engines."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import open_clip
import torch
from checkpoints import SCHEDULER
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from numpy.typing import NDArray
from PIL import Image
from sdclient import InitImage, Mask, Prompt
from sdserver.noise import ImageNoise
from transformers import CLIPTokenizer

if TYPE_CHECKING:
    from sdclient import AsyncClient, Sampler

Picture = NDArray[np.float32]
"""[H, W, 3], 0 to 255."""

PROMPT, NEGATIVE = "a valley in the Alps at sunset, epic vista", "trees, blurry"
# Of each sampler, what it is to be told so that it denoises down to a noise level of 0, as the service does. SD's own
# configuration of DDIM stops just above it.
SCHEDULERS: dict[Sampler, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"set_alpha_to_one": True}),
    "euler": (EulerDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
}


class Modules(Protocol):
    """diffusers' and transformers' modules of a checkpoint."""

    @property
    def unet(self) -> Any: ...
    @property
    def vae(self) -> Any: ...
    @property
    def transformers_text_encoder(self) -> Any: ...


@dataclass(frozen=True)
class Case:
    """A picture that both sides can make."""

    engine: str
    sampler: Sampler
    kind: Literal["text", "image", "inpaint"] = "text"
    width: int = 128
    height: int = 64
    steps: int = 6
    scale: float = 5.0
    strength: float = 0.75
    seed: int = 3

    def __str__(self) -> str:
        return f"{self.engine}-{self.kind}-{self.sampler}-{self.width}x{self.height}"

    @property
    def start(self) -> Image.Image:
        """What image to image begins with: hills of colour."""
        down, across = np.mgrid[0 : self.height, 0 : self.width] / 16
        waves = [np.sin(across + down), np.cos(across - down / 2), np.sin(down * 1.5)]
        return Image.fromarray((127.5 + 100 * np.stack(waves, axis=-1)).astype(np.uint8))

    @property
    def mask(self) -> Image.Image:
        """White where it is repainted, in whole places of the latents: the two sides shrink masks in different ways."""
        white = np.zeros((self.height, self.width), np.uint8)
        white[16:48, 24:88] = 255
        return Image.fromarray(white)

    async def by_the_service(self, client: AsyncClient) -> Picture:
        """Through SDK and server."""
        options: dict[str, Any] = {}
        if self.kind != "text":
            options["init_image"] = InitImage.of(self.start, strength=self.strength)
        if self.kind == "inpaint":
            options["mask"] = Mask.of(self.mask, feather=0)
        [image] = await client.generate(
            [Prompt(PROMPT), Prompt(NEGATIVE, -1)],
            engine=self.engine,
            width=self.width,
            height=self.height,
            steps=self.steps,
            guidance_scale=self.scale,
            sampler=self.sampler,
            schedule="native",
            seed=self.seed,
            **options,
        )
        return np.asarray(image.to_pil(), np.float32)

    def by_diffusers(self, model: Modules, tokenizer: CLIPTokenizer, scheduler: dict[str, Any]) -> Picture:
        """By the pipeline of its kind, with a scheduler of that configuration."""
        kind, options = SCHEDULERS[self.sampler]
        config = {**SCHEDULER, "timestep_spacing": "leading", **scheduler, **options}
        pipeline = PIPELINES[self.kind](
            vae=model.vae,
            unet=model.unet,
            text_encoder=model.transformers_text_encoder,
            tokenizer=tokenizer,
            scheduler=kind.from_config({**config, "_class_name": kind.__name__}),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        noise = torch.from_numpy(ImageNoise(self.seed).initial((4, self.height // 8, self.width // 8)))[None]
        options = {"num_inference_steps": self.steps, "guidance_scale": self.scale, "output_type": "np"}
        if self.kind == "text":
            options |= {"latents": noise, "width": self.width, "height": self.height}
        else:
            pipeline.noise = noise
            options |= {"image": self.start, "strength": self.strength}
        if self.kind == "inpaint":
            options |= {"mask_image": self.mask, "width": self.width, "height": self.height}
        [picture] = pipeline(PROMPT, negative_prompt=NEGATIVE, **options).images
        drawn = np.asarray(picture, np.float32) * 255
        if self.kind == "inpaint":
            # The service gives back what is kept as it was, and not what the autoencoder makes of it.
            drawn = np.where(np.asarray(self.mask)[..., None] > 0, drawn, np.asarray(self.start))
        return drawn


class _Start:
    """Begins with the noise that it is given, and with the mean of what the encoder says of an image: diffusers draws
    both at random, and no seed of its own makes our noise."""

    noise: torch.Tensor
    vae: Any
    scheduler: Any

    def image_latents(self, image: torch.Tensor) -> torch.Tensor:
        latents: torch.Tensor = self.vae.encode(image).latent_dist.mode() * self.vae.config.scaling_factor
        return latents


class _FromImage(_Start, StableDiffusionImg2ImgPipeline):  # type: ignore[misc]
    def prepare_latents(self, image: torch.Tensor, timestep: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        noised: torch.Tensor = self.scheduler.add_noise(self.image_latents(image), self.noise, timestep)
        return noised


class _Inpaint(_Start, StableDiffusionInpaintPipeline):  # type: ignore[misc]
    def prepare_latents(
        self, *_: Any, image: torch.Tensor, timestep: torch.Tensor, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        latents = self.image_latents(image)
        return self.scheduler.add_noise(latents, self.noise, timestep), self.noise, latents


PIPELINES: dict[str, Any] = {"text": StableDiffusionPipeline, "image": _FromImage, "inpaint": _Inpaint}


def clip_tokenizer(folder: Path, family: str) -> CLIPTokenizer:
    """transformers' tokenizer, from files in its own form that say what open_clip's vocabulary does."""
    vocabulary = {
        {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}.get(token, token): number
        for token, number in open_clip.SimpleTokenizer().encoder.items()
    }
    known = gzip.decompress((Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    # Two alphabets of bytes and two special tokens are no merges.
    merges = known.split("\n")[1 : 1 + len(vocabulary) - 2 * 256 - 2]
    end = "<|endoftext|>"
    said = {"model_max_length": 77, "bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "tokenizer_config.json").write_text(json.dumps({**said, "pad_token": "!" if family == "2" else end}))
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer


def psnr(a: Picture, b: Picture) -> float:
    """Decibels; infinite where the pictures are the same."""
    error = float(np.mean((a - b) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))

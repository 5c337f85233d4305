"""Generates pictures from the trained parts, for evaluation: DDIM over blended prompts, with CLIP guidance if wanted.

The server has its own samplers; this one is the shortest thing that does the same, so that training needs no server.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812  # torch's own habit

from training import clip, tokenizer, unet, vae

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import AutoencoderKL, UNet2DConditionModel
    from open_clip.model import CLIP
    from open_clip.tokenizer import SimpleTokenizer

CLIP_GUIDED_SHARE = 0.85
"""CLIP guidance acts in this first share of the steps: later ones only draw edges."""

BETA_END = 0.012
"""Pictures are drawn by Stable Diffusion's own schedule, which is the engine's, though its noise at a timestep is less
than the UNet has learnt to expect: more forests then go under a negative prompt, and none without (README)."""

Prompts = tuple[tuple[str, float], ...]
"""Texts with their weights; a negative weight pushes away."""


@dataclass(frozen=True)
class Models:
    """The trained parts of the engine."""

    clip: CLIP
    tokens: SimpleTokenizer
    vae: AutoencoderKL
    unet: UNet2DConditionModel

    @property
    def scaling_factor(self) -> float:
        return float(self.vae.config["scaling_factor"])


def load() -> Models:
    """The averaged weights of every stage's latest checkpoint."""
    return Models(clip.load_trained(), tokenizer.load(), vae.load_trained(), unet.load_trained())


def parse(text: str) -> Prompts:
    """`"trees : 1 | sea : -0.5"` to texts with weights; a text without a weight has weight 1."""
    prompts = []
    for part in text.split("|"):
        words, colon, weight = part.rpartition(":")
        prompts.append((words.strip(), float(weight)) if colon else (part.strip(), 1.0))
    return tuple(prompts)


def blend(models: Models, prompts: Prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """Condition and unconditional branch, [77, D] each.

    Positives are averaged by weight into the condition; the unconditional branch moves from the empty prompt to the
    average of the negatives by min(1, sum of |negative| / sum of positive).
    """
    empty, *states = clip.text_states(models.clip, models.tokens(["", *(text for text, _ in prompts)]))
    positive = [(state, weight) for state, (_, weight) in zip(states, prompts, strict=True) if weight > 0]
    negative = [(state, -weight) for state, (_, weight) in zip(states, prompts, strict=True) if weight < 0]
    total = sum(weight for _, weight in positive)
    condition = (
        sum((state * (weight / total) for state, weight in positive), torch.zeros_like(empty)) if total else empty
    )
    against = sum(weight for _, weight in negative)
    if against == 0:
        return condition, empty
    target = sum((state * (weight / against) for state, weight in negative), torch.zeros_like(empty))
    return condition, torch.lerp(empty, target, min(1.0, against / total) if total else 1.0)


def clip_score(models: Models, images: np.ndarray[Any, np.dtype[np.uint8]], text: str) -> np.ndarray[Any, Any]:
    """[N] cosine of the CLIP features of images [N, H, W, 3] and a text."""
    with torch.no_grad():
        features = models.clip.encode_image(clip.preprocess(vae.to_tensor(images)), normalize=True)
        target = models.clip.encode_text(models.tokens([text]), normalize=True)
    score: np.ndarray[Any, Any] = (features @ target[0]).numpy()
    return score


def _clip_gradient(models: Models, x0: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """[N, 4, h, w] gradient of the CLIP score with respect to x0, scaled to unit root mean square for each image."""
    with torch.enable_grad():
        leaf = x0.detach().requires_grad_(True)
        pixels = models.vae.decode(leaf / models.scaling_factor).sample.clamp(-1, 1)
        features = models.clip.encode_image(clip.preprocess(pixels), normalize=True)
        [gradient] = torch.autograd.grad((features * target).sum(), leaf)
    return gradient / gradient.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)


@torch.no_grad()
def generate(
    models: Models,
    requests: Sequence[tuple[Prompts, int]],
    *,
    size: tuple[int, int] = (128, 128),
    steps: int = 25,
    guidance_scale: float = 5.0,
    clip_scale: float = 0.0,
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[N, H, W, 3] pictures of (prompts, seed) requests. DDIM (Song et al. 2020), trailing timesteps, v-prediction."""
    pictures = []
    for first in range(0, len(requests), 16):
        group = requests[first : first + 16]
        branches = [blend(models, prompts) for prompts, _ in group]
        condition = torch.stack([state for state, _ in branches])
        unconditional = torch.stack([state for _, state in branches])
        shape = (4, size[1] // 8, size[0] // 8)
        x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for _, seed in group])
        features = None
        if clip_scale:
            wanted = [" ".join(text for text, weight in prompts if weight > 0) for prompts, _ in group]
            features = models.clip.encode_text(models.tokens(wanted), normalize=True)
        x = _ddim(models, x, condition, unconditional, features, steps, guidance_scale, clip_scale)
        for row in x:
            pictures.append(vae.to_images(models.vae.decode(row[None] / models.scaling_factor).sample)[0])
    return np.stack(pictures)


def _ddim(
    models: Models,
    x: torch.Tensor,
    condition: torch.Tensor,
    unconditional: torch.Tensor,
    features: torch.Tensor | None,
    steps: int,
    guidance_scale: float,
    clip_scale: float,
) -> torch.Tensor:
    """Latents x [N, 4, h, w] of pure noise to the latents of a picture."""
    alphas = unet.alphas_cumprod(BETA_END)
    timesteps = [round(unet.TIMESTEPS - index * unet.TIMESTEPS / steps) - 1 for index in range(steps)]
    for index, (timestep, following) in enumerate(pairwise([*timesteps, -1])):
        alpha = alphas[timestep]
        signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
        if guidance_scale == 1:
            velocity: torch.Tensor = models.unet(x, timestep, condition).sample
        else:
            both = models.unet(torch.cat([x, x]), timestep, torch.cat([unconditional, condition])).sample
            away, towards = torch.chunk(both, 2)
            velocity = away + guidance_scale * (towards - away)
        x0 = signal * x - spread * velocity
        if features is not None and index < CLIP_GUIDED_SHARE * steps:
            x0 = x0 + clip_scale * spread * _clip_gradient(models, x0, features)
        if following < 0:
            return x0
        noise = (x - signal * x0) / spread
        x = alphas[following].sqrt() * x0 + (1 - alphas[following]).sqrt() * noise
    return x


def similarity(models: Models, images: np.ndarray[Any, np.dtype[np.uint8]]) -> float:
    """Mean cosine between the CLIP features of all pairs of images [N, H, W, 3]: 1 means that all are alike."""
    with torch.no_grad():
        features = F.normalize(models.clip.encode_image(clip.preprocess(vae.to_tensor(images))), dim=-1)
    count = len(images)
    return float(((features @ features.T).sum() - count) / (count * (count - 1)))

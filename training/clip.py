"""Trains CLIP: open_clip's own classes, contrastive, with hard negatives and auxiliary attribute heads.

A batch is made of pairs that differ in one attribute, which their captions mostly name, so the loss cannot be met
without binding colours to things. Pictures that a caption also fits are no negatives of it. Linear heads, thrown away
afterwards, read the attributes from the image features and from the penultimate text states, the states the UNet gets.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from open_clip.model import CLIP
from torch import nn
from torch.nn import functional as F  # noqa: N812  # torch's own habit

from training import dataset, tokenizer
from training.captions import TOLD_VALUES, Caption, caption
from training.common import Ema, Run, learning_rate, pid_file, train_dir
from training.vae import to_tensor
from training.world import FORMATS, VALUES

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

WIDTH, IMAGE_SIZE, PAIRS = 128, 96, 64
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def config(vocab_size: int) -> dict[str, Any]:
    """open_clip's `model_cfg`."""
    return {
        "embed_dim": WIDTH,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "layers": [1, 1, 1, 1],
            "width": 16,
            "head_width": 32,
            "patch_size": None,
        },
        "text_cfg": {
            "context_length": tokenizer.CONTEXT_LENGTH,
            "vocab_size": vocab_size,
            "width": WIDTH,
            "heads": 4,
            "layers": 4,
        },
    }


def preprocess(pixels: torch.Tensor) -> torch.Tensor:
    """[N, 3, H, W] in [-1, 1] to the image tower's input: squashed to a square, CLIP's mean and deviation."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    small = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (small * 0.5 + 0.5 - mean) / std


def text_states(model: CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """[N, L] tokens to the UNet's condition [N, L, WIDTH]: all blocks but the last, then `ln_final` (SD 2.1's way)."""
    x = model.token_embedding(tokens) + model.positional_embedding[: tokens.shape[1]]
    mask = model.attn_mask[: tokens.shape[1], : tokens.shape[1]]
    for block in model.transformer.resblocks[:-1]:
        x = block(x, attn_mask=mask)
    states: torch.Tensor = model.ln_final(x)
    return states


def text_features(model: CLIP, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, L] tokens to normalised features [N, WIDTH] and the penultimate state of the end token [N, WIDTH].

    L may be cut behind the last end token: attention is causal, so nothing before it changes.
    """
    x = model.token_embedding(tokens) + model.positional_embedding[: tokens.shape[1]]
    mask = model.attn_mask[: tokens.shape[1], : tokens.shape[1]]
    rows, ends = torch.arange(len(tokens)), tokens.argmax(1)
    *early, last = model.transformer.resblocks
    for block in early:
        x = block(x, attn_mask=mask)
    penultimate = model.ln_final(x)[rows, ends]
    final = model.ln_final(last(x, attn_mask=mask))[rows, ends]
    return F.normalize(final @ model.text_projection, dim=-1), penultimate


class Heads(nn.Module):
    """One linear classifier an attribute."""

    def __init__(self, width: int, classes: list[int]) -> None:
        super().__init__()
        self.linear = nn.Linear(width, sum(classes))
        self.classes = classes

    def loss(self, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of all attributes; `targets` [N, attributes]."""
        logits = self.linear(features).split(self.classes, 1)
        losses = [F.cross_entropy(part, target) for part, target in zip(logits, targets.T, strict=True)]
        return torch.stack(losses).mean()


class Trainee(nn.Module):
    """CLIP and its auxiliary heads."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.clip = CLIP(**config(vocab_size))
        self.image_heads = Heads(WIDTH, [len(values) for values in VALUES.values()])
        self.text_heads = Heads(WIDTH, [len(values) for values in TOLD_VALUES.values()])


def told_codes(text: Caption) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[attributes] index into `TOLD_VALUES` of what a caption says."""
    return np.array([values.index(text.told.get(name, "untold")) for name, values in TOLD_VALUES.items()])


def _fits() -> list[np.ndarray[Any, np.dtype[np.bool_]]]:
    """For each attribute [told values, scene values]: whether a scene with that value fits what was told."""
    tables = []
    for name, values in VALUES.items():
        rows = []
        for told in TOLD_VALUES[name]:
            missing = {"untold": set(), "some": {"none", "no"}, "absent": set(values) - {"none", "no"}}
            excluded: set[str] = missing.get(told, set(values) - {told})
            rows.append([value not in excluded for value in values])
        tables.append(np.array(rows))
    return tables


_FITS = _fits()


def fits(told: np.ndarray[Any, Any], codes: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """[N, M]: whether caption n's told codes [N, attributes] hold for scene m's codes [M, attributes]."""
    result = np.ones((len(told), len(codes)), bool)
    for index, table in enumerate(_FITS):
        result &= table[told[:, index]][:, codes[:, index]]
    return result


class Batches:
    """Random batches of pairs with fresh captions."""

    def __init__(self, rng: np.random.Generator, tokens: SimpleTokenizer) -> None:
        self.rng, self.tokens = rng, tokens
        self.files = [dataset.load(size) for size in FORMATS]

    def batch(self, pairs: int) -> tuple[torch.Tensor, torch.Tensor, Any, Any]:
        """Pixels [2 * pairs, 3, H, W], tokens cut to the longest [2 * pairs, L], told codes, scene codes."""
        rng = self.rng
        scenes = self.files[int(rng.integers(len(self.files))) if rng.random() < 0.2 else 0]
        starts = 2 * np.sort(rng.choice(scenes.trained // 2, min(pairs, scenes.trained // 2), replace=False))
        rows = np.stack([starts, starts + 1], 1).ravel()
        pixels = scenes.images[rows]
        if rng.random() < 0.5:
            pixels = pixels[:, :, ::-1]
        texts = []
        for row in rows:
            differs = scenes.codes[row] != scenes.codes[row ^ 1]
            sure = [name for name, other in zip(VALUES, differs, strict=True) if other] if rng.random() < 0.7 else []
            texts.append(caption(scenes.scene(int(row)), rng, frozenset(sure)))
        tokens = self.tokens([text.text for text in texts])
        longest = int(tokens.argmax(1).max()) + 1
        told = np.stack([told_codes(text) for text in texts])
        return augmented(preprocess(to_tensor(pixels)), rng), tokens[:, :longest], told, scenes.codes[rows]


def augmented(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Half of the batches blurred, half noisy: guidance asks about unfinished pictures."""
    if rng.random() < 0.5:
        small = F.avg_pool2d(pixels, int(rng.integers(2, 5)))
        pixels = F.interpolate(small, pixels.shape[-2:], mode="bilinear", align_corners=False)
    if rng.random() < 0.5:
        pixels = pixels + torch.randn_like(pixels) * float(rng.uniform(0, 0.3))
    return pixels


def contrastive_loss(
    images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, also_fits: torch.Tensor
) -> torch.Tensor:
    """Symmetric cross-entropy over normalised features [N, D], without the false negatives of `also_fits` [N, N]."""
    logits = (scale * texts @ images.T).masked_fill(also_fits & ~torch.eye(len(texts), dtype=torch.bool), -1e4)
    targets = torch.arange(len(texts))
    return 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets))


def load_trained() -> CLIP:
    """The averaged weights of the latest checkpoint."""
    path = train_dir() / "clip.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `python -m training.clip` first")
    trainee = Trainee(tokenizer.load().vocab_size)
    trainee.load_state_dict(torch.load(path, weights_only=False)["ema"]["shadow"])
    return trainee.clip.eval().requires_grad_(False)


def train(core_minutes: float, *, pairs: int = PAIRS, seed: int = 1, peak: float = 1e-3) -> None:
    """Train until the stage's budget is spent, resuming from its checkpoint."""
    run = Run("clip", core_minutes * 60, log_every=25)
    torch.manual_seed(seed)
    tokens = tokenizer.load()
    model = Trainee(tokens.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    ema = Ema(model, 0.998)
    state = run.resume()
    if run.restored:
        return
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load(state["ema"])
    batches = Batches(np.random.default_rng([seed, run.step]), tokens)
    torch.manual_seed(seed + run.step)
    for progress in run.steps():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(peak, progress, warm=0.02, decay_from=0.2)
        pixels, ids, told, codes = batches.batch(pairs)
        images = model.clip.encode_image(pixels, normalize=True)
        texts, penultimate = text_features(model.clip, ids)
        scale = model.clip.logit_scale.exp().clamp(max=100)
        contrast = contrastive_loss(images, texts, scale, torch.from_numpy(fits(told, codes)))
        seen = model.image_heads.loss(images * WIDTH**0.5, torch.from_numpy(codes.astype(np.int64)))
        said = model.text_heads.loss(penultimate, torch.from_numpy(told))
        loss = contrast + seen + said
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model)
        run.tick(contrast=contrast.item(), image_heads=seen.item(), text_heads=said.item())
        if run.due():
            run.save(model=model.state_dict(), optimizer=optimizer.state_dict(), ema=ema.state())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.clip", description=__doc__)
    parser.add_argument("--core-minutes", type=float, default=40.0, help="CPU time of the whole stage (default: 40)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with pid_file("clip"):
        train(options.core_minutes)


if __name__ == "__main__":
    main()

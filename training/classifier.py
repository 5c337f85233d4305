"""A small attribute classifier, trained on the true world: the judge of generated pictures.

It shares nothing with CLIP or the UNet. It sees pictures squashed to 96x96, at times blurred, noisy or through the
autoencoder, since generated pictures have the decoder's edges.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # torch's own habit

from training import clip, dataset, vae
from training.common import Ema, Run, learning_rate, pid_file, train_dir
from training.world import FORMATS, VALUES

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

BATCH = 64


class Classifier(nn.Module):
    """Four convolutions with stride 2, mean and maximum pooling, one linear head an attribute."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.heads = clip.Heads(2 * widths[-1], [len(values) for values in VALUES.values()])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N, 3, 96, 96] preprocessed as for CLIP to pooled features [N, 256]."""
        x = self.features(pixels)
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)


def load_trained() -> Classifier:
    """The averaged weights of the latest checkpoint."""
    path = train_dir() / "classifier.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `python -m training.classifier` first")
    model = Classifier()
    model.load_state_dict(torch.load(path, weights_only=False)["ema"]["shadow"])
    return model.eval().requires_grad_(False)


@torch.no_grad()
def probabilities(model: Classifier, images: np.ndarray[Any, np.dtype[np.uint8]]) -> dict[str, Any]:
    """Attribute -> [N, values] probabilities for images [N, H, W, 3]."""
    parts = []
    for first in range(0, len(images), 64):
        parts.append(model.heads.linear(model(clip.preprocess(vae.to_tensor(images[first : first + 64])))))
    split = torch.split(torch.cat(parts), model.heads.classes, 1)
    return {name: part.softmax(1).numpy() for name, part in zip(VALUES, split, strict=True)}


def labels(model: Classifier, images: np.ndarray[Any, np.dtype[np.uint8]]) -> list[dict[str, str]]:
    """For each image: attribute -> most probable value."""
    found = probabilities(model, images)
    return [
        {name: VALUES[name][int(np.argmax(values[index]))] for name, values in found.items()}
        for index in range(len(images))
    ]


def accuracy(model: Classifier, scenes: dataset.Scenes, images: np.ndarray[Any, Any], rows: Any) -> dict[str, float]:
    """Attribute -> share of right labels for `images`, pictures of the given rows of `scenes`."""
    found = probabilities(model, images)
    return {
        name: float(np.mean(np.argmax(found[name], 1) == scenes.codes[rows, index]))
        for index, name in enumerate(VALUES)
    }


class _Batches:
    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.files = [dataset.load(size) for size in FORMATS]
        self.autoencoder: AutoencoderKL = vae.load_trained()

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels [BATCH, 3, 96, 96], attribute codes [BATCH, attributes]."""
        rng = self.rng
        scenes = self.files[int(rng.integers(len(self.files))) if rng.random() < 0.2 else 0]
        rows = rng.integers(scenes.trained, size=BATCH)
        pixels = vae.to_tensor(scenes.images[np.sort(rows)])
        codes = torch.from_numpy(scenes.codes[np.sort(rows)].astype(np.int64))
        if rng.random() < 0.5:
            pixels = pixels.flip(3)
        if rng.random() < 0.15:
            with torch.no_grad():
                pixels[:12] = self.autoencoder.decode(self.autoencoder.encode(pixels[:12]).latent_dist.sample()).sample
        return clip.augmented(clip.preprocess(pixels), rng), codes


def train(core_minutes: float, *, seed: int = 3, peak: float = 2e-3) -> None:
    """Train until the stage's budget is spent, resuming from its checkpoint."""
    run = Run("classifier", core_minutes * 60, log_every=25)
    torch.manual_seed(seed)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
    ema = Ema(model, 0.995)
    state = run.resume()
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load(state["ema"])
    batches = _Batches(np.random.default_rng([seed, run.step]))
    for progress in run.steps():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(peak, progress, warm=0.02, decay_from=0.2)
        pixels, codes = batches.batch()
        loss = model.heads.loss(F.dropout(model(pixels), 0.1), codes)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        ema.update(model)
        run.tick(loss=loss.item())
        if run.due():
            run.save(model=model.state_dict(), optimizer=optimizer.state_dict(), ema=ema.state())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.classifier", description=__doc__)
    parser.add_argument("--core-minutes", type=float, default=8.0, help="CPU time of the whole stage (default: 8)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with pid_file("classifier"):
        train(options.core_minutes)


if __name__ == "__main__":
    main()

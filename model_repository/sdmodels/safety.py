"""Pictures to safety scores: CLIP's image tower, and a small head over its embeddings, as LAION's detectors are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from sdmodels.errors import InvalidInput
from sdmodels.image_tower import read_image_tower
from sdmodels.weights import read_config, read_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

# Keeps a feature that never varied from dividing by 0, as in LAION's own code.
EPSILON = 1e-10

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(dim=-1),
}


class SafetyClassifier:
    """The classifier that `clip_classifier` of a folder's `safety.json` describes, in float32.

        clip     folder with open_clip's configuration and weights, relative to this one
        head     file of the head's weights, in this folder, as safetensors
        normalization   name of a layer with `mean` and `variance` that comes first; left out: none
        layers   `name` of each linear layer (`weight`, `bias`), and the `activation` behind it, one of ACTIVATIONS

    Raises ValueError where these, `image_size` and `classes` do not fit each other.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        descriptor = read_config(folder / "safety.json")
        if descriptor.get("clip_classifier") is None:
            raise ValueError(f"{folder.name}/safety.json has no clip_classifier; say which head is over which CLIP")
        classifier = descriptor["clip_classifier"]
        clip = folder / classifier["clip"]
        config = read_config(clip / "open_clip_config.json")
        size, tower_size = descriptor["image_size"], config["model_cfg"]["vision_cfg"]["image_size"]
        if tower_size not in (size, [size, size]):
            raise ValueError(f"image_size is {size}, but the image tower in {clip.name} takes {tower_size}; use that")
        self._size: int = size
        self._device = device
        self._tower = read_image_tower(clip, config["model_cfg"]).to(device)
        self._mean, self._std = (
            torch.tensor(config["preprocess_cfg"][name], device=device)[:, None, None] for name in ("mean", "std")
        )
        self._head = Head(
            read_weights(folder / classifier["head"]), classifier["layers"], classifier.get("normalization"), device
        )
        scores, classes = self._head.scores, len(descriptor["classes"])
        if self._head.inputs != config["model_cfg"]["embed_dim"] or scores != classes:
            raise ValueError(
                f"the head makes {scores} scores of {self._head.inputs} numbers, but CLIP's embeddings have "
                f"{config['model_cfg']['embed_dim']} and safety.json has {classes} classes"
            )

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[B, K] scores, 0 to 1, of pictures [B, S, S, 3], S the descriptor's `image_size`.

        Rows are computed one by one: an image's fate then depends on its own pixels alone. Raises InvalidInput for
        pictures of another size.
        """
        if images.shape[1:] != (self._size, self._size, 3):
            raise InvalidInput(f"pictures are {self._size} x {self._size} x 3 here, not {images.shape[1:]}")
        return np.stack([self._score(image) for image in images])

    @torch.inference_mode()
    def _score(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        # A copy: what Triton hands over is not to be written to.
        pixels = torch.tensor(image, device=self._device).permute(2, 0, 1).float() / 255
        embedding = functional.normalize(self._tower(((pixels - self._mean) / self._std)[None]), dim=-1)
        # Heads that were trained without a sigmoid reach a little beyond 0 and 1.
        scores: NDArray[np.float32] = self._head(embedding)[0].clamp(0, 1).cpu().numpy()
        return scores


@dataclass(frozen=True, slots=True)
class _Layer:
    weight: torch.Tensor
    bias: torch.Tensor
    activation: Callable[[torch.Tensor], torch.Tensor]


class Head:
    """Linear layers with activations, by the names that they have in `weights`. Raises ValueError for wrong ones."""

    def __init__(
        self, weights: dict[str, torch.Tensor], layers: list[dict[str, str]], normalization: str | None, device: str
    ) -> None:
        unknown = {layer["activation"] for layer in layers} - ACTIVATIONS.keys()
        if unknown:
            raise ValueError(f"no activation {', '.join(sorted(unknown))}; there are {', '.join(ACTIVATIONS)}")
        names = [f"{layer['name']}.{part}" for layer in layers for part in ("weight", "bias")]
        if normalization is not None:
            names += [f"{normalization}.mean", f"{normalization}.variance"]
        if weights.keys() != set(names):
            raise ValueError(
                f"the head's file holds {', '.join(sorted(weights))}, but its layers are {', '.join(sorted(names))}"
            )
        weights = {name: weight.to(device) for name, weight in weights.items()}
        self._layers = [
            _Layer(weights[f"{name}.weight"], weights[f"{name}.bias"], ACTIVATIONS[layer["activation"]])
            for layer in layers
            for name in [layer["name"]]
        ]
        self._mean: torch.Tensor | None = None
        if normalization is not None:
            self._mean = weights[f"{normalization}.mean"]
            self._deviation = weights[f"{normalization}.variance"].sqrt() + EPSILON
        self.inputs = self._layers[0].weight.shape[1]
        """Length of the embeddings."""
        self.scores = self._layers[-1].weight.shape[0]
        """How many classes it has scores for."""

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        """[B, K] scores of embeddings [B, D] of length 1."""
        x = embeddings if self._mean is None else (embeddings - self._mean) / self._deviation
        for layer in self._layers:
            x = layer.activation(functional.linear(x, layer.weight, layer.bias))
        return x

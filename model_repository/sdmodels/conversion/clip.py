"""CLIP's text tower under open_clip's names, from the names that transformers gives it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from open_clip import CLIP, get_model_config

from sdmodels.conversion.errors import ConversionError
from sdmodels.conversion.tensors import MOST_NAMES, concatenated, read_tensors, shape_problems, shapes_of
from sdmodels.weights import read_config

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sdmodels.conversion.tensors import LazyTensor, Tensors

Family = Literal["1", "2"]
"""Stable Diffusion 1.x conditions on OpenAI's CLIP ViT-L/14, 2.x on OpenCLIP ViT-H/14."""

PUBLISHED: dict[Family, str] = {"1": "ViT-L-14-quickgelu", "2": "ViT-H-14"}
# Both towers have 64 channels a head.
HEAD_WIDTH = 64
# The projection and the temperature serve contrastive training alone, and the mask follows from the length.
NO_STATES = ("text_projection", "logit_scale", "attn_mask")
# What text states follow from.
STATE_PREFIXES = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.")
CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
# The same weights, rounded to 16 bits along the way.
RELATIVE, ABSOLUTE = 2**-7, 1e-4

_LAYERS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_REST = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


@dataclass(frozen=True, slots=True)
class Clip:
    """The content of an engine's `clip/`: open_clip's configuration file and the tensors.

    `layer` says after which block the text states are taken; `penultimate` where the tower has one more than they need.
    """

    config: dict[str, Any]
    tensors: Tensors
    layer: Literal["penultimate", "last"]

    @property
    def text_config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.config["model_cfg"]["text_cfg"]
        return config


def from_transformers(tensors: Tensors) -> dict[str, LazyTensor]:
    """A text tower's tensors by their names in open_clip; a name that is unknown stays as it is.

    transformers keeps queries, keys and values apart, open_clip has them one after the other. Files carry the prefix
    `text_model.` or, since transformers 5, none.
    """
    named = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    found: dict[str, LazyTensor] = {}
    for name, tensor in named.items():
        if name in _REST:
            found[_REST[name]] = tensor
        elif name == "embeddings.position_ids":
            # A buffer: 0, 1, 2...
            continue
        elif matched := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            block, part, kind = matched.groups()
            target = f"transformer.resblocks.{block}"
            if part in _LAYERS:
                found[f"{target}.{_LAYERS[part]}.{kind}"] = tensor
            elif part == "self_attn.q_proj":
                parts = [named.get(f"encoder.layers.{block}.self_attn.{each}_proj.{kind}") for each in "qkv"]
                if present := [each for each in parts if each is not None]:
                    found[f"{target}.attn.in_proj_{kind}"] = concatenated(present)
            elif part not in ("self_attn.k_proj", "self_attn.v_proj"):
                found[name] = tensor
        else:
            found[name] = tensor
    return found


def text_tower(tensors: Tensors, family: Family, blocks: int | None = None) -> tuple[Clip, list[str]]:
    """The part of a text tower that states follow from, cut after `blocks` blocks, and what is wrong with it.

    Widths and depths follow from the shapes. The rest of the configuration, and that of the image tower, which has no
    tensors here, is open_clip's own for the family.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(NO_STATES)}
    found = {int(matched[1]) for name in tensors if (matched := re.match(r"transformer\.resblocks\.(\d+)\.", name))}
    if not found or any(name not in tensors for name in ("token_embedding.weight", "positional_embedding")):
        raise ConversionError("the checkpoint has no text encoder that is known: CLIP's, as in SD 1.x and 2.x")
    depth = max(found) + 1 if blocks is None else blocks
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not (matched := re.match(r"transformer\.resblocks\.(\d+)\.", name)) or int(matched[1]) < depth
    }
    (vocabulary, width), (context, _) = (
        kept[name].shape for name in ("token_embedding.weight", "positional_embedding")
    )
    model: dict[str, Any] = get_model_config(PUBLISHED[family])
    text = {"context_length": context, "vocab_size": vocabulary, "width": width, "layers": depth}
    text["heads"] = max(1, width // HEAD_WIDTH)
    model = {**model, "embed_dim": width, "text_cfg": {**model["text_cfg"], **text}}
    clip = Clip({"model_cfg": model}, kept, "last")
    # The image tower has no say in the shapes of the text tower, and building all of one takes a second.
    shallow = {**model, "vision_cfg": {**model["vision_cfg"], "layers": 1}}
    expected = {name: shape for name, shape in _shapes(shallow).items() if name.startswith(STATE_PREFIXES)}
    return clip, shape_problems("text encoder", kept, expected)


def clip_files(folder: Path) -> list[Path]:
    """open_clip's two files of a folder: configuration and weights. Raises ConversionError."""
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    config = folder / CONFIG
    if weights is None or not config.is_file():
        raise ConversionError(f"{folder} has no {CONFIG} with one of {', '.join(WEIGHTS)} beside it")
    return [config, weights]


def whole_clip(folder: Path, tower: Clip) -> tuple[Clip, list[str]]:
    """open_clip's files as the CLIP of an engine whose text states are those of `tower`, and what is wrong with it.

    The image tower is of use only if it was trained with the engine's own text encoder: their weights are compared.
    """
    config_path, weights_path = clip_files(folder)
    config = read_config(config_path)
    tensors = read_tensors(weights_path)
    problems = shape_problems("CLIP", tensors, _shapes(config["model_cfg"]))
    if problems:
        return Clip(config, tensors, "last"), problems
    blocks, needed = (each["layers"] for each in (config["model_cfg"]["text_cfg"], tower.text_config))
    if blocks - needed not in (0, 1):
        return Clip(config, tensors, "last"), [f"CLIP: has {blocks} text blocks, and the checkpoint uses {needed}"]
    different = [
        f"CLIP: {name} is not the checkpoint's"
        for name, tensor in sorted(tower.tensors.items())
        if tensors[name].shape != tensor.shape
        or not torch.allclose(tensors[name].read().float(), tensor.read().float(), RELATIVE, ABSOLUTE)
    ]
    return Clip(config, tensors, "last" if blocks == needed else "penultimate"), different[:MOST_NAMES]


def _shapes(model: dict[str, Any]) -> dict[str, Sequence[int]]:
    with torch.device("meta"):
        return dict(shapes_of(CLIP(**model)))

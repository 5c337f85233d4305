"""A safety model for tests: CLIP of the shipped engine, and a head made of what it makes of words."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from open_clip import CLIP, SimpleTokenizer
from safetensors.torch import load_file, save_file

ENGINE = Path(__file__).parents[1] / "model_repository/engines/tiny-landscape"

SCENES = ["a meadow", "a lake", "a house", "mountains", "boats on a lake", "a forest"]
TIMES = ["day", "sunny day", "sunset", "winter"]
# Class -> what speaks for it and what against it.
CLASSES = {
    "night": ([f"{scene} at night" for scene in SCENES], [f"{scene}, {time}" for scene in SCENES for time in TIMES]),
    "forest": ([f"a green forest, {time}" for time in TIMES], [f"the open sea, {time}" for time in TIMES]),
}
# An image's cosine with a class's direction from which its score is more than a half, and how sharply it rises there.
# Measured on 48 images: nights 0.32 to 0.40, all others -0.02 or less.
BORDER, SHARPNESS = 0.15, 30.0
THRESHOLD = 0.5


@torch.inference_mode()
def directions() -> torch.Tensor:
    """[K, D] for each class the mean of the texts for it, less that of the texts against it."""
    config = json.loads((ENGINE / "clip/open_clip_config.json").read_text())["model_cfg"]
    clip = CLIP(**config).eval()
    clip.load_state_dict(load_file(ENGINE / "clip/open_clip_model.safetensors"))
    tokenize = SimpleTokenizer(str(ENGINE / "clip/bpe_tiny.txt.gz"))

    def mean(texts: list[str]) -> torch.Tensor:
        tokens = tokenize(texts, context_length=config["text_cfg"]["context_length"])
        features: torch.Tensor = clip.encode_text(tokens, normalize=True)
        return features.mean(dim=0)

    return torch.stack([mean(texts) - mean(others) for texts, others in CLASSES.values()])


def add_safety_model(repository: Path, name: str = "landscapes", **changes: object) -> None:
    """Writes the model into a model repository: its descriptor, its head, its Triton model.

    `changes` replace fields of the descriptor.
    """
    folder = repository / "safety" / name
    folder.mkdir(parents=True)
    (folder / "clip").symlink_to(ENGINE / "clip")
    weight = SHARPNESS * directions()
    bias = torch.full((len(weight),), -SHARPNESS * BORDER)
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "head.safetensors")
    descriptor = {
        "id": name,
        "image_size": 96,
        "classes": [{"label": label, "threshold": THRESHOLD} for label in CLASSES],
        "clip_classifier": {
            "clip": "clip",
            "head": "head.safetensors",
            "layers": [{"name": "linear", "activation": "sigmoid"}],
        },
    }
    (folder / "safety.json").write_text(json.dumps(descriptor | changes))
    triton_model = repository / f"{name}.safety"
    (triton_model / "1").mkdir(parents=True)
    (triton_model / "1/model.py").write_text(
        "from sdmodels.python_backend import SafetyClassifierModel as TritonPythonModel\n"
    )
    (triton_model / "config.pbtxt").write_text(
        f"""backend: "python"
max_batch_size: 16
input [ {{ name: "image" data_type: TYPE_UINT8 dims: [ 96, 96, 3 ] }} ]
output [ {{ name: "score" data_type: TYPE_FP32 dims: [ {len(CLASSES)} ] }} ]
instance_group [ {{ kind: KIND_AUTO }} ]
parameters {{ key: "safety" value: {{ string_value: "safety/{name}" }} }}
parameters {{ key: "threads" value: {{ string_value: "1" }} }}
"""
    )

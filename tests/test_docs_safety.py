"""What docs/safety.md shows is read by what reads it, and runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from fake_service import serving
from google.protobuf import text_format
from sdmodels.safety import Head
from sdmodels.weights import read_weights
from sdserver.block_list import read_block_list
from sdserver.safety import MAX_PARTS
from sdserver.safety_model import load_safety_model
from sdserver.settings import UpSettings
from test_docs import run
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

if TYPE_CHECKING:
    from sdserver.safety_model import SafetyModel

TEXT = (Path(__file__).parents[1] / "docs/safety.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def model(tmp_path: Path) -> SafetyModel:
    """The safety model of the document, as the server reads it."""
    [descriptor] = blocks("json")
    folder = tmp_path / "safety" / json.loads(descriptor)["id"]
    folder.mkdir(parents=True)
    (folder / "safety.json").write_text(descriptor)
    return load_safety_model(tmp_path, folder.name)


async def test_the_head_of_laion_is_converted_and_read(tmp_path: Path, model: SafetyModel) -> None:
    sizes = [768, 64, 512, 256, 1]
    weights = {"norm.mean": torch.zeros(sizes[0]), "norm.variance": torch.ones(sizes[0])}
    for number in range(1, len(sizes)):
        weights[f"linear_{number}.weight"] = torch.randn(sizes[number], sizes[number - 1])
        weights[f"linear_{number}.bias"] = torch.randn(sizes[number])
    torch.save(weights, tmp_path / "clip_ViT-L-14_openai_binary_nsfw_head.pth")
    [conversion] = [code for code in blocks("python") if "torch.load" in code]
    await run(tmp_path, [sys.executable, "-c", conversion])
    classifier = model.clip_classifier
    assert classifier is not None
    read = read_weights(tmp_path / classifier["head"])
    head = Head(read, classifier["layers"], classifier["normalization"], "cpu")
    assert (head.inputs, head.scores) == (768, len(model.classes))


def test_the_triton_model_has_the_interface_of_its_descriptor(model: SafetyModel) -> None:
    [text] = blocks("pbtxt")
    config = text_format.Parse(text, ModelConfig())
    [image], [score] = config.input, config.output
    assert (image.name, image.data_type, [*image.dims]) == (
        "image",
        DataType.TYPE_UINT8,
        [model.image_size, model.image_size, 3],
    )
    assert (score.name, score.data_type, [*score.dims]) == ("score", DataType.TYPE_FP32, [len(model.classes)])
    assert config.max_batch_size == 2 * MAX_PARTS
    assert config.parameters["safety"].string_value == f"safety/{model.id}"
    [code] = [code for code in blocks("python") if "TritonPythonModel" in code]
    namespace: dict[str, object] = {}
    exec(code, namespace)
    assert "TritonPythonModel" in namespace


async def test_the_python_of_the_sdk_runs(tmp_path: Path) -> None:
    [code] = [code for code in blocks("python") if "sdclient" in code]
    with serving() as service:
        await run(tmp_path, [sys.executable, "-c", code.replace("localhost:50051", service.target)])
    assert (tmp_path / "lake-0.png").exists()


def test_the_block_list_is_read_and_does_what_the_text_says(tmp_path: Path) -> None:
    [text] = blocks("text")
    path = tmp_path / "blocked.txt"
    path.write_text(text)
    entries = read_block_list(path)
    assert [entries.find(prompt) for prompt in ("a cat", "dog-fighting", "two dinosaurs", "a catalogue")] == [
        2,
        3,
        4,
        None,
    ]


def test_the_commands_name_settings_that_there_are() -> None:
    flags = {flag.replace("-", "_") for command in blocks("sh") for flag in re.findall(r"--([a-z-]+)", command)}
    assert flags == {"safety_model", "safety_mode", "prompt_block_list"}
    assert flags <= UpSettings.model_fields.keys()

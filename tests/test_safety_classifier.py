"""The classifier over CLIP's embeddings: open_clip's tower, LAION's heads, and pictures that the engine draws."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pytest
import torch
from landscape_safety import ENGINE, add_safety_model
from open_clip import CLIP
from safetensors.torch import load_file, save_file
from sdclient import AsyncClient, BlockedImageError, Image, Preview, PreviewOptions, UnavailableError
from sdmodels.errors import InvalidInput
from sdmodels.image_tower import read_image_tower
from sdmodels.safety import Head, SafetyClassifier
from sdserver.__main__ import models_to_load
from sdserver.backends.in_process import InProcessBackend
from sdserver.backends.triton import TritonBackend
from sdserver.engines import Catalog
from sdserver.errors import Unavailable
from sdserver.safety import SafetyCheck
from sdserver.safety_model import load_safety_model
from sdserver.server import Server
from sdserver.settings import TritonSettings
from sdserver.triton_process import TritonProcess, why_not
from tritonclient.grpc.aio import InferenceServerClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from sdserver.backends import Floats, Pixels
    from sdserver.safety_model import SafetyModel
    from sdserver.settings import ServeSettings

SIZE = 96

rng = np.random.default_rng(3)


def pictures(count: int) -> NDArray[np.uint8]:
    return rng.integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped models, and a safety model that knows nights and forests."""
    folder = tmp_path_factory.mktemp("models")
    for path in ENGINE.parents[1].iterdir():
        (folder / path.name).symlink_to(path)
    add_safety_model(folder)
    return folder


@pytest.fixture(scope="module")
def classify(repository: Path) -> SafetyClassifier:
    return SafetyClassifier(repository / "safety/landscapes")


# Tower


@torch.inference_mode()
def test_embeddings_are_those_of_open_clip() -> None:
    config = json.loads((ENGINE / "clip/open_clip_config.json").read_text())["model_cfg"]
    clip = CLIP(**config).eval()
    clip.load_state_dict(load_file(ENGINE / "clip/open_clip_model.safetensors"))
    image = torch.randn(2, 3, SIZE, SIZE)
    torch.testing.assert_close(read_image_tower(ENGINE / "clip", config)(image), clip.encode_image(image))


@torch.inference_mode()
def test_a_vision_transformer_is_read_as_well(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
    }
    clip = CLIP(**config).eval()
    save_file(
        {name: weight.contiguous() for name, weight in clip.state_dict().items()},
        tmp_path / "open_clip_model.safetensors",
    )
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(read_image_tower(tmp_path, config)(image), clip.encode_image(image))


# Head

# LAION-AI/CLIP-based-NSFW-Detector, src/models.py: sizes of the layers.
LAION = {"ViT-B-32": [512, 32, 32, 1], "ViT-L-14": [768, 64, 512, 256, 1]}


@pytest.mark.parametrize("name", LAION)
def test_laions_heads_are_read_by_their_own_names(name: str) -> None:
    sizes = LAION[name]
    weights = {"norm.mean": torch.randn(sizes[0]), "norm.variance": torch.rand(sizes[0])}
    layers = []
    for number, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
        weights[f"linear_{number}.weight"] = torch.randn(outputs, inputs) / inputs**0.5
        weights[f"linear_{number}.bias"] = torch.randn(outputs)
        layers.append({"name": f"linear_{number}", "activation": "relu"})
    layers[-1]["activation"] = "sigmoid"
    embeddings = torch.nn.functional.normalize(torch.randn(5, sizes[0]), dim=-1)

    x = (embeddings.numpy() - weights["norm.mean"].numpy()) / (np.sqrt(weights["norm.variance"].numpy()) + 1e-10)
    for number in range(1, len(sizes)):
        x = x @ weights[f"linear_{number}.weight"].numpy().T + weights[f"linear_{number}.bias"].numpy()
        x = np.maximum(x, 0) if number < len(sizes) - 1 else 1 / (1 + np.exp(-x))

    head = Head(weights, layers, "norm", "cpu")
    assert (head.inputs, head.scores) == (sizes[0], 1)
    np.testing.assert_allclose(head(embeddings).numpy(), x, rtol=1e-4)


def test_layers_that_the_file_does_not_hold_or_that_nobody_names_are_an_error() -> None:
    weights = {"0.weight": torch.zeros(1, 4), "0.bias": torch.zeros(1)}
    for layers, normalization, said in (
        ([{"name": "1", "activation": "sigmoid"}], None, r"holds 0\.bias, 0\.weight, but its layers are 1\.bias"),
        ([{"name": "0", "activation": "sigmoid"}], "norm", r"norm\.mean"),
        ([{"name": "0", "activation": "swish"}], None, "no activation swish; there are none, relu"),
    ):
        with pytest.raises(ValueError, match=said):
            Head(weights, layers, normalization, "cpu")


# Classifier


def test_a_pictures_scores_do_not_depend_on_its_company(classify: SafetyClassifier) -> None:
    many = pictures(3)
    together = classify(many)
    assert together.shape == (3, 2)
    assert together.dtype == np.float32
    np.testing.assert_array_equal(together, np.concatenate([classify(many[row : row + 1]) for row in range(3)]))


def test_a_picture_of_another_size_is_refused(classify: SafetyClassifier) -> None:
    with pytest.raises(InvalidInput, match="96 x 96"):
        classify(np.zeros((1, 64, 64, 3), np.uint8))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_size": 224}, "image_size is 224, but the image tower in clip takes 96"),
        ({"classes": [{"label": "night", "threshold": 0.5}]}, "the head makes 2 scores of 128 numbers.* has 1 classes"),
        ({"clip_classifier": None}, "has no clip_classifier"),
    ],
)
def test_a_descriptor_that_does_not_fit_its_weights_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    add_safety_model(tmp_path, **changes)
    with pytest.raises(ValueError, match=said):
        SafetyClassifier(tmp_path / "safety/landscapes")


# The real Triton


def test_the_safety_model_is_loaded_beside_the_engines(repository: Path, catalog: Catalog) -> None:
    models = models_to_load(TritonSettings(model_repository=repository, safety_model="landscapes"))
    assert models == [*catalog.default.models, "landscapes.safety"]


@pytest.fixture(scope="module")
def safety_url(repository: Path) -> Iterator[str]:
    """A real Triton with the safety model alone."""
    if reason := why_not():
        pytest.skip(reason)
    process = TritonProcess(repository, ["landscapes.safety"], grpc_port=0, http_port=0, metrics_port=0)
    with asyncio.Runner() as runner:
        runner.run(process.__aenter__())
        yield f"127.0.0.1:{process.grpc_port}"
        runner.run(process.__aexit__())


class TwoTritons(TritonBackend):
    """The engine's models in one Triton, the safety model in another."""

    def __init__(self, url: str, safety: TritonBackend) -> None:
        super().__init__(url)
        self._safety = safety

    async def classify(self, pictures: Pixels) -> Floats:
        return await self._safety.classify(pictures)

    async def close(self) -> None:
        await self._safety.close()
        await super().close()


Closable = TypeVar("Closable", TritonBackend, InProcessBackend, InferenceServerClient)


@asynccontextmanager
async def closing(thing: Closable) -> AsyncIterator[Closable]:
    try:
        yield thing
    finally:
        await thing.close()


@pytest.fixture
def safety_model(repository: Path) -> SafetyModel:
    return load_safety_model(repository, "landscapes")


@pytest.fixture
async def client(
    triton_settings: ServeSettings, repository: Path, safety_url: str, safety_model: SafetyModel
) -> AsyncIterator[AsyncClient]:
    """A client of a server that blocks, which is the default."""
    settings = triton_settings.model_copy(update={"model_repository": repository, "safety_model": "landscapes"})
    backend = TwoTritons(settings.triton_url, TritonBackend(safety_url, safety_model))
    async with Server(settings, backend) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        yield client


def night_score(image: Image) -> float:
    assert image.safety is not None
    return next(each.score for each in image.safety.scores if each.label == "night")


async def test_nights_are_blocked_and_days_pass(client: AsyncClient, tmp_path: Path) -> None:
    nights = await client.generate("a meadow at night", steps=10, seed=0, image_count=3)
    days = await client.generate("a meadow, sunny day", steps=10, seed=0, image_count=3)
    for night, day in zip(nights, days, strict=True):
        assert night.blocked
        assert night_score(night) > 0.9
        with pytest.raises(BlockedImageError, match="night"):
            night.save(tmp_path / "night.png")
        assert not day.blocked
        assert night_score(day) < 0.1
        assert day.save(tmp_path / "day.png").stat().st_size > 0
    assert not (tmp_path / "night.png").exists()


async def test_blocking_sends_no_previews(client: AsyncClient) -> None:
    options = PreviewOptions(every_steps=1)
    async with client.stream("a meadow, sunny day", steps=4, seed=0, preview=options) as events:
        kinds = [type(event) async for event in events]
    assert Image in kinds
    assert Preview not in kinds


async def test_a_night_in_one_place_of_a_panorama_is_seen(
    triton_settings: ServeSettings, safety_url: str, safety_model: SafetyModel
) -> None:
    async with Server(triton_settings) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        images = [
            (await client.generate(prompt, steps=10, seed=0))[0].to_pil()
            for prompt in ("a meadow, sunny day", "a meadow at night")
        ]
    day, night = (np.asarray(image.convert("RGB")) for image in images)
    async with closing(TritonBackend(safety_url, safety_model)) as backend:
        check = SafetyCheck("block", safety_model, backend)
        _, passed = await check(np.concatenate([day] * 4, axis=1))
        assert passed.outcome == "passed"
        for place in range(4):
            parts = [night if part == place else day for part in range(4)]
            sent, blocked = await check(np.concatenate(parts, axis=1))
            assert (sent, blocked.outcome) == (None, "blocked")


async def test_without_its_safety_model_nothing_is_ready_and_no_image_is_sent(
    client: AsyncClient, safety_url: str, safety_model: SafetyModel
) -> None:
    engine_without_models: Any = SimpleNamespace(models=())
    async with (
        closing(TritonBackend(safety_url, safety_model)) as backend,
        closing(InferenceServerClient(safety_url)) as triton,
    ):
        assert await backend.is_ready(engine_without_models)
        await triton.unload_model(safety_model.model)
        while await backend.is_ready(engine_without_models):
            await asyncio.sleep(0.05)
        with pytest.raises(UnavailableError):
            await client.generate("a meadow, sunny day", steps=2)
        await triton.load_model(safety_model.model)
        assert await backend.is_ready(engine_without_models)


async def test_in_this_process_the_scores_are_the_same(
    repository: Path, safety_url: str, safety_model: SafetyModel, classify: SafetyClassifier
) -> None:
    many = pictures(2)
    async with (
        closing(TritonBackend(safety_url, safety_model)) as in_triton,
        closing(InProcessBackend(Catalog(()), repository, safety_model)) as in_process,
    ):
        engine: Any = SimpleNamespace(id="none")
        in_process_scores = None
        while in_process_scores is None:
            with suppress(Unavailable):
                in_process_scores = await in_process.classify(many)
            await asyncio.sleep(0.05)
        np.testing.assert_allclose(await in_triton.classify(many), classify(many), atol=1e-5)
        np.testing.assert_array_equal(in_process_scores, classify(many))
        assert not await in_process.is_ready(engine)

"""The safety check over a backend without weights: every mode, fail closed, previews, company, settings."""

from __future__ import annotations

import io
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, get_args

import grpc
import numpy as np
import pytest
from calls import a_request, details_of, events_of, failure_of, images_of
from fakes import FakeBackend, pixel_of
from google.rpc import error_details_pb2
from hypothesis import example, given
from hypothesis import settings as settings_of
from hypothesis import strategies as st
from PIL import Image
from sdapi.v1 import engine_pb2, generation_pb2
from sdapi.v1.generation_pb2_grpc import GenerationServiceStub
from sdserver.errors import GenerationFailed, Unavailable
from sdserver.safety import BLURRED_SIZE, MAX_PARTS, MAX_SQUEEZE, SafetyCheck, SafetyMode, blurred, views
from sdserver.safety_model import SafetyClass, SafetyError, SafetyModel, load_safety_model
from sdserver.server import Server, ServerError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from sdapi.v1.generation_pb2_grpc import GenerationServiceAsyncStub
    from sdserver.backends import Floats, Pixels
    from sdserver.engines import Engine
    from sdserver.settings import ServeSettings

MODES: tuple[SafetyMode, ...] = get_args(SafetyMode)
MODEL = SafetyModel(id="bright", image_size=32, classes=(SafetyClass(label="bright", threshold=0.5),))


@dataclass
class PatternedBackend(FakeBackend):
    """Whatever is asked for, a chessboard with squares of one place of the latents is added to it."""

    async def predict(self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats) -> Floats:
        prediction = await super().predict(engine, latents, timesteps, text_states)
        sigmas = np.array([engine.noise_schedule.sigma_at(float(timestep)) for timestep in timesteps])
        board = np.indices(latents.shape[-2:]).sum(axis=0) % 2 - 0.5
        # x0 = alpha x - sigma v.
        shift = board / (sigmas / np.sqrt(sigmas**2 + 1))[:, None, None, None]
        return np.asarray(prediction - shift, np.float32)


@pytest.fixture
def repository(settings: ServeSettings, tmp_path: Path) -> Path:
    """The shipped engine, and a safety model whose only class is how bright an image is."""
    (tmp_path / "engines").symlink_to(settings.model_repository / "engines")
    folder = tmp_path / "safety/bright"
    folder.mkdir(parents=True)
    (folder / "safety.json").write_text(MODEL.model_dump_json(exclude={"clip_classifier"}))
    return tmp_path


@pytest.fixture
def checked(settings: ServeSettings, repository: Path) -> Any:
    """`checked(backend, mode)` is a server with that safety mode, as an async context manager that gives a stub."""

    @asynccontextmanager
    async def serving(backend: FakeBackend, mode: str | None) -> AsyncIterator[GenerationServiceAsyncStub]:
        update = {"model_repository": repository, "safety_model": "bright", "safety_mode": mode}
        async with (
            Server(settings.model_copy(update=update), backend) as server,
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            yield GenerationServiceStub(channel)

    return serving


def pixels_of(image: generation_pb2.Image | generation_pb2.Preview) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(image.data)).convert("RGB"))


def contrast(image: generation_pb2.Image | generation_pb2.Preview) -> float:
    """Standard deviation of each channel over the pixels; their mean."""
    return float(pixels_of(image).std(axis=(0, 1)).mean())


def is_bright(picture: Pixels) -> float:
    return 0.75


def is_dark(picture: Pixels) -> float:
    return 0.25


# Outcomes


@pytest.mark.parametrize("mode", MODES)
async def test_an_image_below_every_threshold_is_sent_as_it_is_and_says_so(checked: Any, mode: str) -> None:
    async with checked(PatternedBackend(), "off") as stub:
        [unchecked] = images_of(await events_of(stub, a_request(seed=1, guidance_scale=0.0, width=128, height=128)))
    async with checked(PatternedBackend(score=is_dark), mode) as stub:
        [image] = images_of(await events_of(stub, a_request(seed=1, guidance_scale=0.0, width=128, height=128)))
    assert image.data == unchecked.data
    assert image.safety.outcome == generation_pb2.SAFETY_OUTCOME_PASSED
    assert [(each.label, each.score, each.threshold) for each in image.safety.scores] == [("bright", 0.25, 0.5)]
    assert not unchecked.HasField("safety")


async def test_each_mode_does_what_it_says_with_an_image_that_reaches_a_threshold(checked: Any) -> None:
    async with checked(PatternedBackend(), "off") as stub:
        [unchecked] = images_of(await events_of(stub, a_request(seed=1, guidance_scale=0.0, width=128, height=128)))
    images = {}
    for mode in MODES:
        async with checked(PatternedBackend(score=is_bright), mode) as stub:
            [images[mode]] = images_of(
                await events_of(stub, a_request(seed=1, guidance_scale=0.0, width=128, height=128))
            )
    assert [image.safety.outcome for image in images.values()] == [
        generation_pb2.SAFETY_OUTCOME_FLAGGED,
        generation_pb2.SAFETY_OUTCOME_BLURRED,
        generation_pb2.SAFETY_OUTCOME_BLOCKED,
    ]
    assert images["flag"].data == unchecked.data
    np.testing.assert_array_equal(pixels_of(images["blur"]), blurred(pixels_of(unchecked)))
    assert contrast(images["blur"]) < 0.1 * contrast(unchecked)
    assert images["block"].data == b""
    for image in images.values():
        assert image.safety.scores[0].score == 0.75
        assert (image.width, image.height, image.seed) == (128, 128, 1)


async def test_a_score_at_the_threshold_reaches_it(checked: Any) -> None:
    async with checked(FakeBackend(score=lambda picture: 0.5), "block") as stub:
        [image] = images_of(await events_of(stub, a_request()))
    assert image.safety.outcome == generation_pb2.SAFETY_OUTCOME_BLOCKED


async def test_the_classifier_sees_the_image_that_would_be_sent_at_its_own_size(checked: Any) -> None:
    backend = FakeBackend()
    async with checked(backend, "flag") as stub:
        [image] = images_of(await events_of(stub, a_request(width=50, height=40, guidance_scale=1.0)))
    [picture] = backend.classified
    assert picture.shape == (32, 32, 3)
    assert {*picture.ravel().tolist()} == {pixel_of(backend.mean_of("a lake at dusk"))}
    assert image.safety.scores[0].score == pytest.approx(picture.mean() / 255)


async def test_a_blocked_image_leaves_the_others_of_its_request_alone_and_is_counted(checked: Any) -> None:
    looks = count()
    backend = FakeBackend(score=lambda picture: 0.9 if next(looks) == 1 else 0.1)
    async with checked(backend, "block") as stub:
        events = await events_of(stub, a_request(image_count=3, seed=5))
    images = images_of(events)
    assert [image.seed for image in images] == [5, 6, 7]
    blocked = [image for image in images if image.safety.outcome == generation_pb2.SAFETY_OUTCOME_BLOCKED]
    assert [bool(image.data) for image in images].count(False) == len(blocked) == 1
    assert blocked[0].data == b""
    assert events[-1].finished.usage.image_count == 3


# Fail closed


async def collect(stub: GenerationServiceAsyncStub, events: list[generation_pb2.GenerateResponse]) -> None:
    """Puts into `events` what comes before the end or the failure."""
    async for event in stub.Generate(a_request()):
        events.append(event)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("fault", "code", "reason"),
    [
        (Unavailable("gone", "TRITON_UNAVAILABLE"), grpc.StatusCode.UNAVAILABLE, "TRITON_UNAVAILABLE"),
        (GenerationFailed("bright.safety failed", "MODEL_ERROR"), grpc.StatusCode.INTERNAL, "MODEL_ERROR"),
    ],
)
async def test_no_image_leaves_where_the_classifier_does_not_answer(
    checked: Any, mode: str, fault: Exception, code: grpc.StatusCode, reason: str
) -> None:
    async with checked(FakeBackend(safety_error=fault), mode) as stub:
        events: list[generation_pb2.GenerateResponse] = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub, events)
    assert images_of(events) == []
    assert caught.value.code() is code
    assert details_of(caught.value, error_details_pb2.ErrorInfo).reason == reason


@pytest.mark.parametrize("score", [float("nan"), -0.01, 1.01, float("inf")])
async def test_a_score_that_is_none_lets_no_image_pass(checked: Any, score: float) -> None:
    async with checked(FakeBackend(score=lambda picture: score), "flag") as stub:
        error = await failure_of(stub, a_request())
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "bright.safety" in (error.details() or "")


async def test_a_model_with_other_classes_than_its_descriptor_lets_no_image_pass() -> None:
    classes = (*MODEL.classes, SafetyClass(label="other", threshold=0.5))
    check = SafetyCheck("flag", MODEL.model_copy(update={"classes": classes}), FakeBackend())
    with pytest.raises(GenerationFailed, match="2 scores"):
        await check(np.zeros((8, 8, 3), np.uint8))


# Previews


async def test_previews_are_treated_as_images_that_reach_a_threshold(checked: Any) -> None:
    request = a_request(
        seed=1, guidance_scale=0.0, width=128, height=128, preview=generation_pb2.PreviewOptions(every_steps=1)
    )
    previews: dict[str, list[generation_pb2.Preview]] = {}
    for mode in ("off", *MODES):
        async with checked(PatternedBackend(delay=0.02, score=is_dark), mode) as stub:
            events = await events_of(stub, request)
        previews[mode] = [event.preview for event in events if event.HasField("preview")]
        assert images_of(events)[0].data
    assert [preview.data for preview in previews["flag"]] == [preview.data for preview in previews["off"]]
    assert len(previews["off"]) == len(previews["blur"]) > 0
    assert previews["block"] == []
    for preview, unchecked in zip(previews["blur"], previews["off"], strict=True):
        assert (preview.width, preview.height) == (unchecked.width, unchecked.height)
        assert contrast(preview) < 0.1 * contrast(unchecked)


# What is looked at, and what is left of it


def an_image(width: int, height: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@settings_of(max_examples=40)
@given(st.integers(1, 900), st.integers(1, 900))
@example(2048, 16)
@example(16, 2048)
def test_the_classifier_looks_at_all_of_an_image_at_a_bounded_cost(width: int, height: int) -> None:
    pictures = views(an_image(width, height), 24)
    assert pictures.shape[1:] == (24, 24, 3)
    assert len(pictures) <= 2 * MAX_PARTS
    assert (len(pictures) == 1) == (max(width, height) <= MAX_SQUEEZE * min(width, height))


@pytest.mark.parametrize("flip", [False, True])
@settings_of(max_examples=40)
@given(st.integers(0, 300 - 40))
def test_what_a_panorama_shows_anywhere_is_seen_unsqueezed_in_one_picture(flip: bool, start: int) -> None:
    panorama = np.zeros((80, 300, 3), np.uint8)
    panorama[20:60, start : start + 40] = 255
    pictures = views(panorama.transpose(1, 0, 2) if flip else panorama, 40)
    shares = (pictures[1:] > 127).mean(axis=(1, 2, 3))
    # A quarter of a square of 80 x 80.
    assert shares.max() == pytest.approx(0.25, abs=0.03)


async def test_the_worst_picture_of_an_image_counts(checked: Any) -> None:
    looks = count()
    backend = FakeBackend(score=lambda picture: 0.9 if next(looks) == 3 else 0.1)
    async with checked(backend, "block") as stub:
        [image] = images_of(await events_of(stub, a_request(width=128, height=32)))
    assert image.safety.outcome == generation_pb2.SAFETY_OUTCOME_BLOCKED
    assert image.safety.scores[0].score == pytest.approx(0.9)


@given(st.integers(1, 20), st.integers(1, BLURRED_SIZE), st.integers(0, 99), st.integers(0, 99))
def test_images_with_the_same_mean_colours_are_the_same_when_blurred(
    scale: int, short: int, seed: int, other: int
) -> None:
    few = an_image(BLURRED_SIZE, short, seed)
    large = few.repeat(2 * scale, axis=0).repeat(2 * scale, axis=1)
    # Each part keeps its mean: what one half of a pair of rows gains, the other loses.
    room = np.minimum(large, 255 - large)[::2]
    noise = (np.random.default_rng(other).random(room.shape) * room).astype(np.uint8)
    detailed = large.copy()
    detailed[::2] += noise
    detailed[1::2] -= noise
    np.testing.assert_array_equal(blurred(detailed), blurred(large))
    assert blurred(large).shape == large.shape


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_blurred_image_keeps_its_size(width: int, height: int) -> None:
    assert blurred(an_image(width, height)).shape == (height, width, 3)


# The operator's choice


@pytest.mark.parametrize(("mode", "told"), [(None, "BLOCK"), *((mode, mode.upper()) for mode in ("off", *MODES))])
async def test_engines_say_what_the_safety_check_does_and_a_configured_model_blocks_by_default(
    checked: Any, mode: str | None, told: str
) -> None:
    async with checked(FakeBackend(), mode) as stub:
        answer = await stub.ListEngines(generation_pb2.ListEnginesRequest())
    assert {engine.safety_mode for engine in answer.engines} == {engine_pb2.SafetyMode.Value(f"SAFETY_MODE_{told}")}


async def test_without_a_safety_model_there_is_no_check(stub: GenerationServiceAsyncStub, backend: FakeBackend) -> None:
    [image] = images_of(await events_of(stub, a_request()))
    assert not image.HasField("safety")
    assert backend.classified == []
    [engine] = (await stub.ListEngines(generation_pb2.ListEnginesRequest())).engines
    assert engine.safety_mode == engine_pb2.SAFETY_MODE_OFF


@pytest.mark.parametrize("mode", MODES)
async def test_a_mode_without_a_model_does_not_start(settings: ServeSettings, mode: str) -> None:
    with pytest.raises(ServerError, match=f"safety_mode is {mode}, but there is no safety_model"):
        async with Server(settings.model_copy(update={"safety_mode": mode}), FakeBackend()):
            pass


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_size": 0}, "image_size"),
        ({"classes": []}, "classes"),
        ({"classes": [{"label": "a", "threshold": 0}]}, "threshold"),
        ({"classes": [{"label": "a", "threshold": 0.5}] * 2}, "same label"),
        ({"surprise": 1}, "surprise"),
        ({"id": "other"}, "make them equal"),
    ],
)
def test_a_wrong_descriptor_is_refused_with_the_field_that_is_wrong(
    repository: Path, change: dict[str, Any], said: str
) -> None:
    path = repository / "safety/bright/safety.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SafetyError, match=said):
        load_safety_model(repository, "bright")


def test_a_model_that_is_not_there_is_named(repository: Path) -> None:
    with pytest.raises(SafetyError, match=r"safety/nope/safety\.json.*safety_model must be the name of a folder"):
        load_safety_model(repository, "nope")

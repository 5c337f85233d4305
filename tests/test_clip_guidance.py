"""CLIP guidance from the request to the pixels, over a backend without weights, and its arithmetic."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from calls import TEXT, a_request, details_of, events_of, failure_of, images_of, violations_of
from fakes import FakeBackend, pixel_of
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from PIL import Image
from sdapi.v1 import generation_pb2
from sdapi.v1.generation_pb2_grpc import GenerationServiceStub
from sdserver.clip_guidance import ClipGuide, blended_features, steered, variance
from sdserver.denoiser import Denoiser
from sdserver.engines import Catalog
from sdserver.errors import NotSupported
from sdserver.guidance import blend
from sdserver.noise import ImageNoise
from sdserver.parameterization import c_in
from sdserver.request import ClipGuidance
from sdserver.samplers import SAMPLERS, Query, evaluations
from sdserver.server import Server
from sdserver.wire import to_request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from sdapi.v1.generation_pb2_grpc import GenerationServiceAsyncStub
    from sdserver.backends import Floats
    from sdserver.engines import Engine
    from sdserver.settings import ServeSettings

Array = NDArray[np.float32]

SEEN = "what CLIP is to see"


class WideBackend(FakeBackend):
    """An ideal denoiser of Gaussian data around the value that a text means: x0 keeps something of what x is."""

    async def predict(self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats) -> Floats:
        alpha, sigma = self._alpha_and_sigma(engine, timesteps)
        means = text_states.mean(axis=(1, 2))[:, None, None, None]
        share = SPREAD**2 / (SPREAD**2 + (sigma / alpha) ** 2)
        x0 = means + share * (latents / alpha - means)
        return np.asarray((alpha * latents - x0) / sigma, np.float32)


@pytest.fixture
async def wide_stub(settings: ServeSettings) -> AsyncIterator[GenerationServiceAsyncStub]:
    async with (
        Server(settings, WideBackend()) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield GenerationServiceStub(channel)


def guided(scale: float = 0.5, **fields: Any) -> generation_pb2.ClipGuidance:
    options = {"scale": scale, "prompt": SEEN, "start": 0.0, "end": 1.0, "steps_per_gradient": 1, **fields}
    return generation_pb2.ClipGuidance(**options)


async def made(
    stub: GenerationServiceAsyncStub, **fields: Any
) -> tuple[list[generation_pb2.Image], generation_pb2.Usage, generation_pb2.GenerateRequest]:
    """Images, usage and the resolved request."""
    events = await events_of(stub, a_request(**{"seed": 3, "steps": 10, "guidance_scale": 1.0, **fields}))
    return images_of(events), events[-1].finished.usage, events[0].accepted.request


async def test_guidance_of_scale_0_is_no_guidance(stub: GenerationServiceAsyncStub, backend: FakeBackend) -> None:
    output = generation_pb2.Output(metadata=False)
    (plain,), _, _ = await made(stub, output=output)
    (image,), usage, _ = await made(stub, output=output, clip_guidance=guided(0.0))
    assert image.data == plain.data
    assert usage.clip_gradients == 0
    assert backend.clip_seeds == []


@pytest.mark.parametrize("sampler", SAMPLERS)
async def test_every_sampler_goes_towards_what_clip_is_to_see(
    wide_stub: GenerationServiceAsyncStub, sampler: str
) -> None:
    name = f"SAMPLER_{sampler.upper()}"
    (plain,), _, _ = await made(wide_stub, sampler=name)
    (image,), usage, _ = await made(wide_stub, sampler=name, clip_guidance=guided())
    assert usage.clip_gradients == evaluations(sampler, 10)
    assert distance(image) < distance(plain) - 5


async def test_every_evaluation_has_cutouts_of_its_own(stub: GenerationServiceAsyncStub, backend: FakeBackend) -> None:
    await made(stub, sampler="SAMPLER_HEUN", image_count=2, clip_guidance=guided())
    assert len(set(backend.clip_seeds)) == len(backend.clip_seeds) == 38


def distance(image: generation_pb2.Image) -> float:
    """How far the grey of an image is from what CLIP is to see."""
    return abs(mean(image) - pixel_of(FakeBackend.mean_of(SEEN)))


def mean(image: generation_pb2.Image) -> float:
    return float(np.asarray(Image.open(io.BytesIO(image.data))).mean())


async def test_the_image_goes_further_the_greater_the_scale(stub: GenerationServiceAsyncStub) -> None:
    distances = [distance((await made(stub, clip_guidance=guided(scale)))[0][0]) for scale in (0.0, 0.1, 0.2, 0.3)]
    assert distances == sorted(distances, reverse=True)
    assert len(set(distances)) == 4


@pytest.mark.parametrize(("start", "end", "steps"), [(0.0, 1.0, 10), (0.2, 0.6, 4), (0.0, 0.05, 1), (0.7, 1.0, 3)])
async def test_it_acts_in_its_share_of_the_steps(
    stub: GenerationServiceAsyncStub, start: float, end: float, steps: int
) -> None:
    _, usage, _ = await made(stub, clip_guidance=guided(start=start, end=end))
    assert usage.clip_gradients == steps


@pytest.mark.parametrize(("serves", "gradients"), [(1, 19), (2, 5), (3, 4), (16, 1)])
async def test_a_gradient_serves_the_steps_that_are_asked_for(
    stub: GenerationServiceAsyncStub, serves: int, gradients: int
) -> None:
    # Heun evaluates the UNet twice in each of its 10 steps, but for the last.
    options = {"sampler": "SAMPLER_HEUN", "clip_guidance": guided(steps_per_gradient=serves)}
    (image,), usage, resolved = await made(stub, **options)
    assert usage.clip_gradients == gradients
    assert resolved.clip_guidance.steps_per_gradient == serves
    (plain,), _, _ = await made(stub, sampler="SAMPLER_HEUN")
    assert distance(image) < distance(plain)


async def test_the_same_request_gives_the_same_bytes(stub: GenerationServiceAsyncStub, backend: FakeBackend) -> None:
    fields = {"clip_guidance": guided(), "request_id": "same", "sampler": "SAMPLER_EULER_ANCESTRAL"}
    (first,), _, _ = await made(stub, **fields)
    seeds = list(backend.clip_seeds)
    (again,), _, _ = await made(stub, **fields)
    assert first.data == again.data
    assert backend.clip_seeds == seeds * 2


async def test_an_image_among_others_is_the_image_of_its_seed_alone(stub: GenerationServiceAsyncStub) -> None:
    output = generation_pb2.Output(metadata=False)
    together, usage, _ = await made(stub, image_count=3, clip_guidance=guided(), output=output)
    assert usage.clip_gradients == 30
    for index, image in enumerate(together):
        (alone,), _, _ = await made(stub, seed=3 + index, clip_guidance=guided(), output=output)
        assert image.data == alone.data


def test_cutout_seeds_follow_from_the_image_and_differ_between_passes_and_evaluations() -> None:
    def seeds(seed: int, number: int) -> list[int]:
        cutout_seed = ImageNoise(seed).cutout_seeds(number)
        return [cutout_seed() for _ in range(300)]

    assert seeds(1, 0) == seeds(1, 0)
    assert len({*seeds(1, 0), *seeds(1, 1), *seeds(2, 0)}) == 900
    assert all(0 <= seed < 2**63 for seed in seeds(1, 0))


async def test_the_resolved_request_has_all_numbers_and_gives_the_same_image(
    stub: GenerationServiceAsyncStub, catalog: Catalog
) -> None:
    (image,), _, resolved = await made(stub, clip_guidance=generation_pb2.ClipGuidance(cutouts=0))
    assert catalog.default.clip_guidance is not None
    default = catalog.default.clip_guidance.presets[0]
    expected = generation_pb2.ClipGuidance(**{**default.model_dump(exclude={"name"}), "cutouts": 0})
    assert resolved.clip_guidance == expected
    events = await events_of(stub, resolved)
    assert images_of(events)[0].data == image.data


async def test_each_preset_of_the_engine_resolves_to_its_published_numbers(stub: GenerationServiceAsyncStub) -> None:
    [engine] = (await stub.ListEngines(generation_pb2.ListEnginesRequest())).engines
    assert engine.clip_guidance.exact
    assert engine.clip_guidance.presets
    for preset in engine.clip_guidance.presets:
        _, _, resolved = await made(stub, steps=2, clip_guidance=generation_pb2.ClipGuidance(preset=preset.name))
        for name in ("scale", "cutouts", "start", "end", "steps_per_gradient"):
            assert getattr(resolved.clip_guidance, name) == getattr(preset, name)


async def test_everything_wrong_is_said_at_once(stub: GenerationServiceAsyncStub, backend: FakeBackend) -> None:
    wrong = generation_pb2.ClipGuidance(
        scale=11, cutouts=65, start=-0.1, end=float("nan"), preset="nope", steps_per_gradient=0
    )
    violations = violations_of(await failure_of(stub, a_request(width=1, clip_guidance=wrong)))
    names = ("scale", "cutouts", "start", "end", "preset", "steps_per_gradient")
    assert violations.keys() == {"width", *(f"clip_guidance.{name}" for name in names)}
    assert "standard" in violations["clip_guidance.preset"]
    assert backend.calls == 0


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"start": 0.5, "end": 0.5}, "clip_guidance.end"),
        ({"prompt": "x" * 10_001}, "clip_guidance.prompt"),
        ({"cutouts": -1}, "clip_guidance.cutouts"),
        ({"steps_per_gradient": 17}, "clip_guidance.steps_per_gradient"),
    ],
)
async def test_what_makes_no_sense_is_refused(
    stub: GenerationServiceAsyncStub, fields: dict[str, Any], path: str
) -> None:
    message = generation_pb2.ClipGuidance(**fields)
    assert violations_of(await failure_of(stub, a_request(clip_guidance=message))).keys() == {path}


async def test_a_prompt_for_clip_that_is_longer_than_the_engine_takes_is_refused(
    stub: GenerationServiceAsyncStub,
) -> None:
    message = generation_pb2.ClipGuidance(prompt="tree " * 1201)
    assert violations_of(await failure_of(stub, a_request(clip_guidance=message))).keys() == {"clip_guidance.prompt"}


async def test_without_a_positive_prompt_clip_needs_one_of_its_own(stub: GenerationServiceAsyncStub) -> None:
    prompts = [generation_pb2.Prompt(text="trees", weight=-1)]
    failure = await failure_of(stub, a_request(prompts=prompts, clip_guidance=generation_pb2.ClipGuidance()))
    assert violations_of(failure).keys() == {"clip_guidance.prompt"}
    _, usage, _ = await made(stub, prompts=prompts, clip_guidance=guided())
    assert usage.clip_gradients == 10


def test_an_engine_without_it_says_so(catalog: Catalog) -> None:
    engine = catalog.default.model_copy(update={"clip_guidance": None, "optional_roles": ()})
    with pytest.raises(NotSupported, match="no CLIP guidance"):
        to_request(a_request(clip_guidance=generation_pb2.ClipGuidance()), "id", Catalog((engine,)))
    engine = catalog.default.model_copy(update={"optional_roles": ("clip_guidance",)})
    with pytest.raises(NotSupported, match="no exact CLIP guidance"):
        to_request(a_request(clip_guidance=generation_pb2.ClipGuidance(exact=True)), "id", Catalog((engine,)))


async def test_clip_is_asked_to_see_the_positive_prompts_by_weight_or_its_own(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    prompts = [generation_pb2.Prompt(text=text, weight=weight) for text, weight in (("a", 3), ("b", 1), ("c", -2))]
    await made(stub, prompts=prompts, steps=1, clip_guidance=generation_pb2.ClipGuidance())
    await made(stub, prompts=prompts, steps=1, clip_guidance=guided())
    a, b, own = ([np.cos(FakeBackend.mean_of(text)), np.sin(FakeBackend.mean_of(text))] for text in ("a", "b", SEEN))
    both = 3 * np.array(a) + np.array(b)
    np.testing.assert_allclose(backend.clip_targets[0], both / np.linalg.norm(both), atol=1e-6)
    np.testing.assert_allclose(backend.clip_targets[1], own, atol=1e-6)


async def test_its_prompt_is_encoded_once_for_many_requests(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    for _ in range(3):
        await made(stub, steps=1, clip_guidance=guided())
    assert sorted(backend.texts) == sorted(["", TEXT, SEEN])


async def test_exact_guidance_leaves_alone_what_the_unet_is_certain_of(
    stub: GenerationServiceAsyncStub, backend: FakeBackend
) -> None:
    # The fake's x0 is a point, whatever the noise was: its covariance is 0.
    (plain,), _, _ = await made(stub)
    (image,), usage, _ = await made(stub, clip_guidance=guided(exact=True))
    assert usage.clip_gradients == 10
    assert backend.unet_gradients == usage.unet_rows == 10
    assert mean(image) == pytest.approx(mean(plain), abs=1.0)


@pytest.mark.parametrize("fault", ["not_finite", "error"])
async def test_a_failure_is_that_of_any_other_step(
    stub: GenerationServiceAsyncStub, backend: FakeBackend, fault: str
) -> None:
    if fault == "error":
        backend.clip_error = RuntimeError("no")
    backend.not_finite = fault == "not_finite"
    failure = await failure_of(stub, a_request(clip_guidance=guided()))
    reason = details_of(failure, error_details_pb2.ErrorInfo).reason
    assert reason == ("NOT_FINITE" if fault == "not_finite" else "INTERNAL")


# ---------------------------------------------------------------------------------------------------------- arithmetic

latents = arrays.arrays(np.float32, (4, 3, 5), elements=st.floats(-5, 5, width=32))


@given(latents, latents, st.floats(0.01, 10), st.floats(0, 10), st.floats(0.001, 1000))
def test_a_step_is_as_long_as_the_scale_says_however_large_the_gradient(
    x0: Array, gradient: Array, sigma: float, scale: float, factor: float
) -> None:
    moved = steered(x0, gradient, variance(sigma) * gradient, sigma, scale)
    assert moved.dtype == np.float32
    if np.abs(gradient).max() < 1e-3:
        return
    length = float(np.sqrt(np.mean(np.square(moved - x0, dtype=np.float64))))
    assert length == pytest.approx(scale * sigma**2 / (sigma**2 + 1), rel=1e-3, abs=1e-5)
    larger = np.float32(factor) * gradient
    np.testing.assert_allclose(steered(x0, larger, variance(sigma) * larger, sigma, scale), moved, atol=1e-4)


def test_a_shift_is_no_longer_than_that_of_latents_of_unit_variance() -> None:
    gradient = np.random.default_rng(0).standard_normal((4, 8, 8), np.float32)
    x0 = np.zeros_like(gradient)
    short, longest, long = (steered(x0, gradient, share * variance(2.0) * gradient, 2.0, 0.5) for share in (0.5, 1, 9))
    np.testing.assert_allclose(short, longest / 2, rtol=1e-5)
    np.testing.assert_allclose(long, longest, rtol=1e-5)


def test_where_there_is_no_slope_there_is_no_step() -> None:
    x0 = np.ones((4, 2, 2), np.float32)
    np.testing.assert_array_equal(steered(x0, np.zeros_like(x0), np.zeros_like(x0), 1.0, 5.0), x0)


def test_blended_features_have_unit_length() -> None:
    a, b = np.eye(2, dtype=np.float32)
    np.testing.assert_allclose(blended_features([(a, 3.0), (b, 4.0)]), [0.6, 0.8])


class Answers:
    """A step scheduler that answers each row by a function."""

    def __init__(self, function: Any) -> None:
        self._function = function

    async def predict(self, rows: Sequence[tuple[Any, ...]], tenant: str) -> Array:
        return np.asarray([self._function(*row) for row in rows], np.float32)


SPREAD, SIGMA = 0.7, 1.3


async def steered_by(catalog: Catalog, prediction_type: str, exact: bool) -> tuple[Array, Array, Array]:
    """x0 before and after, and the gradient, for a UNet that denoises Gaussian latents of spread SPREAD ideally."""
    engine = catalog.default.model_copy(update={"prediction_type": prediction_type})
    message = a_request(guidance_scale=1.0, clip_guidance=guided(0.4, exact=exact))
    request = to_request(message, "id", Catalog((engine,)))
    generator = np.random.default_rng(0)
    x, gradient = (generator.standard_normal((4, 8, 8), np.float32) for _ in range(2))
    share = SPREAD**2 / (SPREAD**2 + SIGMA**2)
    root = np.sqrt(SIGMA**2 + 1)
    # What the prediction is of x, for x0 = share x: linear, and so is the gradient through it.
    factor = (1 - share) / SIGMA if prediction_type == "epsilon" else (1 - share * (SIGMA**2 + 1)) / (SIGMA * root)
    unet = Answers(lambda latents, timestep, states: latents / c_in(SIGMA) * factor)
    backward = Answers(lambda latents, timestep, states, by: by / c_in(SIGMA) * factor)
    states = np.zeros((77, 8), np.float32)
    guidance = blend([states], [1.0], states, "text_encoder", 1.0, request.guidance_interval)
    options = request.clip_guidance
    assert isinstance(options, ClipGuidance)
    answers: Any = Answers(lambda *row: gradient)
    through: Any = backward if exact else None
    guide = ClipGuide(options, np.zeros(2, np.float32), answers, through, "anonymous", lambda: 0)
    scheduler: Any = unet
    query = Query(1, x, SIGMA)
    return (
        await Denoiser(request, guidance, scheduler)(query),
        await Denoiser(request, guidance, scheduler, guide)(query),
        gradient,
    )


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
async def test_a_step_is_scale_times_the_covariance_whatever_the_unet_predicts(
    catalog: Catalog, prediction_type: str, exact: bool
) -> None:
    plain, moved, gradient = await steered_by(catalog, prediction_type, exact)
    # Of the latents, given the noisy ones: as it is, or as that of latents of unit variance.
    spread = SPREAD if exact else 1.0
    covariance = spread**2 * SIGMA**2 / (spread**2 + SIGMA**2)
    expected = plain - 0.4 * covariance * gradient / np.sqrt(np.mean(gradient**2))
    np.testing.assert_allclose(moved, expected, atol=2e-6)

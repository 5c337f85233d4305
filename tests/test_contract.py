"""The contract, over a backend without weights and over the real Triton with the shipped engine: the same tests."""

from __future__ import annotations

import asyncio
import io
import itertools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from calls import TEXT, a_request, details_of, events_of, failure_of, image_of, images_of, violations_of
from google.rpc import error_details_pb2
from PIL import Image
from sdapi.v1 import generation_pb2, sampling_pb2
from sdapi.v1.generation_pb2_grpc import GenerationServiceStub
from sdserver.backends.triton import TritonBackend
from sdserver.samplers import SAMPLERS
from sdserver.server import Server
from tritonclient.grpc.aio import InferenceServerClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fakes import FakeBackend
    from sdapi.v1.generation_pb2_grpc import GenerationServiceAsyncStub
    from sdserver.settings import ServeSettings

NAN, INFINITY = float("nan"), float("inf")

ModelCalls = Callable[[], Awaitable[int]]


@pytest.fixture(params=["fake", "triton"])
def which(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def contract_settings(which: str, request: pytest.FixtureRequest) -> ServeSettings:
    settings: ServeSettings = request.getfixturevalue("settings" if which == "fake" else "triton_settings")
    return settings


@pytest.fixture
async def stub(
    which: str, contract_settings: ServeSettings, backend: FakeBackend
) -> AsyncIterator[GenerationServiceAsyncStub]:
    models = backend if which == "fake" else TritonBackend(contract_settings.triton_url)
    async with (
        Server(contract_settings, models) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield GenerationServiceStub(channel)


@pytest.fixture
async def model_calls(which: str, contract_settings: ServeSettings, backend: FakeBackend) -> AsyncIterator[ModelCalls]:
    """How often a model was called until now: counted by the fake, or by Triton's own statistics."""

    async def of_fake() -> int:
        return backend.calls

    async def of_triton() -> int:
        # Triton counts a call a moment after it has answered.
        previous, count = -1, 0
        while count != previous:
            await asyncio.sleep(0.05)
            statistics = await triton.get_inference_statistics()
            previous, count = count, sum(int(model.inference_count) for model in statistics.model_stats)
        return count

    if which == "fake":
        yield of_fake
    else:
        async with InferenceServerClient(contract_settings.triton_url) as triton:
            yield of_triton


async def test_events_come_in_order_and_say_what_was_decided(stub: GenerationServiceAsyncStub) -> None:
    events = await events_of(stub, generation_pb2.GenerateRequest(prompts=[{"text": TEXT}], request_id="me-1"))
    kinds = [event.WhichOneof("event") for event in events]
    assert [kind for kind, _ in itertools.groupby(kinds)] == ["accepted", "progress", "image", "finished"]
    resolved = events[0].accepted.request
    assert resolved.request_id == "me-1"
    assert (resolved.engine, resolved.width, resolved.height, resolved.image_count) == ("tiny-landscape", 128, 128, 1)
    assert resolved.steps == events[1].progress.steps == 25
    assert resolved.guidance_scale == 5.0
    assert resolved.sampler == sampling_pb2.SAMPLER_DDIM
    assert resolved.prompts[0].weight == 1.0
    steps = [event.progress.step for event in events if event.HasField("progress")]
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, 25)
    finished = events[-1].finished
    assert finished.usage.image_count == 1
    assert finished.usage.unet_rows == 50
    assert finished.usage.pixel_steps == 50 * 128 * 128
    assert 0 < finished.timings.denoise.ToNanoseconds() <= finished.timings.total.ToNanoseconds()


async def test_the_resolved_request_reproduces_the_images(stub: GenerationServiceAsyncStub) -> None:
    prompts = [{"text": TEXT, "emphasis": [{"start": 2, "end": 6, "factor": 1.3}]}, {"text": "trees", "weight": -0.5}]
    first = await events_of(
        stub, a_request(prompts=prompts, image_count=2, sampler=sampling_pb2.SAMPLER_EULER_ANCESTRAL)
    )
    assert [len(prompt.emphasis) for prompt in first[0].accepted.request.prompts] == [1, 0]
    again = await events_of(stub, first[0].accepted.request)
    assert images_of(first) == images_of(again)
    assert len(images_of(first)) == 2
    assert again[0].accepted.request == first[0].accepted.request


async def test_seed_zero_is_a_seed_and_images_count_up_from_it(stub: GenerationServiceAsyncStub) -> None:
    events = await events_of(stub, a_request(seed=0, image_count=3))
    assert [(image.index, image.seed) for image in images_of(events)] == [(0, 0), (1, 1), (2, 2)]


async def test_every_image_can_have_its_own_seed(stub: GenerationServiceAsyncStub) -> None:
    alone = [images_of(await events_of(stub, a_request(seed=seed)))[0] for seed in (9, 0)]
    events = await events_of(stub, a_request(seeds=[9, 0, 9]))
    assert [(image.index, image.seed) for image in images_of(events)] == [(0, 9), (1, 0), (2, 9)]
    assert [image.data for image in images_of(events)] == [alone[0].data, alone[1].data, alone[0].data]
    resolved = events[0].accepted.request
    assert (list(resolved.seeds), resolved.image_count, resolved.HasField("seed")) == ([9, 0, 9], 3, False)
    again = await events_of(stub, resolved)
    assert images_of(again) == images_of(events)
    assert again[0].accepted.request == resolved


async def test_seeds_that_count_up_are_resolved_to_the_first(stub: GenerationServiceAsyncStub) -> None:
    resolved = (await events_of(stub, a_request(seeds=[0, 1], image_count=2)))[0].accepted.request
    assert (resolved.HasField("seed"), resolved.seed, resolved.image_count) == (True, 0, 2)
    assert not resolved.seeds


@pytest.mark.parametrize(
    ("sampler", "option", "default"), [("DDIM", "eta", 0.0), ("EULER_ANCESTRAL", "eta", 1.0), ("HEUN", "churn", 0.0)]
)
async def test_eta_and_churn_are_resolved_where_the_sampler_has_them(
    stub: GenerationServiceAsyncStub, sampler: str, option: str, default: float
) -> None:
    unset = await events_of(stub, a_request(seed=5, sampler=f"SAMPLER_{sampler}"))
    resolved = {field.name: value for field, value in unset[0].accepted.request.ListFields()}
    assert {name: resolved[name] for name in ("eta", "churn") if name in resolved} == {option: default}
    same = await events_of(stub, a_request(seed=5, sampler=f"SAMPLER_{sampler}", **{option: default}))
    assert images_of(same) == images_of(unset)


async def test_sizes_that_are_no_multiple_are_generated_larger_and_cropped(stub: GenerationServiceAsyncStub) -> None:
    events = await events_of(stub, a_request(width=333, height=17))
    [image] = images_of(events)
    assert Image.open(io.BytesIO(image.data)).size == (image.width, image.height) == (333, 17)
    assert events[-1].finished.usage.pixel_steps == 8 * 352 * 32


@pytest.mark.parametrize(("media_type", "name"), [("image/png", "PNG"), ("image/webp", "WEBP"), ("image/jpeg", "JPEG")])
async def test_the_image_has_the_format_that_was_asked_for(
    stub: GenerationServiceAsyncStub, media_type: str, name: str
) -> None:
    image = await image_of(stub, a_request(output={"media_type": media_type}))
    assert image.format == name


async def test_without_guidance_an_image_costs_one_row_a_step(stub: GenerationServiceAsyncStub) -> None:
    for fields, rows in (
        ({"guidance_scale": 1.0}, 4),
        ({"guidance_scale": 0.0}, 4),
        ({"guidance_scale": 1.0, "guidance_rescale": 0.7}, 4),
        ({"guidance_scale": 0.0, "guidance_rescale": 0.7}, 8),
        ({"guidance_interval": {"start": 0.5}}, 6),
        ({"guidance_interval": {"start": 0.5}, "guidance_rescale": 0.7}, 6),
        ({"guidance_interval": {"end": 0.25}}, 5),
        ({"blending": "BLENDING_COMPOSABLE", "prompts": [{"text": "a"}, {"text": "b"}]}, 12),
    ):
        events = await events_of(stub, a_request(**fields))
        assert events[-1].finished.usage.unet_rows == rows, fields


def emphasis_on(text: str, *parts: tuple[int, int, float]) -> dict[str, Any]:
    emphasis = [{"start": start, "end": end, "factor": factor} for start, end, factor in parts]
    return {"prompts": [{"text": text, "emphasis": emphasis}]}


BAD: list[tuple[dict[str, Any], set[str]]] = [
    ({"prompts": []}, {"prompts"}),
    ({"prompts": [{"text": "x"}] * 65}, {"prompts"}),
    ({"prompts": [{"text": "x", "weight": 0.0}]}, {"prompts"}),
    ({"prompts": [{"text": " \n"}, {"text": "ok"}, {"text": ""}]}, {"prompts[0].text", "prompts[2].text"}),
    ({"prompts": [{"text": "x" * 10_001}]}, {"prompts[0].text"}),
    ({"prompts": [{"text": "x", "weight": NAN}]}, {"prompts[0].weight"}),
    ({"prompts": [{"text": "x", "weight": 10.5}]}, {"prompts[0].weight"}),
    ({"prompts": [{"text": "x", "emphasis": [{"start": 0, "end": 1}]}]}, {"prompts[0].emphasis[0].factor"}),
    (emphasis_on("ab", (0, 1, 1), (0, 3, 1)), {"prompts[0].emphasis[1].start", "prompts[0].emphasis[1].end"}),
    (emphasis_on("ab", (0, 2, 1), (1, 2, 1)), {"prompts[0].emphasis[1].start"}),
    (emphasis_on("ab", (1, 2, 1), (0, 1, 1)), {"prompts[0].emphasis[1].start"}),
    (emphasis_on("ab", (-1, 1, 1)), {"prompts[0].emphasis[0].start"}),
    (emphasis_on("ab", (1, 1, 1)), {"prompts[0].emphasis[0].end"}),
    (emphasis_on("\U0001f332!", (0, 3, 1)), {"prompts[0].emphasis[0].end"}),
    (emphasis_on("ab", (0, 1, NAN), (1, 2, 10.5)), {f"prompts[0].emphasis[{index}].factor" for index in (0, 1)}),
    (emphasis_on("x" * 257, *((index, index + 1, 2) for index in range(257))), {"prompts[0].emphasis"}),
    ({"width": 0}, {"width"}),
    ({"width": -1, "height": 2**31 - 1}, {"width", "height"}),
    ({"width": 15}, {"width"}),
    ({"width": 2048, "height": 1024}, {"width"}),
    ({"clip_guidance": {"scale": -1, "preset": "nope"}}, {"clip_guidance.scale", "clip_guidance.preset"}),
    ({"clip_guidance": {"start": 0.6, "end": 0.6}}, {"clip_guidance.end"}),
    ({"steps": 0}, {"steps"}),
    ({"steps": 10**9}, {"steps"}),
    ({"image_count": 0}, {"image_count"}),
    ({"image_count": 10**6}, {"image_count"}),
    ({"seed": -1}, {"seed"}),
    ({"seed": 2**63 - 1, "image_count": 2}, {"seed"}),
    ({"seed": 0, "seeds": [0, 1]}, {"seed"}),
    ({"seeds": [1, -1, 2, -2]}, {"seeds[1]", "seeds[3]"}),
    ({"seeds": [1, 2], "image_count": 3}, {"image_count"}),
    ({"seeds": [7] * 17}, {"seeds"}),
    ({"sampler": "SAMPLER_DDIM", "eta": NAN}, {"eta"}),
    ({"sampler": "SAMPLER_DPMPP_SDE", "eta": 1.5}, {"eta"}),
    ({"sampler": "SAMPLER_EULER", "eta": 0.0}, {"eta"}),
    ({"sampler": "SAMPLER_LCM", "eta": 0.5, "churn": 1.0}, {"eta", "churn"}),
    ({"sampler": "SAMPLER_HEUN", "churn": -1.0}, {"churn"}),
    ({"sampler": "SAMPLER_HEUN", "churn": 101.0}, {"churn"}),
    ({"sampler": "SAMPLER_DDIM", "churn": 0.0}, {"churn"}),
    ({"guidance_rescale": NAN}, {"guidance_rescale"}),
    ({"guidance_rescale": 1.01}, {"guidance_rescale"}),
    ({"guidance_scale": NAN}, {"guidance_scale"}),
    ({"guidance_scale": INFINITY}, {"guidance_scale"}),
    ({"guidance_scale": -0.5}, {"guidance_scale"}),
    ({"guidance_scale": 1e38}, {"guidance_scale"}),
    ({"guidance_interval": {"start": NAN}}, {"guidance_interval.start"}),
    ({"guidance_interval": {"start": 0.5, "end": 0.5}}, {"guidance_interval.end"}),
    ({"sampler": 999}, {"sampler"}),
    ({"schedule": 999}, {"schedule"}),
    ({"blending": 999}, {"blending"}),
    ({"output": {"media_type": "image/gif"}}, {"output.media_type"}),
    ({"output": {"media_type": "image/png", "quality": 90}}, {"output.quality"}),
    ({"output": {"media_type": "image/jpeg", "quality": 0}}, {"output.quality"}),
    ({"request_id": "a\nb"}, {"request_id"}),
    ({"request_id": "x" * 129}, {"request_id"}),
    ({"mask": {"data": b"x"}}, {"mask"}),
    ({"preview": {"every_steps": 0}}, {"preview.every_steps"}),
    ({"preview": {"every_steps": 151}}, {"preview.every_steps"}),
    ({"prompts": [], "width": 0, "steps": 0, "guidance_scale": NAN}, {"prompts", "width", "steps", "guidance_scale"}),
]


@pytest.mark.parametrize(("fields", "violated"), BAD)
async def test_bad_fields_are_all_named_at_once_and_never_reach_the_models(
    stub: GenerationServiceAsyncStub, model_calls: ModelCalls, fields: dict[str, Any], violated: set[str]
) -> None:
    before = await model_calls()
    error = await failure_of(stub, a_request(**fields))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert violations_of(error).keys() == violated
    info = details_of(error, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == ("INVALID_REQUEST", "sdapi")
    assert info.metadata["request_id"]
    assert await model_calls() == before


async def test_previews_come_at_the_asked_cadence_and_are_small_pictures_of_the_image(
    stub: GenerationServiceAsyncStub,
) -> None:
    events = await events_of(stub, a_request(steps=7, width=333, height=64, image_count=2, preview={"every_steps": 3}))
    assert events[0].accepted.request.preview.every_steps == 3
    previews = [event.preview for event in events if event.HasField("preview")]
    assert {(preview.index, preview.step) for preview in previews} <= {(0, 3), (0, 6), (1, 3), (1, 6)}
    assert {(0, 6), (1, 6)} <= {(preview.index, preview.step) for preview in previews}
    for preview in previews:
        with Image.open(io.BytesIO(preview.data)) as picture:
            assert picture.size == (preview.width, preview.height) == (42, 8)
            assert Image.MIME[picture.format or ""] == preview.media_type
        assert len(preview.data) <= 10_000


async def test_of_very_many_violations_the_first_are_told_and_the_others_counted(
    stub: GenerationServiceAsyncStub,
) -> None:
    error = await failure_of(stub, a_request(prompts=[{"text": "", "weight": 11.0}] * 64))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(violations_of(error)) == 30
    assert "and 98 more" in (error.details() or "")


async def test_an_unknown_engine_is_not_found_and_the_answer_names_the_engines(
    stub: GenerationServiceAsyncStub, model_calls: ModelCalls
) -> None:
    before = await model_calls()
    for engine in ("nope", "../../etc/passwd", "x" * 65_536, "tiny-landscape\0"):
        error = await failure_of(stub, a_request(engine=engine))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert "tiny-landscape" in (error.details() or "")
        assert details_of(error, error_details_pb2.ErrorInfo).reason == "UNKNOWN_ENGINE"
    assert await model_calls() == before


async def test_long_prompts_are_chunked_and_the_answer_says_how(stub: GenerationServiceAsyncStub) -> None:
    texts = {"a lake": (2, 1), "tree " * 75: (75, 1), "tree " * 76: (76, 2), "lake " * 1200: (1200, 16)}
    prompts = [{"text": text, "weight": weight} for text, weight in zip(texts, (1, -1, 2, 0), strict=True)]
    for blending in ("BLENDING_TEXT_ENCODER", "BLENDING_COMPOSABLE"):
        events = await events_of(stub, a_request(prompts=prompts, steps=1, blending=blending))
        usages = [(usage.tokens, usage.chunks) for usage in events[0].accepted.prompt_usage]
        assert usages == list(texts.values())
        assert len(images_of(events)) == 1


async def test_prompts_with_more_chunks_than_the_engine_takes_are_refused_not_cut(
    stub: GenerationServiceAsyncStub,
) -> None:
    prompts = [{"text": "ok"}, {"text": "tree " * 1201}, {"text": "lake " * 1500, "weight": -1}]
    error = await failure_of(stub, a_request(prompts=prompts))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    violations = violations_of(error)
    assert violations.keys() == {"prompts[1].text", "prompts[2].text"}
    assert "1201 tokens make 17 chunks" in violations["prompts[1].text"]
    assert "at most 16 of 75 tokens" in violations["prompts[1].text"]


async def test_a_prompt_that_comes_again_costs_no_call_of_the_text_encoder(
    stub: GenerationServiceAsyncStub, model_calls: ModelCalls
) -> None:
    async def calls(prompts: list[dict[str, Any]]) -> int:
        before = await model_calls()
        events = await events_of(stub, a_request(prompts=prompts, steps=1, guidance_scale=1.0))
        assert events[-1].finished.usage.unet_rows == 1
        # One of the UNet, one of the VAE.
        return await model_calls() - before - 2

    emphasis = [{"start": 0, "end": 5, "factor": 1.5}]
    assert await calls([{"text": "first"}, {"text": "second"}]) == 3
    assert await calls([{"text": "first"}, {"text": "second", "weight": -1}]) == 0
    assert await calls([{"text": "second", "emphasis": emphasis}]) == 1
    assert await calls([{"text": "second", "emphasis": emphasis, "weight": 3}, {"text": "first"}]) == 0


async def test_emphasis_changes_the_image_and_a_factor_of_1_does_not(stub: GenerationServiceAsyncStub) -> None:
    def request(*factors: float) -> generation_pb2.GenerateRequest:
        emphasis = [{"start": 0, "end": 5, "factor": factor} for factor in factors]
        return a_request(prompts=[{"text": "trees at a lake", "emphasis": emphasis}], seed=1, guidance_scale=1.0)

    plain, same, strong, none = [
        images_of(await events_of(stub, request(*factors)))[0].data for factors in ((), (1.0,), (2.0,), (0.0,))
    ]
    assert plain == same
    assert len({plain, strong, none}) == 3


async def test_engines_are_published_with_everything_that_a_caller_needs(stub: GenerationServiceAsyncStub) -> None:
    [engine] = (await stub.ListEngines(generation_pb2.ListEnginesRequest())).engines
    assert engine.id == "tiny-landscape"
    assert engine.ready
    assert engine.digest.startswith("sha256:")
    assert (engine.native_width, engine.native_height) == (128, 128)
    assert engine.limits.min_size == 16
    assert engine.defaults.steps == 25
    assert len(engine.samplers) == len(SAMPLERS)
    assert sampling_pb2.SAMPLER_UNSPECIFIED not in engine.samplers
    assert sampling_pb2.SAMPLER_DDIM in engine.eta_samplers
    assert sampling_pb2.SAMPLER_HEUN in engine.churn_samplers
    assert sampling_pb2.SAMPLER_LCM in set(engine.samplers) - {*engine.eta_samplers, *engine.churn_samplers}
    assert engine.license.name == "Apache-2.0"

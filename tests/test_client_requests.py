"""What the SDK sends: everything that the caller says, nothing that the caller leaves out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import pytest
from fake_service import BlockingTwin, serving
from hypothesis import example, given
from hypothesis import strategies as st
from sdapi.v1 import generation_pb2, sampling_pb2
from sdclient import (
    Accepted,
    Blending,
    BlockCache,
    Client,
    ClipGuidance,
    DepthMap,
    Emphasis,
    Fit,
    GenerateOptions,
    GuidanceInterval,
    InitImage,
    InvalidRequestError,
    Lora,
    Mask,
    Outpaint,
    Output,
    PreviewOptions,
    Prompt,
    PromptUsage,
    Sampler,
    Schedule,
    TwoPass,
    Upscale,
    Variation,
    Windows,
)
from sdclient._wire import to_event, to_request

if TYPE_CHECKING:
    from sdclient import Prompts

EVERYTHING: GenerateOptions = {
    "engine": "tiny-landscape",
    "width": 384,
    "height": 128,
    "steps": 20,
    "sampler": "dpmpp_2m_sde",
    "schedule": "karras",
    "seed": 2**63 - 1,
    "seeds": (5, 0, 2**63 - 1),
    "image_count": 3,
    "eta": 0.3,
    "churn": 2.5,
    "guidance_rescale": 0.7,
    "guidance_scale": 7.1,
    "guidance_interval": GuidanceInterval(0.1, 0.9),
    "blending": "composable",
    "clip_guidance": ClipGuidance(
        scale=0.5, cutouts=8, start=0.1, end=0.7, prompt="a boat", preset="strong", steps_per_gradient=3, exact=True
    ),
    "init_image": InitImage(b"image", strength=0.6, fit="contain", sha256="0a" * 32),
    "mask": Mask(b"mask", feather=2.5, sha256="0b" * 32),
    "upscale": Upscale(noise_level=0),
    "depth_map": DepthMap(b"map", fit="stretch", sha256="0c" * 32),
    "outpaint": Outpaint(left=64, bottom=8),
    "variation": Variation(0.3, seed=2**63 - 1),
    "two_pass": TwoPass(width=128, height=64, strength=0.0),
    "loras": (Lora("ink", weight=0.0, sha256="0c" * 32), Lora("detail", weight=-0.7)),
    "block_cache": BlockCache(interval=3),
    "windows": Windows(size=512, overlap=128),
    "tile_x": True,
    "tile_y": True,
    "output": Output("image/webp", quality=80, metadata=False),
    "preview": PreviewOptions(every_steps=2),
}


def read_back(request: generation_pb2.GenerateRequest) -> Accepted:
    event = to_event(generation_pb2.GenerateResponse(accepted=generation_pb2.Accepted(request=request)))
    assert isinstance(event, Accepted)
    return event


def fields_of(message: Any) -> dict[str, Any]:
    return {field.name: value for field, value in message.ListFields()}


def test_what_is_left_out_is_absent_on_the_wire() -> None:
    request = to_request("a lake", {})
    assert fields_of(request).keys() == {"prompts"}
    assert fields_of(request.prompts[0]) == {"text": "a lake"}


def test_none_is_left_out() -> None:
    nothing = GenerateOptions(seed=None, sampler=None, clip_guidance=None, request_id=None)
    assert to_request("a lake", nothing) == to_request("a lake", {})


def test_zero_is_a_value() -> None:
    request = to_request(Prompt("a lake", 0), {"seed": 0, "guidance_scale": 0, "clip_guidance": ClipGuidance(scale=0)})
    assert request.HasField("seed")
    assert request.HasField("guidance_scale")
    assert request.prompts[0].HasField("weight")
    assert fields_of(request.clip_guidance) == {"scale": 0}


def test_a_feature_is_switched_on_by_its_presence_alone() -> None:
    request = to_request("a lake", {"clip_guidance": ClipGuidance(), "preview": PreviewOptions()})
    assert request.HasField("clip_guidance")
    assert fields_of(request.clip_guidance) == {}
    assert request.HasField("preview")


def test_the_timeout_is_not_part_of_the_message() -> None:
    assert to_request("a lake", {"timeout": 3.0}) == to_request("a lake", {})


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("a lake", [("a lake", None)]),
        (Prompt("a lake", 2), [("a lake", 2)]),
        (["a lake", Prompt("boats"), ("trees", -1)], [("a lake", None), ("boats", None), ("trees", -1)]),
        (("a lake", "boats"), [("a lake", None), ("boats", None)]),
        ([], []),
    ],
)
def test_prompts_are_texts_prompts_and_weighted_tuples(
    prompts: Prompts, expected: list[tuple[str, float | None]]
) -> None:
    read = to_request(prompts, {}).prompts
    assert [(item.text, item.weight if item.HasField("weight") else None) for item in read] == expected


@pytest.mark.parametrize("prompts", [("a lake", 2.0), 7, [None], [("a", 1, 2)], [("a", "b")]])
def test_anything_else_is_no_prompt(prompts: Any) -> None:
    with pytest.raises(TypeError):
        to_request(prompts, {})


def test_loras_are_weights_by_name_or_say_more() -> None:
    said = to_request("a lake", {"loras": [Lora("ink", 0.5), Lora("detail")]})
    assert [(lora.name, lora.weight, lora.HasField("weight")) for lora in said.loras] == [
        ("ink", 0.5, True),
        ("detail", 0, False),
    ]
    assert to_request("a lake", {"loras": {"ink": 0.5}}) == to_request("a lake", {"loras": [Lora("ink", 0.5)]})


def test_every_field_of_the_contract_is_an_option() -> None:
    fields = set(generation_pb2.GenerateRequest.DESCRIPTOR.fields_by_name)
    assert GenerateOptions.__annotations__.keys() - {"timeout"} == fields - {"prompts"}
    assert EVERYTHING.keys() | {"request_id"} == fields - {"prompts"}


@pytest.mark.parametrize(
    ("names", "enum"),
    [
        (Sampler, sampling_pb2.Sampler),
        (Schedule, sampling_pb2.Schedule),
        (Blending, generation_pb2.Blending),
        (Fit, generation_pb2.Fit),
    ],
)
def test_every_value_of_the_contracts_enums_has_its_name(names: Any, enum: Any) -> None:
    prefix = enum.DESCRIPTOR.name.upper()
    assert [f"{prefix}_{name}".upper() for name in get_args(names)] == enum.keys()[1:]


def test_the_resolved_request_is_what_generate_takes() -> None:
    prompts = (Prompt("a lake", 1.0, (Emphasis(0, 1, 0.0), Emphasis(2, 6, 1.3))), Prompt("trees", -0.3))
    resolved = read_back(to_request(prompts, {**EVERYTHING, "request_id": "r1"}))
    assert resolved == Accepted("r1", prompts, EVERYTHING, queue_position=0)


def test_accepted_says_how_long_each_prompt_is() -> None:
    usages = [generation_pb2.PromptUsage(tokens=3, chunks=1), generation_pb2.PromptUsage(tokens=80, chunks=2)]
    message = generation_pb2.GenerateResponse(accepted=generation_pb2.Accepted(prompt_usage=usages))
    event = to_event(message)
    assert isinstance(event, Accepted)
    assert event.prompt_usage == (PromptUsage(3, 1), PromptUsage(80, 2))


@pytest.mark.parametrize("connect", [Client, BlockingTwin], ids=["sync", "async"])
def test_generating_what_was_accepted_sends_the_same_request(connect: Any) -> None:
    with serving() as service, connect(service.target) as client:
        with client.stream(["a lake", ("trees", -0.3)], **EVERYTHING) as events:
            accepted = next(events)
        client.generate(accepted.prompts, **accepted.options)
    first, second = service.requests
    assert first == second


@example(value=3.4028234663852886e38, thousandths=0)
@given(st.floats(width=32, allow_nan=False), st.integers(-(10**6), 10**6))
def test_a_float_survives_the_wire_and_looks_as_it_was_written(value: float, thousandths: int) -> None:
    request = to_request("a lake", {"guidance_scale": value})
    assert to_request("a lake", read_back(request).options) == request
    written = thousandths / 1000
    assert read_back(to_request("a lake", {"guidance_scale": written})).options == {"guidance_scale": written}


def test_a_sampler_that_only_a_newer_server_knows_is_left_out() -> None:
    request = generation_pb2.GenerateRequest(steps=3)
    request.sampler = 99  # type: ignore[assignment]
    assert read_back(request).options == {"steps": 3}


def test_all_values_that_the_message_cannot_hold_are_told_at_once_and_nothing_is_sent() -> None:
    options: Any = {"width": 2**31, "seed": 2**63, "sampler": "euler_a", "steps": 20}
    with serving() as service, Client(service.target) as client, pytest.raises(InvalidRequestError) as caught:
        client.generate("a lake", **options)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert caught.value.violations.keys() == {"width", "seed", "sampler"}
    assert caught.value.violations["sampler"].startswith("'euler_a' is none of ddim, euler, euler_ancestral")
    assert service.requests == []


@pytest.mark.parametrize(
    ("options", "named"),
    [({"widht": 64}, "no option 'widht'"), ({"prompt": "x"}, "no option 'prompt'"), ({"steps": "20"}, "steps: ")],
)
def test_a_mistaken_option_is_named(options: Any, named: str) -> None:
    with pytest.raises(TypeError, match=named):
        to_request("a lake", options)

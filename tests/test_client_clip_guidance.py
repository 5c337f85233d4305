"""CLIP guidance in the SDK and on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fake_service import ENGINE, accepted, one_image, serving
from sdapi.v1 import engine_pb2, generation_pb2
from sdclient import ClipGuidance, ClipGuidancePreset, ClipGuidanceSupport
from sdclient.__main__ import main
from sdclient._wire import to_engines, to_event, to_request

if TYPE_CHECKING:
    from pathlib import Path


def sent(*flags: str) -> generation_pb2.GenerateRequest:
    """The request that `sdclient generate` sends."""
    with serving(one_image) as service:
        assert main(["generate", "a lake", *flags, "--server", service.target]) == 0
    [request] = service.requests
    return request


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands write into an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--clip-guidance"], {}),
        (["--clip-guidance", "0"], {"scale": 0}),
        (["--clip-guidance", "0.5"], {"scale": 0.5}),
        (["--clip-guidance", "strong"], {"preset": "strong"}),
        (["--clip-guidance=strong", "--clip-prompt", "the sun"], {"preset": "strong", "prompt": "the sun"}),
        (["--clip-prompt", "the sun"], {"prompt": "the sun"}),
        (["--clip-cutouts", "0", "--clip-start", "0", "--clip-end", "1"], {"cutouts": 0, "start": 0, "end": 1}),
        (["--clip-exact"], {"exact": True}),
    ],
)
def test_each_flag_turns_it_on_and_says_its_part(flags: list[str], message: dict[str, float | str]) -> None:
    request = sent(*flags)
    assert request.HasField("clip_guidance")
    assert request.clip_guidance == generation_pb2.ClipGuidance(**message)  # type: ignore[arg-type]


def test_without_its_flags_it_is_off() -> None:
    assert not sent().HasField("clip_guidance")


def test_what_is_none_is_left_to_the_preset() -> None:
    message = to_request("a lake", {"clip_guidance": ClipGuidance()})
    assert message.HasField("clip_guidance")
    assert message.clip_guidance == generation_pb2.ClipGuidance()


def test_the_resolved_guidance_comes_back_as_it_is_sent() -> None:
    guidance = ClipGuidance(scale=0.6, cutouts=0, start=0.0, end=0.7, prompt="the sun", exact=True)
    request = to_request("a lake", {"clip_guidance": guidance})
    event = to_event(accepted(request))
    assert event is not None
    assert event.options["clip_guidance"] == guidance  # type: ignore[union-attr]


def test_an_engine_says_what_it_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    engine = engine_pb2.Engine()
    engine.CopyFrom(ENGINE)
    presets = [
        engine_pb2.ClipGuidancePreset(name="soft", scale=0.3, cutouts=0, start=0, end=0.6, steps_per_gradient=2),
        engine_pb2.ClipGuidancePreset(name="hard", scale=2, cutouts=8, start=0.1, end=1, steps_per_gradient=1),
    ]
    engine.clip_guidance.CopyFrom(engine_pb2.ClipGuidanceSupport(presets=presets, exact=True))
    listed, without = to_engines(generation_pb2.ListEnginesResponse(engines=[engine, ENGINE]))
    assert listed.clip_guidance == ClipGuidanceSupport(
        (ClipGuidancePreset("soft", 0.3, 0, 0.0, 0.6, 2), ClipGuidancePreset("hard", 2.0, 8, 0.1, 1.0, 1)), exact=True
    )
    assert without.clip_guidance is None
    with serving() as service:
        service.engines = [engine]
        assert main(["engines", "--server", service.target]) == 0
    # A long line is folded inside its cell.
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "soft: scale 0.3, cutouts 0, steps 0% to 60%, a gradient serves 2" in shown

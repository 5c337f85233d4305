"""What the SDK and the command line make of the server's safety check."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from fake_service import Call, Responses, accepted, finished, image, serving
from sdapi.v1 import engine_pb2, generation_pb2
from sdclient import BlockedImageError, Client, Engine, Safety, SafetyScore
from sdclient.__main__ import main
from sdclient._wire import to_engines

if TYPE_CHECKING:
    from pathlib import Path

    from sdclient import Image

SCORES = [
    generation_pb2.SafetyScore(label="night", score=0.97, threshold=0.6),
    generation_pb2.SafetyScore(label="fog", score=0.1, threshold=0.5),
]


def judged(index: int, outcome: int, data: bytes) -> generation_pb2.GenerateResponse:
    response = image(index, seed=40 + index, data=data)
    response.image.safety.CopyFrom(generation_pb2.Safety(outcome=outcome, scores=SCORES))  # type: ignore[arg-type]
    return response


def every_outcome(request: generation_pb2.GenerateRequest, call: Call) -> Responses:
    yield accepted(request)
    yield judged(0, generation_pb2.SAFETY_OUTCOME_PASSED, b"png 0")
    yield judged(1, generation_pb2.SAFETY_OUTCOME_FLAGGED, b"png 1")
    yield judged(2, generation_pb2.SAFETY_OUTCOME_BLURRED, b"png 2")
    yield judged(3, generation_pb2.SAFETY_OUTCOME_BLOCKED, b"")
    yield judged(4, 99, b"png 4")
    yield finished()


@pytest.fixture
def images() -> list[Image]:
    with serving(every_outcome) as service, Client(service.target) as client:
        return client.generate("a lake")


def test_each_image_says_what_was_done_with_it_and_why(images: list[Image]) -> None:
    safeties = [image.safety for image in images if image.safety is not None]
    assert [safety.outcome for safety in safeties] == ["passed", "flagged", "blurred", "blocked", None]
    scores = (SafetyScore("night", 0.97, 0.6), SafetyScore("fog", 0.1, 0.5))
    assert safeties[0] == Safety("passed", scores)
    assert safeties[0].reached == scores[:1]


def test_generate_returns_a_blocked_image_among_the_others(images: list[Image]) -> None:
    assert [image.blocked for image in images] == [False, False, False, True, False]


def test_a_blocked_image_cannot_be_taken_for_a_picture(images: list[Image], tmp_path: Path) -> None:
    blocked = images[3]
    for use in (lambda: blocked.save(tmp_path / "a.png"), blocked.to_pil, blocked.show, lambda: blocked.metadata):
        with pytest.raises(
            BlockedImageError, match=r"image 3 was blocked by the server's safety check \(night 0\.97\)"
        ):
            use()
    assert list(tmp_path.iterdir()) == []
    assert blocked._repr_png_() is None


def test_a_server_without_a_check_says_nothing() -> None:
    with serving() as service, Client(service.target) as client:
        [made] = client.generate("a lake")
    assert made.safety is None
    assert not made.blocked


@pytest.mark.parametrize(
    ("number", "mode"), [(0, None), (1, "off"), (2, "flag"), (3, "blur"), (4, "block"), (99, None)]
)
def test_an_engine_says_what_the_check_does(number: int, mode: str | None) -> None:
    message = engine_pb2.Engine(id="tiny", safety_mode=number)  # type: ignore[arg-type]
    [engine] = to_engines(generation_pb2.ListEnginesResponse(engines=[message]))
    assert isinstance(engine, Engine)
    assert engine.safety_mode == mode


# The command line


def test_the_command_line_says_what_was_done_and_ends_with_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with serving(every_outcome) as service:
        status = main(["generate", "a lake", "--server", service.target, "-o", "{index}.png"])
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert status == 3
    assert {path.name for path in tmp_path.iterdir()} == {"0.png", "1.png", "2.png", "4.png"}
    assert "safety" not in lines[0]
    assert lines[1].endswith("  flagged by the safety check: night 0.97")
    assert lines[2].endswith("  blurred by the safety check: night 0.97")
    assert lines[3].startswith("no file  64x32  seed 43  ")
    assert lines[3].endswith("  blocked by the safety check: night 0.97")
    assert lines[4].endswith("  changed by the safety check: night 0.97")
    assert "has blocked 1 of 5 images" in told.err


def test_json_has_the_scores_and_no_path_for_a_blocked_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with serving(every_outcome) as service:
        assert main(["generate", "a lake", "--server", service.target, "-o", "{index}.png", "--json"]) == 3
    made = json.loads(capsys.readouterr().out)["images"]
    assert [one["path"] for one in made] == ["0.png", "1.png", "2.png", None, "4.png"]
    assert made[3]["safety"] == {
        "outcome": "blocked",
        "scores": [
            {"label": "night", "score": 0.97, "threshold": 0.6},
            {"label": "fog", "score": 0.1, "threshold": 0.5},
        ],
    }

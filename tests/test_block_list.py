"""The prompt block list: what counts as the same words, which prompts are searched, and what the caller learns."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

import grpc
import pytest
from calls import a_request, details_of, events_of, failure_of, images_of, violations_of
from google.rpc import error_details_pb2
from hypothesis import example, given
from hypothesis import strategies as st
from sdapi.v1 import generation_pb2
from sdapi.v1.generation_pb2_grpc import GenerationServiceStub
from sdserver.block_list import BlockList, BlockListError, normalized, read_block_list
from sdserver.server import Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fakes import FakeBackend
    from sdapi.v1.generation_pb2_grpc import GenerationServiceAsyncStub
    from sdserver.settings import ServeSettings

WORDS = st.text("abé", min_size=1, max_size=2)
BETWEEN = st.text(" ,._-\n\u3000", min_size=1, max_size=3)
INVISIBLE = "\u200b\u200d\ufeff\u00ad\u2060\ufe0f\u0336\U000e0001"


# What is found


@st.composite
def texts(draw: st.DrawFn) -> tuple[list[str], str]:
    """Words, and a text of them with other case, width, separators and invisible characters."""
    words = draw(st.lists(WORDS, max_size=6))
    text = draw(st.text(" ,.!", max_size=2))
    for word in words:
        for letter in word:
            forms = [letter, letter.upper(), unicodedata.normalize("NFD", letter)]
            if letter.isascii():
                forms.append(chr(ord(letter) + 0xFEE0))
            text += draw(st.sampled_from(forms)) + draw(st.text(INVISIBLE, max_size=1))
        text += draw(BETWEEN)
    return words, text


@given(texts(), st.lists(st.lists(WORDS, min_size=1, max_size=2), max_size=4))
def test_an_entry_is_found_where_its_words_follow_each_other_however_they_are_written(
    text: tuple[list[str], str], entries: list[list[str]]
) -> None:
    words, written = text
    lines = [
        line
        for line, entry in enumerate(entries)
        if any(words[start : start + len(entry)] == entry for start in range(len(words)))
    ]
    found = BlockList((line, "-".join(entry)) for line, entry in enumerate(entries)).find(written)
    # Of several entries any may be named, and of equal ones the first.
    assert found is None if not lines else found in lines


@given(texts())
def test_texts_are_the_same_whatever_their_case_width_separators_and_invisible_characters(
    text: tuple[list[str], str],
) -> None:
    words, written = text
    assert normalized(written) == " ".join(words)


@given(st.text())
@example("\u0345")
@example("\u1fb3\u0301")
@example("\u3164a\uffa0")
def test_normalizing_twice_changes_nothing(text: str) -> None:
    once = normalized(text)
    assert normalized(once) == once


@pytest.mark.parametrize(
    ("entry", "found", "not_found"),
    [
        (
            "cat",
            ["a Cat, sleeping", "CAT", "cat's", "the_cat", "c\uff41t", "c\u200bat", "ca\u0336t\u0336"],
            ["cats", "concat"],
        ),
        ("cat*", ["cats", "a cat"], ["concat"]),
        ("*cat", ["concat", "a cat"], ["cats"]),
        ("*cat*", ["concatenate"], ["c at"]),
        ("cat fight*", ["a cat-fight", "Cat\n\nFights"], ["fight cat", "cat and fight"]),
        ("straße", ["STRASSE", "Straße"], ["strase"]),
        ("café", ["CAFE\u0301"], ["cafe"]),
        ("猫", ["一只黑猫在屋顶"], ["狗"]),
        ("黒猫", ["夜の黒猫"], ["黒い猫"]),
        ("แมว", ["ภาพแมวดำ"], ["หมา"]),
        ("हिंदी", ["यह हिंदी है"], ["हद"]),
        ("3 cats", ["3  CATS"], ["33 cats"]),
    ],
)
def test_entries_are_whole_words_unless_a_star_opens_them(entry: str, found: list[str], not_found: list[str]) -> None:
    entries = BlockList([(7, entry)])
    assert [entries.find(text) for text in found] == [7] * len(found)
    assert [entries.find(text) for text in not_found] == [None] * len(not_found)


def test_an_empty_list_finds_nothing() -> None:
    assert BlockList([]).find("anything") is None


# The file


def test_a_file_has_one_entry_a_line_comments_and_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "blocked.txt"
    path.write_bytes("\ufeffcat\r\n\n# dog\n  bird song  \nCAT\nnaïve\n".encode())
    entries = read_block_list(path)
    assert len(entries) == 3
    assert [entries.find(text) for text in ("cat", "dog", "bird-song", "NAÏVE")] == [1, None, 4, 6]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"cat\n/c.t/\n", "line 2: '/c.t/' looks like a regular expression"),
        (b"cat\n\nc*t\n", "line 3: 'c.t' has a . inside; it can only be first or last"),
        (b"***\n", "line 1: .* has no letters and no digits"),
        (b"cat\n!!\n", "line 2: '!!' has no letters"),
        (b"cat\ndog\n\xff\xfe\n", "line 3: is not UTF-8"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "blocked.txt"
    path.write_bytes(content)
    with pytest.raises(BlockListError, match=f"blocked.txt, {said}"):
        read_block_list(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BlockListError, match=r"cannot read the prompt block list .*nope\.txt: No such file"):
        read_block_list(tmp_path / "nope.txt")


async def test_the_server_does_not_start_with_a_wrong_file(settings: ServeSettings, tmp_path: Path) -> None:
    path = tmp_path / "blocked.txt"
    path.write_text("c*t")
    with pytest.raises(BlockListError, match="line 1"):
        async with Server(settings.model_copy(update={"prompt_block_list": path})):
            pass


# Requests


@pytest.fixture
async def stub(
    settings: ServeSettings, backend: FakeBackend, tmp_path: Path
) -> AsyncIterator[GenerationServiceAsyncStub]:
    path = tmp_path / "blocked.txt"
    path.write_text("cat\nsecret plan*\n")
    async with (
        Server(settings.model_copy(update={"prompt_block_list": path}), backend) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield GenerationServiceStub(channel)


def prompts(*weighted: tuple[str, float]) -> list[generation_pb2.Prompt]:
    return [generation_pb2.Prompt(text=text, weight=weight) for text, weight in weighted]


async def test_a_blocked_prompt_is_named_with_all_that_is_wrong_before_any_model_is_called(
    stub: GenerationServiceAsyncStub, backend: FakeBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    request = a_request(
        prompts=prompts(("a CAT", 1), ("a lake", 1), ("the Secret Plans", 0), ("x" * 10_001, 1)), steps=0
    )
    error = await failure_of(stub, request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details_of(error, error_details_pb2.ErrorInfo).reason == "PROMPT_BLOCKED"
    violations = violations_of(error)
    assert violations.keys() == {"prompts[0].text", "prompts[2].text", "prompts[3].text", "steps"}
    assert (
        violations["prompts[0].text"]
        == violations["prompts[2].text"]
        == ("is not allowed by this server; say it in other words")
    )
    assert backend.calls == 0
    # The caller does not learn what the list holds; the log says where to look.
    assert "secret" not in (error.details() or "").lower()
    assert "{'prompts[0].text': 1, 'prompts[2].text': 2}" in capsys.readouterr().out


async def test_other_violations_alone_are_no_blocked_prompt(stub: GenerationServiceAsyncStub) -> None:
    error = await failure_of(stub, a_request(steps=0))
    assert details_of(error, error_details_pb2.ErrorInfo).reason == "INVALID_REQUEST"


async def test_a_negative_prompt_may_name_what_it_keeps_out(stub: GenerationServiceAsyncStub) -> None:
    weighted = prompts(("a garden", 1), ("a cat", -1))
    assert images_of(await events_of(stub, a_request(prompts=weighted, guidance_scale=1.0)))


async def test_a_negative_prompt_that_would_be_drawn_is_blocked(stub: GenerationServiceAsyncStub) -> None:
    weighted = prompts(("a garden", 1), ("a cat", -1))
    error = await failure_of(stub, a_request(prompts=weighted, guidance_scale=0.99))
    assert violations_of(error).keys() == {"prompts[1].text"}


async def test_emphasis_hides_nothing(stub: GenerationServiceAsyncStub) -> None:
    emphasis = [generation_pb2.Emphasis(start=2, end=4, factor=0.0)]
    error = await failure_of(stub, a_request(prompts=[generation_pb2.Prompt(text="a cat", emphasis=emphasis)]))
    assert violations_of(error).keys() == {"prompts[0].text"}


async def test_the_prompt_of_clip_guidance_is_searched(stub: GenerationServiceAsyncStub) -> None:
    error = await failure_of(stub, a_request(clip_guidance=generation_pb2.ClipGuidance(prompt="a cat")))
    assert "clip_guidance.prompt" in violations_of(error)

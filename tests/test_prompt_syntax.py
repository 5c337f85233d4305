"""Prompt syntax: what is syntax, what is text, what is an error; and that reading undoes writing."""

from __future__ import annotations

import doctest
import pickle
import re
import shlex
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fake_service import one_image, serving
from hypothesis import example, given
from hypothesis import strategies as st
from sdclient import (
    Emphasis,
    InvalidRequestError,
    Prompt,
    PromptSyntaxError,
    format_prompts,
    parse_prompts,
)
from sdclient.__main__ import main
from sdclient._wire import to_request

DOCUMENT = (Path(__file__).parents[1] / "docs/prompts.md").read_text()
ANNOUNCED = "a portrait : 2 | blender, cropped : -2"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)


# ------------------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("", []),
        (" | |", []),
        ("a lake", [("a lake", None)]),
        ("  a  lake\n", [("a  lake", None)]),
        ("a lake | | trees", [("a lake", None), ("trees", None)]),
        (ANNOUNCED, [("a portrait", 2), ("blender, cropped", -2)]),
        (
            "85 mm, centered composition : 2 | blender, closed eyes : -2",
            [("85 mm, centered composition", 2), ("blender, closed eyes", -2)],
        ),
        (
            "| disfigured, ugly:-1.0, too many fingers:-1.0",
            [("disfigured, ugly", -1), ("too many fingers", -1)],
        ),
        ("| disfigured, ugly:-1.0 | too many fingers:-1.0,", [("disfigured, ugly", -1), ("too many fingers", -1)]),
        ("a:2", [("a", 2)]),
        ("a:2 | b:3", [("a", 2), ("b", 3)]),
        ("a :2, b: +.5,c : 1. ", [("a", 2), ("b", 0.5), ("c", 1)]),
        ("a : 0 | b : -0.0", [("a", 0), ("b", 0)]),
        ("a : 1e-3 | b : 5E0", [("a", 0.001), ("b", 5)]),
        ("a : 10 | b : -10", [("a", 10), ("b", -10)]),
        ("ugly : \u22121 | cropped:\u20130.5", [("ugly", -1), ("cropped", -0.5)]),
        ("a: b : 2", [("a: b", 2)]),
        ("a:: -1", [("a:", -1)]),
        ("\u732b:2|\u72ac:-1", [("\u732b", 2), ("\u72ac", -1)]),
    ],
)
def test_a_number_at_the_end_of_a_prompt_is_its_weight(text: str, prompts: list[tuple[str, float | None]]) -> None:
    assert parse_prompts(text) == tuple(Prompt(text, weight) for text, weight in prompts)


@pytest.mark.parametrize(
    "text",
    [
        "16:9",
        "ratio 16:9",
        "at 12:30",
        "at 12:30, raining",
        "12:30:15",
        "7:05 pm",
        "scale 1:2",
        "2.39:1",
        "1:1.85",
        "\u6bd4\u4f8b16:9",
        "-3:2",
        "http://x:8080",
        "see http://x:8080, at night",
        "https://example.org/a:1",
        "chapter:3 of a book",
        "f:1.8 lens",
        "a: b",
        "a:",
        ": a",
        "a:\u0662",
        "a: -",
        "a:1e",
        "a:1.5.2",
        "a,b",
        "a happy dog :)",
        "a sad dog :(",
        "a) lake, b) sea",
        ":) and :(",
        "] [ and ) (",
        "(a b] c",
        "main() of f[]",
        "<lora:x:0.8>",
        "a BREAK b AND {c}",
        "C:\\art\\2",
        "a\\",
    ],
)
def test_what_nobody_meant_as_syntax_is_text(text: str) -> None:
    assert parse_prompts(text) == (Prompt(text),)


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("16:9 : 2", Prompt("16:9", 2)),
        ("16:9: 2", Prompt("16:9", 2)),
        ("16 : 9", Prompt("16", 9)),
        ("in 1980:-1", Prompt("in 1980", -1)),
        ("model 2 : 1.5", Prompt("model 2", 1.5)),
        ("engine 5:1.3", Prompt("engine 5", 1.3)),
        ("sd 2.1:1.3", Prompt("sd 2.1", 1.3)),
        ("11:1.5", Prompt("11", 1.5)),
        ("http://x:80 : 2", Prompt("http://x:80", 2)),
        ("main() : 2", Prompt("main()", 2)),
        ("a happy dog :) : 2", Prompt("a happy dog :)", 2)),
    ],
)
def test_white_space_a_sign_or_a_fraction_tells_a_weight_from_a_ratio(text: str, prompt: Prompt) -> None:
    assert parse_prompts(text) == (prompt,)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (r"a\:2", "a:2"),
        (r"a \: 2", "a : 2"),
        (r"a \| b", "a | b"),
        (r"\(a\) \[b\]", "(a) [b]"),
        (r"\(a:1.3\) b", "(a:1.3) b"),
        (r"a\\", "a\\"),
        (r"a\\\:2", "a\\:2"),
        (r"C:\art\b", r"C:\art\b"),
        ("\\ a\\\t", " a\t"),
    ],
)
def test_a_backslash_makes_text_of_a_mark(text: str, plain: str) -> None:
    assert parse_prompts(text) == (Prompt(plain),)


# ----------------------------------------------------------------------------------------------------------- emphasis


@pytest.mark.parametrize(
    ("text", "plain", "emphasis"),
    [
        ("(trees)", "trees", [(0, 5, 1.1)]),
        ("((trees))", "trees", [(0, 5, 1.21)]),
        ("(((trees)))", "trees", [(0, 5, 1.331)]),
        ("[trees]", "trees", [(0, 5, 1 / 1.1)]),
        ("([trees])", "trees", [(0, 5, 1)]),
        ("(trees:1.3)", "trees", [(0, 5, 1.3)]),
        ("(trees:0)", "trees", [(0, 5, 0)]),
        ("(trees : 1.3)s", "treess", [(0, 5, 1.3)]),
        (r"(trees\ : 1.3)s", "trees s", [(0, 6, 1.3)]),
        ("a (big (lake:1.5) here:1.2) b", "a big lake here b", [(2, 6, 1.2), (6, 10, 1.8), (10, 15, 1.2)]),
        ("(a)(b)", "ab", [(0, 1, 1.1), (1, 2, 1.1)]),
        (" ( a b ) ", "a b", [(0, 3, 1.1)]),
        ("( ) a", "a", []),
        ("(16:9)", "16:9", [(0, 4, 1.1)]),
        ("(engine 5:1.3)", "engine 5", [(0, 8, 1.3)]),
        ("(http://x:80)", "http://x:80", [(0, 11, 1.1)]),
        ("(main())", "main()", [(0, 6, 1.1)]),
        ("(a [b) c]", "a [b c]", [(0, 4, 1.1)]),
        ("a :( b (c:2)", "a :( b c", [(7, 8, 2)]),
        (r"(a\):2)", "a)", [(0, 2, 2)]),
        ("\U0001f30a(\u732b:2)", "\U0001f30a\u732b", [(1, 2, 2)]),
        ("a (lake:1.3) : 2", "a lake", [(2, 6, 1.3)]),
    ],
)
def test_brackets_emphasise_a_part_of_the_text(text: str, plain: str, emphasis: list[tuple[int, int, float]]) -> None:
    [prompt] = parse_prompts(text)
    assert prompt.text == plain
    assert prompt.emphasis == tuple(Emphasis(*part) for part in emphasis)


def test_each_prompt_has_its_own_emphasis_and_weight() -> None:
    assert parse_prompts("a (lake) : 2 | [trees:] : -1, (fog)") == (
        Prompt("a lake", 2, (Emphasis(2, 6, 1.1),)),
        Prompt("trees:", -1, (Emphasis(0, 6, 1 / 1.1),)),
        Prompt("fog", None, (Emphasis(0, 3, 1.1),)),
    )


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("text", "column", "problem"),
    [
        ("a : 11", 5, "the weight 11 is not from -10 to 10"),
        ("a:-10.01, b", 3, "the weight -10.01 is not from -10 to 10"),
        ("a : nan", 5, "the weight nan is not from -10 to 10"),
        ("a:-inf", 3, "the weight -inf is not from -10 to 10"),
        ("a:1e999", 3, "the weight 1e999 is not from -10 to 10"),
        ("iso:400", 5, r"or write \: for the colon itself"),
        ("a : 1,5", 6, "leave a space after a comma"),
        ("a | : 2", 5, "nothing stands before this weight"),
        ("a:1, :2", 6, "nothing stands before this weight"),
        ("(trees:1.3", 1, r"this bracket is not closed: close it, or write \("),
        ("a [trees : 2 | b", 3, r"this bracket is not closed: close it, or write \["),
        ("(a [b:1.3)", 4, "this bracket is not closed"),
        ("trees:1.3)", 10, r"no bracket is open here: open one, or write \)"),
        ("(a:1.3] b)", 7, r"no bracket is open here: open one, or write \]"),
        ("(a:1.2, b)", 3, "a number is for a whole bracket"),
        ("(:1.2)", 2, "nothing stands before this factor"),
        ("a ( : 1.2)", 5, "nothing stands before this factor"),
        ("(a:-1)", 4, "the factor -1 is not from 0 to 10: what the image should not show is a prompt of its own"),
        ("(a:10.1)", 4, "the factor 10.1 is not from 0 to 10"),
        ("((a:9):9)", 2, "the brackets multiply to 81; at most 10"),
        ("[trees:1.3]", 7, "square brackets take no number"),
        ("[cat:dog:0.5]", 9, "square brackets take no number"),
        ("[cat|dog]", 5, r"| ends the prompt inside of a bracket: close that first, or write \|"),
    ],
)
def test_an_error_points_at_its_column(text: str, column: int, problem: str) -> None:
    with pytest.raises(PromptSyntaxError) as caught:
        parse_prompts(text)
    assert caught.value.column == column
    sentence, shown, caret = str(caught.value).split("\n")
    assert sentence.startswith(f"column {column}: ")
    assert problem in sentence
    assert shown == f"    {text}"
    assert caret == f"    {' ' * (column - 1)}^"


@pytest.mark.parametrize(
    ("text", "shown", "caret"),
    [
        ("\u732b : 11", "    \u732b : 11", "         ^"),
        ("e\u0301 : 11", "    e\u0301 : 11", "        ^"),
        ("a\nb\x1b : 11", "    a b  : 11", "           ^"),
        ("x" * 50 + " : 11" + " " * 50, f"    ...{'x' * 37} : 11{' ' * 28}...", f"    {' ' * 43}^"),
    ],
)
def test_the_caret_stands_below_its_character_on_a_terminal(text: str, shown: str, caret: str) -> None:
    with pytest.raises(PromptSyntaxError) as caught:
        parse_prompts(text)
    assert str(caught.value).split("\n")[1:] == [shown, caret]


def test_a_syntax_error_is_a_value_error_and_can_be_pickled() -> None:
    with pytest.raises(ValueError, match="column 5") as caught:
        parse_prompts("a : 11")
    error = caught.value
    assert isinstance(error, InvalidRequestError)
    assert f"{type(error).__module__}.{type(error).__name__}" == "sdclient.PromptSyntaxError"
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (PromptSyntaxError, str(error), vars(error))


# --------------------------------------------------------------------------------------------------------- round trip

SNIPPETS = ["16:9", "1:1.85", ":2", " : -1.5", ":nan", "://x:80", "::", ":)", "()", "2.1:1.3", "5:", ",", "\\", "\\ "]
TEXTS = st.lists(
    st.sampled_from(SNIPPETS) | st.text("\\|:()[],.+- \t0159ae\u2212\u732b\u0301", max_size=5) | st.text(max_size=5),
    max_size=8,
).map("".join)


@st.composite
def valid_prompts(draw: st.DrawFn) -> Prompt:
    text = draw(TEXTS.filter(bool))
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=6)))
    parts = [pair for pair in pairwise(cuts) if draw(st.booleans())]
    emphasis = tuple(Emphasis(start, end, draw(st.floats(0, 10))) for start, end in parts)
    return Prompt(text, draw(st.none() | st.floats(-10, 10)), emphasis)


@example([Prompt("16", None, (Emphasis(0, 2, 5e-324),)), Prompt(":9", 5e-324)])
@example([Prompt("\\ ", 1), Prompt(" ", None, (Emphasis(0, 1, 1.0),))])
@example([Prompt("http://x", None, (Emphasis(0, 8, 1.3),))])
@given(st.lists(valid_prompts(), max_size=4))
def test_reading_undoes_writing(prompts: list[Prompt]) -> None:
    assert parse_prompts(format_prompts(prompts)) == tuple(prompts)


@given(TEXTS)
def test_writing_what_was_read_is_read_as_the_same(text: str) -> None:
    with suppress(PromptSyntaxError):
        prompts = parse_prompts(text)
        assert parse_prompts(format_prompts(prompts)) == prompts


@given(TEXTS)
def test_a_text_is_read_or_refused_at_one_of_its_characters(text: str) -> None:
    try:
        parse_prompts(text)
    except PromptSyntaxError as error:
        column = error.column
    else:
        column = 1
    assert 1 <= column <= max(1, len(text))


@given(st.text().map(lambda text: re.sub(r"[\\|:()\[\]]", "", text).strip()).filter(bool))
def test_a_text_without_marks_is_one_prompt(text: str) -> None:
    assert parse_prompts(text) == (Prompt(text),)
    assert format_prompts([Prompt(text)]) == text


def test_what_is_written_reads_well() -> None:
    assert format_prompts([Prompt("a portrait", 2), Prompt("blender, cropped", -2)]) == ANNOUNCED
    plain = "a lake at 12:30, 16:9, see http://x:8080/a, C:x, f:1.8 lens"
    assert format_prompts([Prompt(plain)]) == plain
    assert format_prompts([Prompt("a big lake", 1, (Emphasis(2, 5, 1.3),))]) == "a (big:1.3) lake : 1"


@pytest.mark.parametrize(
    ("prompt", "path"),
    [
        (Prompt(""), "text"),
        (Prompt("a", 10.5), "weight"),
        (Prompt("a", float("nan")), "weight"),
        (Prompt("ab", None, (Emphasis(1, 1, 2),)), "emphasis[0]"),
        (Prompt("ab", None, (Emphasis(0, 3, 2),)), "emphasis[0]"),
        (Prompt("ab", None, (Emphasis(-1, 1, 2),)), "emphasis[0]"),
        (Prompt("ab", None, (Emphasis(0, 2, 2), Emphasis(1, 2, 2))), "emphasis[1]"),
        (Prompt("ab", None, (Emphasis(0, 1, -1),)), "emphasis[0].factor"),
        (Prompt("ab", None, (Emphasis(0, 1, float("inf")),)), "emphasis[0].factor"),
    ],
)
def test_prompts_that_no_server_takes_are_not_written(prompt: Prompt, path: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        format_prompts([Prompt("fine"), prompt])
    assert caught.value.violations.keys() == {f"prompts[1].{path}"}


@pytest.mark.parametrize("unit", ["(", ")", "(]", "a:1,", "1:", "1.", " ", ": ", "[a]", "((a)", "://", "(a :1)", ":1e"])
def test_a_long_text_takes_time_in_proportion(unit: str) -> None:
    # Minutes, beyond the time limit of a test, if the time grew with the square.
    text = unit * (100_000 // len(unit)) + "."
    assert format_prompts(parse_prompts(text)) != ""


# ----------------------------------------------------------------------------------------------------- SDK and command


def sent(prompts: Any) -> list[tuple[str, float | None]]:
    read = to_request(prompts, {}).prompts
    return [(prompt.text, prompt.weight if prompt.HasField("weight") else None) for prompt in read]


def test_a_plain_text_is_read_and_a_prompt_is_taken_as_it_is() -> None:
    text = "a (big) lake : 2 | trees:-1"
    assert sent(ANNOUNCED) == [("a portrait", 2), ("blender, cropped", -2)]
    mixed = ["a lake | fog:0.5", Prompt(text), (text, 3)]
    assert sent(mixed) == [("a lake", None), ("fog", 0.5), (text, None), (text, 3)]
    assert sent(Prompt(text)) == [(text, None)]
    assert sent("") == []


def test_all_prompts_that_cannot_be_read_are_told_with_the_other_violations() -> None:
    options: Any = {"sampler": "euler_a"}
    with pytest.raises(InvalidRequestError) as caught:
        to_request(["a : 11", "a lake", "(b:1.2"], options)
    assert caught.value.violations.keys() == {"prompts[0]", "prompts[2]", "sampler"}
    assert caught.value.violations["prompts[2]"].endswith("\n    (b:1.2\n    ^")
    with pytest.raises(InvalidRequestError) as caught:
        to_request("a : 11", {})
    assert str(caught.value).startswith("prompts: column 5: ")
    assert str(caught.value).endswith("\n    a : 11\n        ^")


@pytest.mark.parametrize("prompts", ["fog | a (lake:1.5)", ["fog", Prompt("a lake", None, (Emphasis(2, 6, 1.5),))]])
def test_emphasis_is_sent(prompts: Any) -> None:
    fog, lake = to_request(prompts, {}).prompts
    assert (fog.text, list(fog.emphasis)) == ("fog", [])
    [part] = lake.emphasis
    assert (lake.text, part.start, part.end, part.factor) == ("a lake", 2, 6, 1.5)


def test_a_factor_of_0_is_a_value() -> None:
    [prompt] = to_request("a (lake:0)", {}).prompts
    assert prompt.emphasis[0].HasField("factor")


def test_the_command_line_reads_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with serving() as service:
        command = ["generate", "--server", service.target, "a lake : 2 | mist", "fog:0.5", "-N", "trees | ugly:2"]
        assert main(command) == 0
    [request] = service.requests
    assert [(prompt.text, prompt.weight) for prompt in request.prompts] == [
        ("a lake", 2),
        ("mist", 0),
        ("fog", 0.5),
        ("trees | ugly:2", -1),
    ]
    assert not request.prompts[1].HasField("weight")


def test_the_command_line_shows_the_caret(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a lake", "a portrait : 20"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "sdclient: the request is not valid\n  prompts[1]: column 14: the weight 20 is not from -10 to 10: "
    )
    assert error.splitlines()[2:] == [
        "    a portrait : 20",
        "                 ^",
    ]


# ----------------------------------------------------------------------------------------------------------- document


def test_the_examples_of_the_document_are_true() -> None:
    code = "\n".join(blocks("pycon"))
    test = doctest.DocTestParser().get_doctest(code, {}, "docs/prompts.md", "docs/prompts.md", 0)
    assert len(test.examples) > 8
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF)
    runner.run(test, out=report.append)
    assert report == []


def test_the_calls_of_the_document_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [python], [command] = blocks("python"), blocks("sh")
    with serving(one_image) as service:
        exec(python.replace("localhost:50051", service.target), {})
        assert main([*shlex.split(command)[1:], "--server", service.target]) == 0
    assert [len(request.prompts) for request in service.requests] == [3, 2]


def cells(heading: str) -> list[list[str]]:
    """The rows of the table under a heading, without the table's own heads."""
    section = DOCUMENT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def quoted(cell: str) -> list[str]:
    return [text.replace(r"\|", "|") for text in re.findall(r"`([^`]*)`", cell)]


def test_what_the_document_calls_text_is_text_and_what_it_calls_syntax_is_syntax() -> None:
    rows = cells("What is text")
    for _, texts, syntax in rows:
        assert quoted(texts)
        for text in quoted(texts):
            assert parse_prompts(text) == (Prompt(text),)
        for text in quoted(syntax):
            assert parse_prompts(text) != (Prompt(text),)


def test_what_the_document_calls_an_error_is_one() -> None:
    for texts, _ in cells("Errors"):
        assert quoted(texts)
        for text in quoted(texts):
            with pytest.raises(PromptSyntaxError):
                parse_prompts(text)

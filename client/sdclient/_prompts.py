r"""The syntax of weighted prompts, `a portrait : 2 | blender, cropped : -2`: from text to prompts and back.

docs/prompts.md has the grammar and its reasons. Two rules decide every doubt: what nobody can have meant as syntax is
text (`16:9`, a lone bracket), and what looks like syntax in a place where it cannot work is an error, never text.
Reading and writing take time in proportion to the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ._errors import InvalidRequestError, PromptSyntaxError
from ._types import Emphasis, Prompt

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_WEIGHT = 10.0
"""Greatest size of a prompt's weight, as in the contract."""

MAX_FACTOR = 10.0
"""Greatest factor of an emphasis; nested brackets multiply."""

BRACKET_FACTOR = 1.1
"""`(trees)` multiplies by it, `[trees]` divides by it."""

# Text that is copied from a typeset page has a minus sign or an en dash where a hyphen was.
_DASHES = {0x2212: "-", 0x2013: "-"}
_NUMBER = r"[+\-\u2212\u2013]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
# Text in spite of its colons: the rest of an address, ratios and times (16:9, 12:30:15, 2.39:1, 1:1.85), versions.
_PLAIN = (
    r"://[^\s|()\[\]\\]*"
    r"|[0-9]+(?:\.[0-9]+)*(?::[0-9]+)+(?!\.?[0-9])"
    r"|1:[0-9]+\.[0-9]+"
    r"|[0-9]+(?:\.[0-9]+)*"
)
_TOKEN = (
    r"\\(?P<escape>[\\|:()\[\]\s])"
    rf"|{_PLAIN}"
    rf"|\s*(?P<colon>:)\s*(?P<number>{_NUMBER})\s*(?P<end>,|(?=[|)\]])|\Z)"
    r"|(?P<mark>[|()\[\]])"
    r"|\s+|[^\s\\|:()\[\]0-9]+|[\\:]"
)
_ESCAPED = rf"(?P<plain>{_PLAIN})|[\\|()\[\]]|:(?=\s*{_NUMBER}\s*(?:,|\Z))"
_OPENING = {")": "(", "]": "["}


def parse_prompts(text: str) -> tuple[Prompt, ...]:
    """Read prompt syntax. Parts without text vanish, so an empty text gives no prompts.

    Raises PromptSyntaxError, whose message shows the place.
    """
    return _Parser(text).parse()


def format_prompts(prompts: Iterable[Prompt]) -> str:
    """Write prompts in prompt syntax: `parse_prompts` reads the same prompts from it.

    Raises InvalidRequestError for prompts that no server takes: an empty text, a weight or a factor out of range, parts
    that overlap, are empty or lie outside of the text.
    """
    prompts = tuple(prompts)
    violations: dict[str, str] = {}
    for index, prompt in enumerate(prompts):
        violations |= _violations(f"prompts[{index}]", prompt)
    if violations:
        message = "; ".join(f"{path}: {problem}" for path, problem in violations.items())
        raise InvalidRequestError(message, code="INVALID_ARGUMENT", violations=violations)
    return " | ".join(_format(prompt) for prompt in prompts)


# ------------------------------------------------------------------------------------------------------------ reading


class _Token(NamedTuple):
    kind: str
    """`text`, `escape`, `weight`, or the mark itself: one of | ( ) [ ]"""
    at: int
    """Where it stands; the colon of a weight."""
    text: str
    """What it adds to the prompt's text."""
    number: str = ""
    """A weight's number as it is written."""
    number_at: int = 0
    end: int = 0
    """The character after a weight and its comma."""
    comma: bool = False
    """Whether a comma ends the weight."""


class _Bracket(NamedTuple):
    """A bracket that is open at this point."""

    index: int
    """Its token."""
    start: int
    """Where its part begins in the prompt's text."""
    factor: float
    """Of its text, those around it included."""


@dataclass(slots=True)
class _Draft:
    """A prompt of which the end has not been read."""

    pieces: list[str] = field(default_factory=list)
    length: int = 0
    first: int | None = None
    """The first character that is not white space at the start; None: there is no text yet."""
    last: int = 0
    """After the last character that is not white space at the end."""
    stretch: int = 0
    """Where the last bracket stood."""
    emphasis: list[Emphasis] = field(default_factory=list)
    unclosed: _Token | None = None
    """The last opening bracket that is text because nothing closes it."""

    def add(self, text: str, *, escaped: bool = False) -> None:
        if escaped or not text.isspace():
            if self.first is None:
                self.first = self.length
            self.last = self.length + len(text)
        self.pieces.append(text)
        self.length += len(text)

    def end_stretch(self, factor: float | None) -> None:
        """The characters since the last bracket have this factor."""
        if factor is not None and self.stretch < self.length:
            self.emphasis.append(Emphasis(self.stretch, self.length, factor))
        self.stretch = self.length

    def prompt(self, weight: float | None) -> Prompt | None:
        if self.first is None:
            return None
        first, last = self.first, self.last
        clipped = [(max(part.start, first), min(part.end, last), part.factor) for part in self.emphasis]
        return Prompt(
            "".join(self.pieces)[first:last],
            weight,
            tuple(Emphasis(start - first, end - first, factor) for start, end, factor in clipped if start < end),
        )


class _Parser:
    def __init__(self, source: str) -> None:
        self._source = source
        self._tokens = [_token(match) for match in re.finditer(_TOKEN, source)]
        self._partners = self._pair()
        self._open: list[_Bracket] = []
        self._draft = _Draft()
        self._prompts: list[Prompt] = []

    def parse(self) -> tuple[Prompt, ...]:
        for index, token in enumerate(self._tokens):
            if token.kind == "weight":
                self._read_weight(index, token)
            elif token.kind == "|":
                self._end_prompt(None)
            elif index not in self._partners:
                if token.kind in _OPENING.values():
                    self._draft.unclosed = token
                self._draft.add(token.text, escaped=token.kind == "escape")
            elif token.kind in _OPENING:
                self._draft.end_stretch(self._open.pop().factor)
            else:
                self._open_bracket(index, token)
        self._end_prompt(None)
        return tuple(self._prompts)

    def _pair(self) -> dict[int, int]:
        """Each bracket -> its partner. A bracket without a partner or with nothing to hold is text."""
        partners: dict[int, int] = {}
        opened: list[int] = []
        # How many of each kind are in `opened`: a closing bracket without partner does not search it.
        counts = dict.fromkeys(_OPENING.values(), 0)
        bar = -1
        for index, token in enumerate(self._tokens):
            if token.kind == "|":
                bar = token.at
            elif token.kind in counts:
                opened.append(index)
                counts[token.kind] += 1
            elif token.kind in _OPENING and counts[_OPENING[token.kind]]:
                opener = ""
                while opener != _OPENING[token.kind]:
                    opening = opened.pop()
                    opener = self._tokens[opening].kind
                    counts[opener] -= 1
                if self._tokens[opening].at < bar:
                    raise self._error(bar, rf"| cannot divide the text between two brackets; the character is \{'|'}")
                if opening + 1 < index:
                    partners |= {opening: index, index: opening}
        return partners

    def _open_bracket(self, index: int, token: _Token) -> None:
        weight = self._tokens[self._partners[index] - 1]
        factor = BRACKET_FACTOR
        if token.kind == "[":
            if weight.kind == "weight":
                raise self._error(weight.at, r"square brackets take no number: write (trees:0.9); the character is \:")
            factor = 1 / BRACKET_FACTOR
        elif weight.kind == "weight":
            hint = "; what the image should not show is a prompt of its own, such as | trees : -1"
            factor = self._number(weight, "the factor", 0.0, MAX_FACTOR, hint)
        outer = self._open[-1].factor if self._open else None
        self._draft.end_stretch(outer)
        if outer is not None:
            # 15 digits: ((trees)) is 1.21, not 1.2100000000000002.
            factor = float(f"{outer * factor:.15g}")
            if factor > MAX_FACTOR:
                raise self._error(token.at, f"these brackets multiply to {factor:g}; at most {MAX_FACTOR:g}")
        self._open.append(_Bracket(index, self._draft.length, factor))

    def _read_weight(self, index: int, token: _Token) -> None:
        bracket = self._open[-1] if self._open else None
        following = self._tokens[index + 1] if index + 1 < len(self._tokens) else None
        scope = -1 if bracket is None else self._tokens[bracket.index].at
        unclosed = self._draft.unclosed
        if following is not None and following.kind in _OPENING and index + 1 not in self._partners:
            raise self._error(following.at, rf"no bracket is open here; the character is \{following.kind}")
        if unclosed is not None and scope < unclosed.at:
            raise self._error(unclosed.at, rf"this bracket is not closed; the character is \{unclosed.kind}")
        if bracket is None:
            if self._draft.first is None:
                raise self._error(token.at, r"no text stands before this weight; the character is \:")
            if token.comma and self._source[token.end : token.end + 1].isdecimal():
                raise self._error(token.end - 1, "a decimal point is a point; a comma that ends a prompt needs a space")
            self._end_prompt(self._number(token, "the weight", -MAX_WEIGHT, MAX_WEIGHT, r"; the character is \:"))
        elif token.comma:
            raise self._error(token.at, r"a weight stands at the end of the bracket; the character is \:")
        elif bracket.start == self._draft.length:
            raise self._error(token.at, r"no text stands before this factor; the character is \:")

    def _end_prompt(self, weight: float | None) -> None:
        prompt = self._draft.prompt(weight)
        if prompt is not None:
            self._prompts.append(prompt)
        self._draft = _Draft()

    def _number(self, token: _Token, what: str, least: float, most: float, hint: str) -> float:
        number = float(token.number.translate(_DASHES))
        if not least <= number <= most:
            raise self._error(token.number_at, f"{what} {token.number} is not from {least:g} to {most:g}{hint}")
        return number

    def _error(self, at: int, problem: str) -> PromptSyntaxError:
        return PromptSyntaxError(f"column {at + 1}: {problem}\n{_pointer(self._source, at)}", column=at + 1)


def _token(match: re.Match[str]) -> _Token:
    at, text = match.start(), match[0]
    if match["number"] is not None:
        comma = match["end"] == ","
        return _Token("weight", match.start("colon"), "", match["number"], match.start("number"), match.end(), comma)
    if match["escape"] is not None:
        return _Token("escape", at, match["escape"])
    return _Token(match["mark"] or "text", at, text)


def _pointer(text: str, at: int) -> str:
    """The surroundings of a character on one line, and a caret below it."""
    import unicodedata

    start, end = max(0, at - 40), min(len(text), at + 30)
    before, after = (
        "".join(character if character.isprintable() else " " for character in part)
        for part in (text[start:at], text[at:end])
    )
    before = f"{'...' * (start > 0)}{before}"
    # A terminal shows these two columns wide, and combining marks on the character before them.
    width = len(before) + sum(unicodedata.east_asian_width(character) in "WF" for character in before)
    width -= sum(unicodedata.combining(character) != 0 for character in before)
    return f"    {before}{after}{'...' * (end < len(text))}\n    {' ' * width}^"


# ------------------------------------------------------------------------------------------------------------ writing


def _violations(path: str, prompt: Prompt) -> dict[str, str]:
    """Field path -> why no syntax says this."""
    found: dict[str, str] = {}
    if not prompt.text:
        found[f"{path}.text"] = "is empty; leave the prompt out"
    # The comparisons are false for NaN, too.
    if prompt.weight is not None and not -MAX_WEIGHT <= prompt.weight <= MAX_WEIGHT:
        found[f"{path}.weight"] = f"{prompt.weight:g} is not a number from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
    position = 0
    for index, part in enumerate(prompt.emphasis):
        if not position <= part.start < part.end <= len(prompt.text):
            found[f"{path}.emphasis[{index}]"] = (
                f"{part.start} to {part.end} is no part of the {len(prompt.text)} characters from {position} on"
            )
        if not 0 <= part.factor <= MAX_FACTOR:
            found[f"{path}.emphasis[{index}].factor"] = f"{part.factor:g} is not a number from 0 to {MAX_FACTOR:g}"
        position = part.end
    return found


def _format(prompt: Prompt) -> str:
    text, position = prompt.text, 0
    pieces: list[str] = []
    for part in prompt.emphasis:
        pieces += _escape(text, position, part.start), _format_emphasis(text, part)
        position = part.end
    pieces.append(_escape(text, position, len(text)))
    if prompt.weight is not None:
        pieces.append(f" : {_format_number(prompt.weight)}")
    return "".join(pieces)


def _format_emphasis(text: str, part: Emphasis) -> str:
    piece = _escape(text, part.start, part.end)
    if piece[-1].isspace() and not piece.endswith(f"\\{piece[-1]}"):
        # The white space before the colon is not part of the text.
        piece = f"{piece[:-1]}\\{piece[-1]}"
    # After white space, a colon is not part of a ratio or an address.
    colon = " : " if piece[-1].isdecimal() or "://" in piece else ":"
    return f"({piece}{colon}{_format_number(part.factor)})"


def _escape(text: str, start: int, end: int) -> str:
    """A part of a prompt's text, so that it is read as text; white space at the ends of the text, so that it stays."""
    piece = re.sub(_ESCAPED, lambda match: match[0] if match["plain"] else f"\\{match[0]}", text[start:end])
    if piece and start == 0 and piece[0].isspace():
        piece = f"\\{piece}"
    if len(piece) > 1 and end == len(text) and piece[-1].isspace() and piece[-2:-1] != "\\":
        piece = f"{piece[:-1]}\\{piece[-1]}"
    return piece


def _format_number(value: float) -> str:
    return repr(float(value)).removesuffix(".0")

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

# The contract's ranges: weights from -10 to 10, factors from 0 to 10.
_MAX_WEIGHT = 10.0
_MAX_FACTOR = 10.0
# (trees) multiplies by it, [trees] divides by it.
_BRACKET_FACTOR = 1.1

# Text that is copied from a typeset page has a minus sign or an en dash where a hyphen was.
_DASHES = {0x2212: "-", 0x2013: "-"}
# Programs write nan and inf; they match so that they are refused.
_NUMBER = r"[+\-\u2212\u2013]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|nan|inf)"
# Text in spite of its colons: the rest of an address, ratios and times (16:9, 12:30:15, 2.39:1, 1:1.85), numbers.
_PLAIN = (
    r"://[^\s|()\[\]\\]*"
    r"|[0-9]+(?:\.[0-9]+)*(?::[0-9]+)+(?!\.?[0-9])"
    r"|1:[0-9]+\.[0-9]+"
    r"|[0-9]+(?:\.[0-9]+)*"
)
_TOKEN = (
    r"\\(?P<escape>[\\|:()\[\]\s])"
    rf"|{_PLAIN}"
    rf"|(?P<weight>\s*(?P<colon>:)\s*(?P<number>{_NUMBER})\s*(?:(?P<comma>,)|(?=[|)\]])|\Z))"
    r"|\(\)|\[\]|(?P<mark>[|()\[\]])"
    r"|\s+|[^\s\\|:()\[\]0-9]+|[\\:]"
)
_ESCAPED = rf"(?P<plain>{_PLAIN})|[\\|()\[\]]|:(?=\s*{_NUMBER}\s*(?:,|\Z))"
_OPENING = {")": "(", "]": "["}
_OR_ESCAPE = r"or write \: for the colon itself"


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


class _Bracket(NamedTuple):
    """A bracket that is open at this point."""

    at: int
    """Where it stands."""
    start: int
    """Where its part of the prompt's text begins."""
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
    unclosed: re.Match[str] | None = None
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
        self._tokens = list(re.finditer(_TOKEN, source))
        # Of each token: a mark, `weight`, `escape` or `text`.
        self._kinds = [token["mark"] or token.lastgroup or "text" for token in self._tokens]
        self._partners = self._pair()
        self._open: list[_Bracket] = []
        self._draft = _Draft()
        self._prompts: list[Prompt] = []

    def parse(self) -> tuple[Prompt, ...]:
        for index, (kind, token) in enumerate(zip(self._kinds, self._tokens, strict=True)):
            if kind == "weight":
                self._read_weight(index, token)
            elif kind == "|":
                self._end_prompt(None)
            elif index in self._partners and kind in _OPENING:
                self._draft.end_stretch(self._open.pop().factor)
            elif index in self._partners:
                self._open_bracket(index, token)
            else:
                if kind in _OPENING.values():
                    self._draft.unclosed = token
                self._draft.add(token["escape"] or token[0], escaped=kind == "escape")
        self._end_prompt(None)
        return tuple(self._prompts)

    def _pair(self) -> dict[int, int]:
        """Each bracket -> its partner, as indices of tokens. A bracket without a partner is text."""
        partners: dict[int, int] = {}
        opened: list[int] = []
        # How many of each kind are in `opened`: a closing bracket without a partner does not search it.
        counts = dict.fromkeys(_OPENING.values(), 0)
        bar = -1
        for index, kind in enumerate(self._kinds):
            if kind == "|":
                bar = index
            elif kind in counts:
                opened.append(index)
                counts[kind] += 1
            elif kind in _OPENING and counts[_OPENING[kind]]:
                opener = ""
                while opener != _OPENING[kind]:
                    partner = opened.pop()
                    opener = self._kinds[partner]
                    counts[opener] -= 1
                if partner < bar:
                    at = self._tokens[bar].start()
                    raise self._error(at, r"| ends the prompt inside of a bracket: close that first, or write \|")
                partners |= {partner: index, index: partner}
        return partners

    def _open_bracket(self, index: int, token: re.Match[str]) -> None:
        last = self._partners[index] - 1
        weight = self._tokens[last] if self._kinds[last] == "weight" else None
        factor = _BRACKET_FACTOR
        if token[0] == "[":
            if weight is not None:
                problem = f"square brackets take no number: use round ones, such as (trees:0.9), {_OR_ESCAPE}"
                raise self._error(weight.start("colon"), problem)
            factor = 1 / _BRACKET_FACTOR
        elif weight is not None:
            hint = "what the image should not show is a prompt of its own, such as | trees : -1"
            factor = self._number(weight, "the factor", 0.0, _MAX_FACTOR, hint)
        outer = self._open[-1].factor if self._open else None
        self._draft.end_stretch(outer)
        if outer is not None:
            # 15 digits: ((trees)) is 1.21, not 1.2100000000000002.
            factor = float(f"{outer * factor:.15g}")
            if factor > _MAX_FACTOR:
                raise self._error(token.start(), f"the brackets multiply to {factor:g}; at most {_MAX_FACTOR:g}")
        self._open.append(_Bracket(token.start(), self._draft.length, factor))

    def _read_weight(self, index: int, weight: re.Match[str]) -> None:
        bracket = self._open[-1] if self._open else None
        colon = weight.start("colon")
        following = self._kinds[index + 1] if index + 1 < len(self._kinds) else ""
        if following in _OPENING and index + 1 not in self._partners:
            raise self._error(weight.end(), rf"no bracket is open here: open one, or write \{following}")
        unclosed = self._draft.unclosed
        if unclosed is not None and (bracket is None or bracket.at < unclosed.start()):
            raise self._error(unclosed.start(), rf"this bracket is not closed: close it, or write \{unclosed[0]}")
        if bracket is None:
            if self._draft.first is None:
                raise self._error(colon, f"nothing stands before this weight: say what it weighs, {_OR_ESCAPE}")
            if weight["comma"] and self._source[weight.end() : weight.end() + 1].isdecimal():
                problem = "leave a space after a comma that ends a prompt; a fraction has a point, such as 1.5"
                raise self._error(weight.start("comma"), problem)
            number = self._number(weight, "the weight", -_MAX_WEIGHT, _MAX_WEIGHT, f"choose another, {_OR_ESCAPE}")
            self._end_prompt(number)
        elif weight["comma"]:
            raise self._error(colon, f"a number is for a whole bracket: write it at the bracket's end, {_OR_ESCAPE}")
        elif bracket.start == self._draft.length:
            raise self._error(colon, f"nothing stands before this factor: say what it strengthens, {_OR_ESCAPE}")

    def _end_prompt(self, weight: float | None) -> None:
        prompt = self._draft.prompt(weight)
        if prompt is not None:
            self._prompts.append(prompt)
        self._draft = _Draft()

    def _number(self, weight: re.Match[str], what: str, least: float, most: float, hint: str) -> float:
        number = float(weight["number"].translate(_DASHES))
        if not least <= number <= most:
            problem = f"{what} {weight['number']} is not from {least:g} to {most:g}: {hint}"
            raise self._error(weight.start("number"), problem)
        return number

    def _error(self, at: int, problem: str) -> PromptSyntaxError:
        return PromptSyntaxError(f"column {at + 1}: {problem}\n{_pointer(self._source, at)}", column=at + 1)


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
    if prompt.weight is not None and not -_MAX_WEIGHT <= prompt.weight <= _MAX_WEIGHT:
        found[f"{path}.weight"] = f"{prompt.weight:g} is not a number from {-_MAX_WEIGHT:g} to {_MAX_WEIGHT:g}"
    position = 0
    for index, part in enumerate(prompt.emphasis):
        if not position <= part.start < part.end <= len(prompt.text):
            problem = f"{part.start} to {part.end} is no range within {position} to {len(prompt.text)}"
            found[f"{path}.emphasis[{index}]"] = problem
        if not 0 <= part.factor <= _MAX_FACTOR:
            found[f"{path}.emphasis[{index}].factor"] = f"{part.factor:g} is not a number from 0 to {_MAX_FACTOR:g}"
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
    piece = _escape(text, part.start, part.end, trailing=True)
    # After white space, a colon is not part of a ratio or an address.
    colon = " : " if piece[-1].isdecimal() or "://" in piece else ":"
    return f"({piece}{colon}{_format_number(part.factor)})"


def _escape(text: str, start: int, end: int, *, trailing: bool = False) -> str:
    """A part of a prompt's text so that it is read as text.

    White space is dropped at the ends of a prompt and before the colon of a weight; `trailing` says that one follows.
    """
    head = start < end and start == 0 and text[start].isspace()
    tail = start + head < end and (trailing or end == len(text)) and text[end - 1].isspace()
    middle = text[start + head : end - tail]
    escaped = re.sub(_ESCAPED, lambda match: match[0] if match["plain"] else f"\\{match[0]}", middle)
    before, after = (f"\\{text[at]}" if needed else "" for at, needed in ((start, head), (end - 1, tail)))
    return f"{before}{escaped}{after}"


def _format_number(value: float) -> str:
    return repr(float(value)).removesuffix(".0")

"""Words and phrases that the operator does not want in prompts.

One entry a line of a UTF-8 file; empty lines and lines that start with `#` are passed over. An entry is a word or a
phrase. It is found as whole words, unless a `*` at its start or end says that a word may go on there: `*saur*`.
Case, width, punctuation, white space and invisible characters make no difference; accents do. There are no regular
expressions: the time that a search takes does not depend on what the list or the prompt say.
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

import ahocorasick

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# What Unicode calls default ignorable, and so what nobody sees: soft hyphen, joiners, marks of direction, fillers of
# Hangul, variation selectors, tags.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)
# Marks that NFKC could join to no letter: strokes through and dots around words.
_LOOSE_MARKS = (range(0x300, 0x370), range(0x1AB0, 0x1B00), range(0x1DC0, 0x1E00), range(0x20D0, 0x2100))
# Scripts that put no spaces between words, by the first word of their characters' names: every place is a border there.
_WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


class BlockListError(Exception):
    """The file cannot be read or an entry makes no sense; says which line and what would be right."""


class BlockList:
    """Entries by their line numbers. Finding one takes time by the length of the text, not by that of the list.

    Raises BlockListError for entries that cannot be found in any text.
    """

    def __init__(self, entries: Iterable[tuple[int, str]]) -> None:
        self._automaton = ahocorasick.Automaton()
        patterns = [(_pattern(line, entry), line) for line, entry in entries]
        # Of equal entries the first one counts.
        for pattern, line in reversed(patterns):
            self._automaton.add_word(pattern, line)
        self._automaton.make_automaton()

    def __len__(self) -> int:
        """How many different entries there are."""
        return len(self._automaton)

    def find(self, text: str) -> int | None:
        """The line of an entry that is in the text; None where there is none."""
        if not self._automaton:
            return None
        found: tuple[int, int] | None = next(self._automaton.iter(f" {normalized(text)} "), None)
        return None if found is None else found[1]


def read_block_list(path: Path) -> BlockList:
    """Reads a file of entries. Raises BlockListError."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise BlockListError(f"cannot read the prompt block list {path}: {error.strerror}") from error
    try:
        return BlockList(_entries(lines))
    except BlockListError as error:
        raise BlockListError(f"{path}, {error}") from error


def normalized(text: str) -> str:
    """The words of a text, with one space between them and none around: what entries and prompts are compared in.

    NFKC and case folding, without invisible characters and loose marks. Letters, digits and the marks of a script make
    words, everything else ends them.
    """
    if not text.isascii():
        text = _INVISIBLE.sub("", text)
    # Folding may leave NFKC, as that of the Greek iota below does.
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = text.translate(_WORD_CHARACTERS)
    while "  " in text:
        text = text.replace("  ", " ")
    return text.strip(" ")


class _WordCharacters(dict[int, int | str | None]):
    """For `str.translate`: characters of words stay, loose marks vanish, all others become spaces."""

    def __missing__(self, character: int) -> int | str | None:
        result: int | str | None = " "
        if any(character in marks for marks in _LOOSE_MARKS):
            result = None
        elif unicodedata.category(chr(character))[0] in "LMN":
            result = character
        # Prompts must not fill the memory with a million characters.
        if len(self) < 1 << 16:
            self[character] = result
        return result


_WORD_CHARACTERS = _WordCharacters()


def _entries(lines: list[bytes]) -> Iterable[tuple[int, str]]:
    for number, line in enumerate(lines, start=1):
        try:
            entry = line.decode().strip()
        except UnicodeDecodeError:
            raise BlockListError(f"line {number}: is not UTF-8; save the file as UTF-8") from None
        if entry and not entry.startswith("#"):
            yield number, entry


def _pattern(line: int, entry: str) -> str:
    """What is searched for in a normalized text with a space at both ends: a space is a word's border."""
    if len(entry) > 1 and entry[0] == entry[-1] == "/":
        raise BlockListError(
            f"line {line}: {entry!r} looks like a regular expression; write words, and * at their ends"
        )
    open_start, open_end = entry.startswith("*"), entry.endswith("*")
    words = normalized(entry.strip("*"))
    if "*" in entry.strip("*"):
        raise BlockListError(f"line {line}: {entry!r} has a * inside; it can only be first or last")
    if not words:
        raise BlockListError(f"line {line}: {entry!r} has no letters and no digits; write a word or a phrase")
    start = "" if open_start or _has_no_borders(words[0]) else " "
    end = "" if open_end or _has_no_borders(words[-1]) else " "
    return f"{start}{words}{end}"


def _has_no_borders(character: str) -> bool:
    return unicodedata.name(character, "").startswith(_WITHOUT_SPACES)

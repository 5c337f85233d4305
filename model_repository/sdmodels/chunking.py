"""A prompt's text to tokens with factors, and tokens to chunks that the text tower can take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdmodels.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# How far from a chunk's end a comma may be, in tokens, to end the chunk. 20 is the default of A1111's web UI, whose
# rule this is (modules/sd_hijack_clip.py, "comma padding backtrack").
COMMA_REACH = 20

Emphasis = tuple[int, int, float]
"""Start, end (exclusive) and factor of a part of a text, in code points."""


def fragments(text: str, emphasis: Sequence[Emphasis]) -> Iterator[tuple[str, float]]:
    """The parts of a text with their factors, in order; a text without emphasis is one part.

    A factor of 1 makes no part of its own, so that it changes nothing at all. Raises InvalidInput for ranges that are
    empty, overlap, are out of order or lie outside of the text, and for factors below 0 or not finite.
    """
    position = last = 0
    for start, end, factor in emphasis:
        if not (last <= start < end <= len(text) and 0 <= factor < float("inf")):
            raise InvalidInput(f"emphasis {factor:g} from {start} to {end} of {len(text)} characters is not possible")
        last = end
        if factor != 1:
            yield text[position:start], 1.0
            yield text[start:end], factor
            position = end
    yield text[position:], 1.0


def chunk_ends(tokens: Sequence[int], size: int, comma: int) -> list[int]:
    """Where the chunks of at most `size` tokens end; no tokens are one chunk.

    A chunk that is not the last ends after the last comma among its last COMMA_REACH tokens, or where it is full.
    """
    ends = []
    start = 0
    while len(tokens) - start > size:
        full = start + size
        commas = (end for end in range(full, max(full - COMMA_REACH, start), -1) if tokens[end - 1] == comma)
        start = next(commas, full)
        ends.append(start)
    return [*ends, len(tokens)]

"""Words to tokens: open_clip's byte-pair encoding with the vocabulary of an engine."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from open_clip import SimpleTokenizer

if TYPE_CHECKING:
    from pathlib import Path

# open_clip's tokenizer remembers every word that it has met. Beyond this many it is made anew.
REMEMBERED_WORDS = 100_000
# Byte-pair encoding takes time by the square of a word's length: a word of 10,000 letters would take seconds. A longer
# word is read as several.
LONGEST_WORD = 128


class Tokenizer:
    """The tokenizer of a text tower: `bpe_*.txt.gz` beside its weights, or open_clip's own where there is none.

    `config` is the `text_cfg` of the tower's open_clip configuration. Raises ValueError where the vocabulary and the
    tower differ in size.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self._vocabularies = [str(path) for path in folder.glob("bpe_*.txt.gz")]
        self._options: dict[str, Any] = config.get("tokenizer_kwargs") or {}
        self._bpe = self._new()
        if len(self._vocabularies) > 1 or self._bpe.vocab_size != config["vocab_size"]:
            raise ValueError(
                f"the text tower knows {config['vocab_size']} tokens and its tokenizer {self._bpe.vocab_size}: "
                "put the one bpe_*.txt.gz that it was trained with beside its weights"
            )
        self.start: int = self._bpe.sot_token_id
        self.end: int = self._bpe.eot_token_id
        (self.comma,) = self(",")

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text, without start and end: open_clip's, where no word is longer than LONGEST_WORD."""
        if len(self._bpe.cache) > REMEMBERED_WORDS:
            self._bpe = self._new()
        tokens: list[int] = self._bpe.encode(re.sub(rf"\S{{{LONGEST_WORD}}}", r"\g<0> ", text))
        return tokens

    def _new(self) -> Any:
        return SimpleTokenizer(*self._vocabularies[:1], **self._options)

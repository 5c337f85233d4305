"""Trains the small byte-pair vocabulary of the text tower, in the file format of open_clip's `SimpleTokenizer`.

The standard table of 49,408 tokens would be most of a tiny model. This one is learnt from captions until each of
their words is one token; every other word is spelt in pieces, down to bytes.
"""

from __future__ import annotations

import gzip
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from open_clip.tokenizer import SimpleTokenizer

from training.captions import caption
from training.common import train_dir
from training.world import random_scene

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

FILE_NAME = "bpe_tiny.txt.gz"
CONTEXT_LENGTH = 77
_CAPTIONS = 20_000


def merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first (Sennrich et al. 2016), until every word is one token."""
    counts = Counter(words)
    spelt = {word: (*word[:-1], word[-1] + "</w>") for word in counts}
    found: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in spelt.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            return found
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        found.append(best)
        spelt = {word: _merged(parts, best) for word, parts in spelt.items()}


def _merged(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    result: list[str] = []
    for part in parts:
        if result and (result[-1], part) == pair:
            result[-1] += part
        else:
            result.append(part)
    return tuple(result)


def write(path: Path, count: int = _CAPTIONS) -> None:
    """Learn the vocabulary from the captions of the first `count` scenes and write it, the same bytes each time."""
    words: list[str] = []
    for seed in range(count):
        text = caption(random_scene(seed), np.random.default_rng(seed)).text.lower()
        words += [word for word in "".join(c if c.isalpha() else " " for c in text).split() if word.isascii()]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges(words))]
    with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
        packed.write("\n".join(lines).encode())


def load() -> SimpleTokenizer:
    """The tokenizer over the training folder's vocabulary, learnt first where it is missing."""
    path = train_dir() / FILE_NAME
    if not path.exists():
        write(path)
    return SimpleTokenizer(str(path), context_length=CONTEXT_LENGTH)

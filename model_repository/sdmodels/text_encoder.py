"""CLIP's text tower, as Stable Diffusion conditions on it."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from open_clip import CLIP
from torch.nn.functional import normalize

from sdmodels.chunking import chunk_ends, fragments
from sdmodels.tokenizer import Tokenizer
from sdmodels.weights import read_config, read_weights

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from sdmodels.chunking import Emphasis


class Encoding(NamedTuple):
    """What a text is to the models."""

    states: NDArray[np.float32]
    """[chunks * context_length, D] text states."""
    tokens: int
    """How many the text has, without start and end."""
    chunks: int
    """In how many it is encoded."""
    features: NDArray[np.float32] | None
    """[E] of unit length, in the space that CLIP's two towers share; None for engines without CLIP guidance."""


class TextEncoder:
    """Text to text states: the blocks of an open_clip text tower, then its final layer norm, in float32.

    `engine_folder/clip` holds open_clip's own files. `engine_folder/engine.json` says whether the last block counts,
    which SD 1 was trained with and SD 2 without, what a chunk is padded with, how many chunks a text may have, and
    whether the engine has CLIP guidance: only then all blocks and the projection are read, to make the text's
    features, too.
    """

    def __init__(self, engine_folder: Path, device: str = "cpu") -> None:
        folder = engine_folder / "clip"
        config = read_config(folder / "open_clip_config.json")["model_cfg"]
        engine = read_config(engine_folder / "engine.json")
        self._device = device
        self._tokenize = Tokenizer(folder, config["text_cfg"])
        self._has_features = engine.get("clip_guidance") is not None
        all_blocks = config["text_cfg"]["layers"]
        self._state_blocks: int = all_blocks - (engine["text_encoder"].get("layer", "penultimate") == "penultimate")
        self._tower = _read_tower(folder, config, None if self._has_features else self._state_blocks).to(device)
        # open_clip pads with token 0, and so did SD 2's training; SD 1's with the end token.
        self._padding = self._tokenize.end if engine["text_encoder"].get("padding", "zero") == "end" else 0
        self._max_chunks: int = engine["limits"]["max_prompt_chunks"]

    def __call__(self, text: str, emphasis: Sequence[Emphasis] = ()) -> Encoding:
        """The encoding of a text.

        The tokens are cut into chunks (`chunk_ends`), each with its own start, end and padding, that are encoded one by
        one; the features are their mean, of unit length again, and know nothing of emphasis. Of a text with more chunks
        than the engine takes only the first one is encoded: the caller has to refuse it. Raises InvalidInput for
        emphasis that is not possible.
        """
        tokens: list[int] = []
        factors: list[float] = []
        for fragment, factor in fragments(text, emphasis):
            tokens += self._tokenize(fragment)
            factors += [factor] * (len(tokens) - len(factors))
        length = self._tower.context_length
        ends = chunk_ends(tokens, length - 2, self._tokenize.comma)
        chunks = [slice(start, end) for start, end in pairwise([0, *ends])]
        encoded = chunks if len(chunks) <= self._max_chunks else chunks[:1]
        states, features = self._encode([tokens[chunk] for chunk in encoded])
        if len(chunks) > self._max_chunks:
            return Encoding(states, len(tokens), len(chunks), features)
        padded_factors = np.ones((len(chunks), length), np.float32)
        for row, chunk in zip(padded_factors, chunks, strict=True):
            row[1 : 1 + chunk.stop - chunk.start] = factors[chunk]
        return Encoding(emphasised(states, padded_factors.ravel()), len(tokens), len(chunks), features)

    @torch.inference_mode()
    def _encode(self, chunks: list[list[int]]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        states, features = zip(*(self._encode_chunk(chunk) for chunk in chunks), strict=True)
        mean = None if features[0] is None else normalize(torch.stack(features).mean(dim=0), dim=-1).cpu().numpy()
        return torch.cat(states).cpu().numpy(), mean

    def _encode_chunk(self, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        tower = self._tower
        padded = torch.full((1, tower.context_length), self._padding)
        padded[0, : len(tokens) + 2] = torch.tensor([self._tokenize.start, *tokens, self._tokenize.end])
        x = tower.token_embedding(padded.to(self._device)) + tower.positional_embedding
        blocks = tower.transformer.resblocks
        for block in blocks[: self._state_blocks]:
            x = block(x, attn_mask=tower.attn_mask)
        states = tower.ln_final(x)[0]
        if not self._has_features:
            return states, None
        # CLIP reads a text off the place of its end.
        for block in blocks[self._state_blocks :]:
            x = block(x, attn_mask=tower.attn_mask)
        end = tower.ln_final(x)[0, len(tokens) + 1]
        return states, normalize(end @ tower.text_projection, dim=-1)


def emphasised(states: NDArray[np.float32], factors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Text states [T, D] times one factor a token [T], scaled back to their former root mean square.

    A1111's web UI (modules/sd_emphasis.py) and diffusers' long prompt weighting pipelines scale back to the former
    mean. After the final layer norm that mean is a small difference of large numbers (-0.0006 at a root mean square
    of 1), so that nothing keeps its ratio near 1, or positive. The root mean square keeps the strength of the prompt,
    and its ratio is positive and bounded by the factors.
    """
    if (factors == 1).all():
        return states
    scaled = states * factors[:, None]
    former, now = (np.sqrt(np.square(array, dtype=np.float64).mean()) for array in (states, scaled))
    result: NDArray[np.float32] = (scaled * (former / now)).astype(np.float32)
    return result


def _read_tower(folder: Path, config: dict[str, Any], blocks: int | None) -> Any:
    """The text tower with what states of so many blocks need; None: with what the features need, too."""
    with torch.device("meta"):
        clip = CLIP(**config)
    del clip.visual
    unused: tuple[str, ...] = ("visual.",)
    if blocks is not None:
        del clip.transformer.resblocks[blocks:], clip.text_projection, clip.logit_scale
        unused += ("text_projection", "logit_scale")
        unused += tuple(f"transformer.resblocks.{block}." for block in range(blocks, config["text_cfg"]["layers"]))
    clip.load_state_dict(read_weights(folder / "open_clip_model.safetensors", skip=unused), assign=True)
    # A buffer that no weights file holds: the causal mask, -inf above the diagonal.
    clip.attn_mask = torch.full((clip.context_length, clip.context_length), float("-inf")).triu(1)
    return clip.eval().requires_grad_(False)

"""CLIP's text tower, as Stable Diffusion 2 conditions on it."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from open_clip import CLIP

from sdmodels.chunking import chunk_ends, fragments
from sdmodels.tokenizer import Tokenizer
from sdmodels.weights import read_config, read_weights

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from sdmodels.chunking import Emphasis


class TextEncoder:
    """Text to text states: all blocks of an open_clip text tower but the last, then its final layer norm, in float32.

    That is the layer that SD 2 was trained on. `engine_folder/clip` holds open_clip's own files, and
    `engine_folder/engine.json` says how many chunks a text may have.
    """

    def __init__(self, engine_folder: Path, device: str = "cpu") -> None:
        folder = engine_folder / "clip"
        config = read_config(folder / "open_clip_config.json")["model_cfg"]
        self._device = device
        self._tokenize = Tokenizer(folder, config["text_cfg"])
        self._tower = _read_tower(folder, config).to(device)
        self._max_chunks: int = read_config(engine_folder / "engine.json")["limits"]["max_prompt_chunks"]

    def __call__(self, text: str, emphasis: Sequence[Emphasis] = ()) -> tuple[NDArray[np.float32], int, int]:
        """[chunks * context_length, D] text states; how many tokens the text has without start and end; its chunks.

        The tokens are cut into chunks (`chunk_ends`), each with its own start, end and padding, that are encoded one by
        one. Of a text with more chunks than the engine takes only the first one is encoded: the caller has to refuse
        it. Raises InvalidInput for emphasis that is not possible.
        """
        tokens: list[int] = []
        factors: list[float] = []
        for fragment, factor in fragments(text, emphasis):
            tokens += self._tokenize(fragment)
            factors += [factor] * (len(tokens) - len(factors))
        length = self._tower.context_length
        ends = chunk_ends(tokens, length - 2, self._tokenize.comma)
        chunks = [slice(start, end) for start, end in pairwise([0, *ends])]
        if len(chunks) > self._max_chunks:
            return self._encode(tokens[chunks[0]]), len(tokens), len(chunks)
        states = np.concatenate([self._encode(tokens[chunk]) for chunk in chunks])
        padded_factors = np.ones((len(chunks), length), np.float32)
        for row, chunk in zip(padded_factors, chunks, strict=True):
            row[1 : 1 + chunk.stop - chunk.start] = factors[chunk]
        return emphasised(states, padded_factors.ravel()), len(tokens), len(chunks)

    @torch.inference_mode()
    def _encode(self, tokens: list[int]) -> NDArray[np.float32]:
        tower = self._tower
        # open_clip pads with token 0.
        padded = torch.zeros(1, tower.context_length, dtype=torch.long)
        padded[0, : len(tokens) + 2] = torch.tensor([self._tokenize.start, *tokens, self._tokenize.end])
        x = tower.token_embedding(padded.to(self._device)) + tower.positional_embedding
        x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask))
        states: NDArray[np.float32] = x[0].cpu().numpy()
        return states


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


def _read_tower(folder: Path, config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        clip = CLIP(**config)
    del clip.visual
    del clip.transformer.resblocks[-1]
    unused = ("visual.", f"transformer.resblocks.{config['text_cfg']['layers'] - 1}.")
    clip.load_state_dict(read_weights(folder / "open_clip_model.safetensors", skip=unused), assign=True)
    # A buffer that no weights file holds: the causal mask, -inf above the diagonal.
    clip.attn_mask = torch.full((clip.context_length, clip.context_length), float("-inf")).triu(1)
    return clip.eval().requires_grad_(False)

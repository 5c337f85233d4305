"""CLIP's text tower, as Stable Diffusion 2 conditions on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from open_clip import CLIP

from sdmodels.tokenizer import Tokenizer
from sdmodels.weights import read_config, read_weights

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray


class TextEncoder:
    """Texts to text states: all blocks of an open_clip text tower but the last, then its final layer norm, in float32.

    That is the layer that SD 2 was trained on. `engine_folder/clip` holds open_clip's own files.
    """

    def __init__(self, engine_folder: Path, device: str = "cpu") -> None:
        folder = engine_folder / "clip"
        config = read_config(folder / "open_clip_config.json")["model_cfg"]
        self._device = device
        self._tokenize = Tokenizer(folder, config["text_cfg"])
        self._tower = _read_tower(folder, config).to(device)
        self._max_tokens: int = self._tower.context_length - 2

    def __call__(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """[P, context_length, D] text states, and [P] how many tokens the texts have without start and end.

        The states of a text with more than context_length - 2 tokens are those of its beginning, and its count is no
        more than a lower bound: the caller has to refuse it. Texts are encoded one by one, so that their states do not
        depend on each other.
        """
        tokens = [self._tokenize(text, self._max_tokens) for text in texts]
        states = np.stack([self._encode(text_tokens[: self._max_tokens]) for text_tokens in tokens])
        return states, np.array([len(text_tokens) for text_tokens in tokens], np.int32)

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

"""CLIP's text tower, as Stable Diffusion 2 conditions on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from open_clip import CLIP, SimpleTokenizer  # type: ignore[import-untyped]

from sdmodels.weights import read_config, read_weights

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

# The tokenizer remembers every word that it has met; beyond this many it starts anew.
REMEMBERED_WORDS = 100_000


class TextEncoder:
    """Texts to text states: the last but one block of an open_clip text tower, then its final layer norm.

    That is the layer that SD 2 was trained on. `engine_folder/clip` holds open_clip's own files and, where the engine
    has a vocabulary of its own, that as `bpe_*.txt.gz`.
    """

    def __init__(self, engine_folder: Path, device: str = "cpu") -> None:
        folder = engine_folder / "clip"
        model_config = read_config(folder / "open_clip_config.json")["model_cfg"]
        self._device = device
        self._tokenizer = _read_tokenizer(folder, model_config["text_cfg"])
        self._tower = _read_tower(folder, model_config).to(device)
        self.context_length: int = self._tower.context_length
        self.width: int = self._tower.token_embedding.embedding_dim

    def __call__(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """[P, context_length, width] text states, and [P] how many tokens each text has without start and end.

        A text of more than context_length - 2 tokens is encoded up to there; its count tells, and the caller refuses.
        Texts are encoded one by one, so that the states of a text depend on nothing but the text.
        """
        rows = [self._encode(text) for text in texts]
        states = np.zeros((len(rows), self.context_length, self.width), np.float32)
        for row, (text_states, _) in enumerate(rows):
            states[row] = text_states
        return states, np.array([token_count for _, token_count in rows], np.int32)

    @torch.inference_mode()
    def _encode(self, text: str) -> tuple[NDArray[np.float32], int]:
        if len(self._tokenizer.cache) > REMEMBERED_WORDS:
            self._tokenizer.cache = {token: token for token in ("<start_of_text>", "<end_of_text>")}
        own_tokens = self._tokenizer.encode(text)
        tokens = torch.zeros(1, self.context_length, dtype=torch.long)
        kept = [self._tokenizer.sot_token_id, *own_tokens[: self.context_length - 2], self._tokenizer.eot_token_id]
        tokens[0, : len(kept)] = torch.tensor(kept)

        tower = self._tower
        x = tower.token_embedding(tokens.to(self._device)) + tower.positional_embedding
        x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask))
        states: NDArray[np.float32] = x[0].cpu().numpy()
        return states, len(own_tokens)


def _read_tower(folder: Path, model_config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        clip = CLIP(**model_config)
    del clip.visual
    del clip.transformer.resblocks[-1]
    last_block = f"transformer.resblocks.{model_config['text_cfg']['layers'] - 1}."
    clip.load_state_dict(read_weights(folder / "open_clip_model.safetensors", skip=("visual.", last_block)), assign=True)
    # A buffer that is not in the weights: the causal mask, -inf above the diagonal.
    clip.attn_mask = torch.full((clip.context_length, clip.context_length), float("-inf")).triu(1)
    return clip.eval().requires_grad_(False)


def _read_tokenizer(folder: Path, text_config: dict[str, Any]) -> Any:
    own_vocabulary = sorted(folder.glob("bpe_*.txt.gz"))
    options = text_config.get("tokenizer_kwargs") or {}
    tokenizer = SimpleTokenizer(str(own_vocabulary[0]), **options) if own_vocabulary else SimpleTokenizer(**options)
    if len(own_vocabulary) > 1 or tokenizer.vocab_size != text_config["vocab_size"]:
        raise ValueError(
            f"the text tower has {text_config['vocab_size']} tokens and its tokenizer {tokenizer.vocab_size}: "
            "put the one bpe_*.txt.gz that it was trained with beside its weights"
        )
    return tokenizer

"""CLIP's text tower, as Stable Diffusion conditions on it."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from open_clip import CLIP
from torch.func import functional_call
from torch.nn.functional import normalize

from sdmodels.chunking import chunk_ends, fragments
from sdmodels.loras import TEXT_ENCODER, LoraFiles
from sdmodels.tokenizer import Tokenizer
from sdmodels.weights import read_config, read_weights

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from sdmodels.chunking import Emphasis
    from sdmodels.loras import Loras

# Parts of a block that LoRAs change -> its parameter, and which third of that: open_clip has queries, keys and values
# in one.
LORA_PARTS = {
    "attn.q": ("attn.in_proj_weight", 0),
    "attn.k": ("attn.in_proj_weight", 1),
    "attn.v": ("attn.in_proj_weight", 2),
    "attn.out": ("attn.out_proj.weight", None),
    "mlp.fc1": ("mlp.c_fc.weight", None),
    "mlp.fc2": ("mlp.c_proj.weight", None),
}


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
        self._loras = LoraFiles(engine_folder, TEXT_ENCODER, device)

    def __call__(
        self,
        text: str,
        emphasis: Sequence[Emphasis] = (),
        digests: NDArray[np.uint8] | None = None,
        weights: NDArray[np.float32] | None = None,
    ) -> Encoding:
        """The encoding of a text; states follow from LoRAs, too, by their SHA-256 digests [K, 32] and weights [K].

        The tokens are cut into chunks (`chunk_ends`), each with its own start, end and padding, that are encoded one by
        one; the features are their mean, of unit length again, and know nothing of emphasis. Of a text with more chunks
        than the engine takes only the first one is encoded: the caller has to refuse it. Raises InvalidInput for
        emphasis that is not possible, and for LoRAs that are not there.
        """
        loras = [] if digests is None or weights is None else self._loras.used(digests, weights)
        tokens: list[int] = []
        factors: list[float] = []
        for fragment, factor in fragments(text, emphasis):
            tokens += self._tokenize(fragment)
            factors += [factor] * (len(tokens) - len(factors))
        length = self._tower.context_length
        ends = chunk_ends(tokens, length - 2, self._tokenize.comma)
        chunks = [slice(start, end) for start, end in pairwise([0, *ends])]
        encoded = chunks if len(chunks) <= self._max_chunks else chunks[:1]
        states, features = self._encode([tokens[chunk] for chunk in encoded], loras)
        if len(chunks) > self._max_chunks:
            return Encoding(states, len(tokens), len(chunks), features)
        padded_factors = np.ones((len(chunks), length), np.float32)
        for row, chunk in zip(padded_factors, chunks, strict=True):
            row[1 : 1 + chunk.stop - chunk.start] = factors[chunk]
        return Encoding(emphasised(states, padded_factors.ravel()), len(tokens), len(chunks), features)

    @torch.inference_mode()
    def _encode(self, chunks: list[list[int]], loras: Loras) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        states, features = zip(*(self._encode_chunk(chunk, loras) for chunk in chunks), strict=True)
        mean = None if features[0] is None else normalize(torch.stack(features).mean(dim=0), dim=-1).cpu().numpy()
        return torch.cat(states).cpu().numpy(), mean

    def _encode_chunk(self, tokens: list[int], loras: Loras) -> tuple[torch.Tensor, torch.Tensor | None]:
        tower = self._tower
        padded = torch.full((1, tower.context_length), self._padding)
        padded[0, : len(tokens) + 2] = torch.tensor([self._tokenize.start, *tokens, self._tokenize.end])
        embedded = tower.token_embedding(padded.to(self._device)) + tower.positional_embedding
        x = self._through(range(self._state_blocks), embedded, loras)
        states = tower.ln_final(x)[0]
        if not self._has_features:
            return states, None
        if loras:
            # The image tower knows nothing of them.
            x = self._through(range(self._state_blocks), embedded, [])
        # CLIP reads a text off the place of its end.
        x = self._through(range(self._state_blocks, len(tower.transformer.resblocks)), x, [])
        end = tower.ln_final(x)[0, len(tokens) + 1]
        return states, normalize(end @ tower.text_projection, dim=-1)

    def _through(self, blocks: range, x: torch.Tensor, loras: Loras) -> torch.Tensor:
        mask = {"attn_mask": self._tower.attn_mask}
        for number in blocks:
            block = self._tower.transformer.resblocks[number]
            # One block at a time, so that there is no second tower in memory.
            changed = _changed(block, number, loras)
            x = functional_call(block, changed, (x,), mask) if changed else block(x, **mask)
        return x


def _changed(block: torch.nn.Module, number: int, loras: Loras) -> dict[str, torch.Tensor]:
    """The parameters of a block that LoRAs change, as they are then."""
    changed: dict[str, torch.Tensor] = {}
    for deltas, weight in loras:
        for part, (parameter, third) in LORA_PARTS.items():
            if (delta := deltas.get(f"{number}.{part}")) is not None:
                if parameter not in changed:
                    changed[parameter] = block.get_parameter(parameter).clone()
                values = changed[parameter] if third is None else changed[parameter].chunk(3)[third]
                values.addmm_(delta.up, delta.down, alpha=weight * delta.scale)
    return changed


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

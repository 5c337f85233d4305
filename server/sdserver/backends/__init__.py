"""Where the models run: behind a Triton Inference Server, or in this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sdserver.engines import Engine
    from sdserver.request import Emphasis, Lora

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Integers = NDArray[np.int64]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class EncodedText:
    """[chunks * context_length, width] text states, and how many tokens, without start and end, and chunks they are of.

    `features` are the whole text's in the space of CLIP's image features, [E] of unit length; None for engines without
    CLIP guidance. A text with more chunks than the engine takes has states and features that must not be used.
    """

    states: Floats
    tokens: int
    chunks: int
    features: Floats | None = None


class Backend(Protocol):
    """The models of all engines, and the safety model if the operator has chosen one.

    Every call raises `errors.Unavailable` when the models cannot be reached and `errors.GenerationFailed` when one of
    them fails; cancelling a call withdraws it where it runs.
    """

    async def encode_text(
        self, engine: Engine, text: str, emphasis: tuple[Emphasis, ...], loras: tuple[Lora, ...] = ()
    ) -> EncodedText:
        """Text states from the penultimate layer of the text tower, with LoRAs and emphasis applied."""
        ...

    async def predict(self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats) -> Floats:
        """[B, C, h, w] UNet predictions for latents [B, U, h, w], timesteps [B], text states [B, tokens, width].

        U is `engine.unet_channels`: those of the conditioning come after the C of the noisy latents.
        """
        ...

    async def predict_with_features(
        self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats
    ) -> Floats:
        """[B, C + F, h, w] the predictions of `predict` and, in the channels after them, features [B, F, h, w].

        F is `engine.block_cache.channels`; only where the engine has it.
        """
        ...

    async def predict_from_features(
        self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats, features: Floats
    ) -> Floats:
        """[B, C, h, w] predictions by the UNet's outermost blocks, from features [B, F, h, w] of another step."""
        ...

    async def predict_with_loras(
        self,
        engine: Engine,
        latents: Floats,
        timesteps: Floats,
        text_states: Floats,
        digests: Bytes,
        weights: Floats,
    ) -> Floats:
        """As `predict`, with the LoRAs of each row: their SHA-256 [B, K, 32] and weights [B, K], 0 for none.

        Only where the engine has LoRAs; K is `engines.MAX_LORAS`.
        """
        ...

    async def decode(self, engine: Engine, latents: Floats) -> Pixels:
        """[B, H, W, 3] pixels of latents [B, C, h, w] in the UNet's scale."""
        ...

    async def encode_image(self, engine: Engine, pixels: Pixels) -> Floats:
        """[B, C, h, w] latents, in the UNet's scale, of pixels [B, H, W, 3]; only where the engine has `vae_encoder`.

        The mean of the posterior: the same pixels have the same latents. Inpainting engines take pixels [B, H, W, 4],
        too: of those that are transparent, in the fourth channel, they see neither colour nor brightness.
        """
        ...

    async def estimate_depth(self, engine: Engine, pixels: Pixels) -> Floats:
        """[B, h, w] how near everything is, of no scale, at the model's resolution, in pixels [B, H, W, 3].

        Only where the engine has `depth_estimator`.
        """
        ...

    async def classify(self, pictures: Pixels) -> Floats:
        """[B, K] scores of the safety model for pictures [B, S, S, 3]; only where there is one."""
        ...

    async def clip_gradient(
        self, engine: Engine, latents: Floats, targets: Floats, seeds: Integers, cutouts: Integers
    ) -> Floats:
        """[B, C, h, w] gradient of CLIP's loss by denoised latents [B, C, h, w], in the UNet's scale.

        The loss falls as the `cutouts` [B] random crops, which follow from `seeds` [B] (0: the whole image), come to
        look like the text features `targets` [B, E]. Only where the engine has `clip_guidance`.
        """
        ...

    async def unet_gradient(
        self, engine: Engine, latents: Floats, timesteps: Floats, text_states: Floats, gradients: Floats
    ) -> Floats:
        """[B, C, h, w] gradients by the noisy latents from those by the predictions of `predict`, `gradients`
        [B, C, h, w].

        Only where the engine has `unet_gradient`.
        """
        ...

    async def load(self, engine: Engine) -> None:
        """Reads the models of an engine that was not there when the backend was made, or again after a change.

        Returns when they answer, or cannot: `is_ready` says which. Raises Unavailable where nothing can be reached.
        """
        ...

    async def unload(self, engine: Engine) -> None:
        """Lets go of an engine's models; calls that run may fail. Raises Unavailable where nothing can be reached."""
        ...

    async def is_ready(self, engine: Engine) -> bool:
        """Whether all models of the engine, and the safety model if there is one, are loaded. Never raises."""
        ...

    async def close(self) -> None:
        """Lets go of connections and threads."""
        ...

"""LoRAs of an engine: small changes of its weights that come with each call, named by the digests of their files.

`engine_folder/loras/<SHA-256>.safetensors` is what `sdmodels.conversion.lora` has written: tensors by part (`unet.`,
`text_encoder.`) and module. Files come and go while models run: one is looked for when it is first asked for.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import safe_open

from sdmodels.errors import InvalidInput

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

FOLDER = "loras"
UNET, TEXT_ENCODER = "unet.", "text_encoder."
# Of tensors that a model holds beside those that a call is using: three LoRAs of rank 32 for all of SD 2.1's UNet in
# float32, and dozens for its attention.
CACHE_BYTES = 512 * 2**20


class Delta(NamedTuple):
    """What a LoRA adds to a module with `weight` 1: `scale` times `up` after `down`."""

    down: torch.Tensor
    """[r, in], or [r, in, k, k] of a convolution."""
    up: torch.Tensor
    """[out, r], or [out, r, 1, 1]."""
    scale: float


Deltas = dict[str, Delta]
Loras = list[tuple[Deltas, float]]
"""Changes by module, and the weight of each LoRA."""


class LoraFiles:
    """One part of an engine's LoRAs on a device, by the SHA-256 of their files; the least recently used go first."""

    def __init__(
        self,
        engine_folder: Path,
        part: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._folder = engine_folder / FOLDER
        self._part, self._device, self._dtype = part, device, dtype
        self._cache_bytes = cache_bytes
        self._known: OrderedDict[str, Deltas] = OrderedDict()

    def used(self, digests: NDArray[np.uint8], weights: NDArray[np.float32]) -> Loras:
        """Those of the digests [K, 32] whose weights [K] are not 0. Raises InvalidInput for one that is not there."""
        return [
            (self._get(digest.tobytes().hex()), float(weight))
            for digest, weight in zip(digests, weights, strict=True)
            if weight != 0
        ]

    def _get(self, digest: str) -> Deltas:
        deltas = self._known.get(digest)
        if deltas is None:
            deltas = self._known[digest] = self._read(digest)
            while len(self._known) > 1 and sum(map(_bytes, self._known.values())) > self._cache_bytes:
                self._known.popitem(last=False)
        self._known.move_to_end(digest)
        return deltas

    def _read(self, digest: str) -> Deltas:
        path = self._folder / f"{digest}.safetensors"
        if not path.is_file():
            raise InvalidInput(f"there is no LoRA with SHA-256 {digest} any more")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise InvalidInput(f"the LoRA with SHA-256 {digest} is damaged: add it again")
        with safe_open(path, framework="pt") as tensors:
            modules = [name.removesuffix(".down") for name in tensors.keys() if name.endswith(".down")]  # noqa: SIM118 (no mapping)
            return {
                module.removeprefix(self._part): Delta(
                    tensors.get_tensor(f"{module}.down").to(self._device, self._dtype),
                    tensors.get_tensor(f"{module}.up").to(self._device, self._dtype),
                    float(tensors.get_tensor(f"{module}.scale")),
                )
                for module in modules
                if module.startswith(self._part)
            }


def _bytes(deltas: Deltas) -> int:
    return sum(tensor.nbytes for delta in deltas.values() for tensor in (delta.down, delta.up))

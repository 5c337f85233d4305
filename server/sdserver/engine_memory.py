"""How much memory an engine's models need: their weights exactly, the rest about."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from sdserver.engines import Engine

# A model's process: Python with its libraries, and on a GPU CUDA's context there.
PROCESS_BYTES = 470 * 10**6
CONTEXT_BYTES = 450 * 10**6
# Numbers alive at once in a UNet, a place of the latents and a channel of its first block: on a GPU a count of what the
# last up block holds; on a CPU what OpenVINO took with SD 2.1 (`benchmarks.memory`).
UNET_NUMBERS = 20
UNET_NUMBERS_ON_CPU = 70
# In an autoencoder, a pixel and a channel of its first block: as a whole, and in strips, as larger images than
# `sdmodels.vae.WHOLE_PIXELS` are decoded; both measured.
VAE_NUMBERS = 8.0
VAE_NUMBERS_IN_STRIPS = 3.3
WHOLE_PIXELS = 320 * 320
# Rows of one image with guidance.
ROWS = 2
# `sdmodels` computes in half precision in these on a GPU, and in float32 in all others.
HALF_ROLES = ("unet", "unet_cache", "unet_lora", "vae_decoder", "vae_encoder")
# In these on a CPU that computes in bf16.
BF16_ROLES = ("unet", "unet_cache", "vae_decoder")

# Which weights a role reads: file, and prefixes that it leaves out or takes alone.
_VAE_DECODER = ("vae/", ("encoder.", "quant_conv."), ())
_UNET = ("unet/", (), ())
_READ: dict[str, tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]] = {
    "text_encoder": (("clip/", ("visual.",), ()),),
    "unet": (_UNET,),
    "unet_cache": (_UNET,),
    "unet_lora": (_UNET,),
    "unet_gradient": (_UNET,),
    "vae_decoder": (_VAE_DECODER,),
    "vae_encoder": (("vae/", ("decoder.", "post_quant_conv."), ()),),
    "depth_estimator": (("depth_estimator/", (), ()),),
    "clip_guidance": (("clip/", (), ("visual.",)), _VAE_DECODER),
}


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes on one device: weights, what one image with guidance needs while it is made, and the models' processes."""

    weights: int
    activations: int
    processes: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.activations + self.processes


def engine_memory(folder: Path, engine: Engine, *, on_gpu: bool, in_bf16: bool = False) -> EngineMemory:
    """What an engine whose files lie in `folder` needs at its native size; `in_bf16`: on a CPU that computes in it.

    Raises OSError, ValueError or KeyError.
    """
    tensors = {name: _tensors(folder / name) for name in engine.weights if name.endswith(".safetensors")}
    half = HALF_ROLES if on_gpu else BF16_ROLES if in_bf16 else ()
    width = {role: 2 if role in half else 4 for role in engine.roles}
    weights = sum(
        width[role] * count
        for role in engine.roles
        for part, without, alone in _READ[role]
        for file, counts in tensors.items()
        if file.startswith(part)
        for name, count in counts.items()
        if not name.startswith(without) and (not alone or name.startswith(alone))
    )
    places = engine.native_width * engine.native_height // engine.latents.downsampling**2
    side = engine.decode_tile.size if engine.decode_tile else max(engine.native_width, engine.native_height)
    pixels = min(engine.native_width, side) * min(engine.native_height, side)
    of_unet = UNET_NUMBERS if on_gpu else UNET_NUMBERS_ON_CPU
    of_vae = VAE_NUMBERS if pixels <= WHOLE_PIXELS else VAE_NUMBERS_IN_STRIPS
    unets = ROWS * of_unet * places * _first_channels(folder / "unet/config.json") * width["unet"]
    vaes = int(of_vae * pixels) * _first_channels(folder / "vae/config.json") * width["vae_decoder"]
    processes = len(engine.roles) * (CONTEXT_BYTES if on_gpu else PROCESS_BYTES)
    return EngineMemory(weights, unets + vaes, processes)


def _first_channels(config: Path) -> int:
    channels: int = json.loads(config.read_text(encoding="utf-8"))["block_out_channels"][0]
    return channels


def _tensors(path: Path) -> dict[str, int]:
    """Numbers in each tensor of a safetensors file, from its header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {name: math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"}

"""LoRAs in: those that a request names, and whatever is wrong with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdserver.engines import MAX_LORAS
from sdserver.request import Lora

if TYPE_CHECKING:
    from sdapi.v1 import generation_pb2

    from sdserver.engines import Engine

MAX_WEIGHT = 4.0


def read_loras(message: generation_pb2.GenerateRequest, engine: Engine, violations: dict[str, str]) -> tuple[Lora, ...]:
    """The LoRAs of a request; what is wrong is put into the violations."""
    if len(message.loras) > MAX_LORAS:
        violations["loras"] = f"{len(message.loras)} LoRAs are too many; at most {MAX_LORAS}"
        return ()
    read: list[Lora] = []
    for index, given in enumerate(message.loras):
        path = f"loras[{index}]"
        weight = given.weight if given.HasField("weight") else 1.0
        # The comparison is false for NaN, too.
        if not -MAX_WEIGHT <= weight <= MAX_WEIGHT:
            violations[f"{path}.weight"] = f"{weight:g} is not a number from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
        info = engine.lora(given.name)
        if info is None:
            there = ", ".join(lora.name for lora in engine.loras)
            violations[f"{path}.name"] = f"{given.name[:64]!r} is not known; engine {engine.id} has {there or 'none'}"
            continue
        if any(lora.info is info for lora in read):
            violations[f"{path}.name"] = f"{given.name} comes twice; add its weights up"
        if given.sha256 and given.sha256 != info.sha256:
            violations[f"{path}.sha256"] = (
                f"{given.name} is {info.sha256} here, and makes other images than before; leave sha256 out to use it"
            )
        read.append(Lora(info, weight))
    if read and message.clip_guidance.exact:
        violations["loras"] = (
            "not together with clip_guidance.exact, whose UNet has none of them; leave one of them out"
        )
    elif read and message.HasField("block_cache") and message.block_cache.interval != 1:
        violations["loras"] = "not together with block_cache, whose UNet has none of them; leave one of them out"
    return tuple(read)

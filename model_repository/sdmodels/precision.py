"""Numbers of half precision: which kind, where they are enough, and what is done where they are not."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch.nn.functional import scaled_dot_product_attention

from sdmodels.cores import has_bf16

if TYPE_CHECKING:
    from collections.abc import Callable

    Rows = Callable[..., torch.Tensor]
    """From tensors whose first axis is the rows to a float32 one."""

log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Ampere. torch calls bf16 supported before, too, where it only emulates it.
BF16_CAPABILITY = (8, 0)


def chosen(text: str, device: str, default: Callable[[tuple[int, int] | None], Precision]) -> Precision:
    """The precision that a model's parameter names; an empty one: the default of a device of that compute capability.

    Raises ValueError for what is none, or is not for that CPU.
    """
    if not text:
        return default(torch.cuda.get_device_capability(device) if device != "cpu" else None)
    if text not in get_args(Precision):
        raise ValueError(f"precision is {text!r}; it must be one of {', '.join(get_args(Precision))}")
    if device == "cpu" and text != "fp32" and not (text == "bf16" and has_bf16()):
        raise ValueError(
            f"precision is {text!r}; with torch it must be fp32 on a CPU, or bf16 where it computes in that"
        )
    return cast("Precision", text)


def unet_precision(capability: tuple[int, int] | None) -> Precision:
    """What a UNet computes in on a GPU of that compute capability; None: on a CPU.

    bf16 has float32's range, so that nothing overflows in it.
    """
    if capability is None:
        return "fp32"
    return "bf16" if capability >= BF16_CAPABILITY else "fp16"


def vae_precision(capability: tuple[int, int] | None) -> Precision:
    """What an autoencoder computes in: fp16 on any GPU.

    Those autoencoders whose numbers leave fp16's range have their rows computed again (`InRange`).
    """
    return "fp32" if capability is None else "fp16"


def decoder_precision(capability: tuple[int, int] | None) -> Precision:
    """What its decoder computes in: on CPUs that have it bf16, in half of the time and 54 dB from float32's picture.

    An initial image goes through the encoder once, so that this may take its time.
    """
    return "bf16" if capability is None and has_bf16() else vae_precision(capability)


class InRange:
    """A model in half precision; the rows whose result is not finite there are computed again in float32, each alone.

    `compute` gives float32 results for rows; `in_float32` makes the same model in float32, when it is needed first.
    That one stays: an engine whose numbers left the range once will do so again. Raises torch.OutOfMemoryError where
    the GPU has no room for it.
    """

    def __init__(self, name: str, compute: Rows, in_float32: Callable[[], Rows]) -> None:
        self._name = name
        self._compute = compute
        self._make = in_float32
        self._in_float32: Rows | None = None
        self._making = threading.Lock()

    def __call__(self, *rows: torch.Tensor) -> torch.Tensor:
        result = self._compute(*rows)
        finite = result.isfinite().flatten(1).all(dim=1)
        if bool(finite.all()):
            return result
        result = result.clone()
        for row in (~finite).nonzero().flatten().tolist():
            log.warning(
                "%s: row %d of %d left half precision's range; float32 computes it", self._name, row, len(result)
            )
            with self._making:
                if self._in_float32 is None:
                    self._in_float32 = self._make()
            result[row] = self._in_float32(*(each[row : row + 1] for each in rows))[0]
        return result


class UpcastAttention:
    """An attention processor of diffusers that multiplies and weighs in float32.

    Stable Diffusion 2.1's products of queries and keys reach 3e5, and fp16 ends at 65,504. diffusers' own processor for
    scaled_dot_product_attention does not look at `upcast_attention`, and trusts the kernel: the fused ones add up in
    float32, but which one runs depends on GPU, shapes and versions. For the attention of UNets alone: without mask,
    group norm or residual connection of its own.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            project(x).float().unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project, x in ((attn.to_q, hidden_states), (attn.to_k, states), (attn.to_v, states))
        )
        attended = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        result: torch.Tensor = attn.to_out[0](attended.to(hidden_states.dtype))
        return result

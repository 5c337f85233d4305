"""An autoencoder's decoder that works in strips: the picture of the whole decoder, in a quarter of its memory.

What takes the memory of a decoder are copies of its widest layers: normalised, activated, enlarged, each as large as
the picture times 256 channels. Here a layer is made of the one before it strip by strip, and takes its place where it
can. Norms take their statistics of the whole layer, so that the result differs by rounding alone, other than of tiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import interpolate, pad, silu

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

ROWS = 16


@torch.inference_mode()
def decode_in_strips(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """As `vae.decode` of [B, C, h, w] latents: [B, 3, H, W], not differentiable."""
    decoder = vae.decoder
    layer: torch.Tensor = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            layer = _resnet(resnet, layer)
        for upsampler in block.upsamplers or ():
            layer = _enlarged(upsampler.conv, layer)
    norm = _Norm(decoder.conv_norm_out, layer)
    result = _like(layer, decoder.conv_out.out_channels, layer.shape[2])
    for top, bottom in _strips(layer.shape[2]):
        first, last = max(top - 1, 0), min(bottom + 1, layer.shape[2])
        result[:, :, top:bottom] = _convolved(decoder.conv_out, norm(layer[:, :, first:last]), top, bottom, layer)
    return result


class _Norm:
    """A group norm by the statistics of a layer, with the activation behind it, for any rows of it."""

    def __init__(self, norm: torch.nn.GroupNorm, layer: torch.Tensor) -> None:
        groups = norm.num_groups
        mean, square = (torch.zeros(len(layer), groups, dtype=torch.float64, device=layer.device) for _ in range(2))
        for top, bottom in _strips(layer.shape[2]):
            rows = layer[:, :, top:bottom].float()
            rows = rows.view(len(rows), groups, -1, *rows.shape[2:])
            spread, middle = (each.double() for each in torch.var_mean(rows, dim=(2, 3, 4), correction=0))
            share = (bottom - top) / layer.shape[2]
            mean += share * middle
            square += share * (spread + middle**2)
        deviation = (square - mean**2 + norm.eps).sqrt()
        each = norm.num_channels // groups
        mean, deviation = (values.repeat_interleave(each, dim=1)[..., None, None] for values in (mean, deviation))
        weight, bias = (values.double()[:, None, None] for values in (norm.weight, norm.bias))
        self._scale = (weight / deviation).float()
        self._shift = (bias - mean * weight / deviation).float()

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        scaled = (rows.float() * self._scale).add_(self._shift)
        return silu(scaled, inplace=True).to(rows.dtype)


def _resnet(resnet: Any, layer: torch.Tensor) -> torch.Tensor:
    """A residual block without a time embedding. Its second half takes the place of its first."""
    height = layer.shape[2]
    norm = _Norm(resnet.norm1, layer)
    made = _like(layer, resnet.conv1.out_channels, height)
    for top, bottom in _strips(height):
        rows = norm(layer[:, :, max(top - 1, 0) : bottom + 1])
        made[:, :, top:bottom] = _convolved(resnet.conv1, rows, top, bottom, layer)
    norm = _Norm(resnet.norm2, made)
    above = made[:, :, :0]
    for top, bottom in _strips(height):
        rows = norm(torch.cat([above, made[:, :, top : bottom + 1]], dim=2))
        # The next strip needs it as it was.
        above = made[:, :, bottom - 1 : bottom].clone()
        kept = layer[:, :, top:bottom]
        if resnet.conv_shortcut is not None:
            kept = resnet.conv_shortcut(kept)
        sums = kept + _convolved(resnet.conv2, rows, top, bottom, layer)
        made[:, :, top:bottom] = sums / resnet.output_scale_factor
    return made


def _enlarged(conv: torch.nn.Conv2d, layer: torch.Tensor) -> torch.Tensor:
    """Twice as high and wide, each place four times, and convolved."""
    height = 2 * layer.shape[2]
    made = _like(layer, conv.out_channels, height, 2)
    for top, bottom in _strips(height):
        first, last = max(top - 1, 0), min(bottom + 1, height)
        rows = interpolate(layer[:, :, first // 2 : -(-last // 2)], scale_factor=2.0, mode="nearest")
        skipped = first % 2
        made[:, :, top:bottom] = _convolved(conv, rows[:, :, skipped : skipped + last - first], top, bottom, made)
    return made


def _strips(height: int) -> Iterator[tuple[int, int]]:
    """First row and row after the last of each strip."""
    return ((top, min(top + ROWS, height)) for top in range(0, height, ROWS))


def _convolved(conv: torch.nn.Conv2d, rows: torch.Tensor, top: int, bottom: int, layer: torch.Tensor) -> torch.Tensor:
    """Rows `top` to `bottom` of a 3 x 3 convolution of a layer, from those rows of it and one more on either side."""
    padded = pad(rows, (1, 1, int(top == 0), int(bottom == layer.shape[2])))
    return torch.nn.functional.conv2d(padded, conv.weight, conv.bias)


def _like(layer: torch.Tensor, channels: int, height: int, wider: int = 1) -> torch.Tensor:
    """An empty layer in the memory layout of convolutions here."""
    shape = len(layer), channels, height, layer.shape[3] * wider
    return torch.empty(shape, dtype=layer.dtype, device=layer.device, memory_format=torch.channels_last)

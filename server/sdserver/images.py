"""Decoded pixels -> an image file, and latents -> a preview."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from sdserver.engines import PreviewMap

from sdserver.request import Output

Array = NDArray[np.float32]
Pixels = NDArray[np.uint8]

# Media type -> Pillow's name of the format, and whether it takes a quality.
MEDIA_TYPES = {"image/png": ("PNG", False), "image/webp": ("WEBP", True), "image/jpeg": ("JPEG", True)}
DEFAULT_QUALITY = 95
# JPEG takes a third of WebP's time for pictures of this size.
PREVIEW_OUTPUT = Output("image/jpeg", 80)


def crop(pixels: Pixels, width: int, height: int) -> Pixels:
    """The middle `height` x `width` of [H, W, 3] pixels."""
    top = (pixels.shape[0] - height) // 2
    left = (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def preview(latents: Array, preview_map: PreviewMap) -> Pixels:
    """[h, w, 3] pixels of [C, h, w] latents: a linear guess of what the decoder would draw, one pixel a place."""
    rgb = np.tensordot(np.array(preview_map.matrix, np.float32), latents, axes=1).transpose(1, 2, 0)
    return ((rgb + np.array(preview_map.bias, np.float32)) * 255).round().clip(0, 255).astype(np.uint8)


def encode(pixels: Pixels, output: Output) -> bytes:
    """[H, W, 3] pixels as a file."""
    buffer = io.BytesIO()
    format_name, lossy = MEDIA_TYPES[output.media_type]
    options = {"quality": output.quality} if lossy else {}
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format_name, **options)
    return buffer.getvalue()

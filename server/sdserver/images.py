"""Decoded pixels -> an image file."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from sdserver.request import Output

Pixels = NDArray[np.uint8]

# Media type -> Pillow's name of the format, and whether it takes a quality.
MEDIA_TYPES = {"image/png": ("PNG", False), "image/webp": ("WEBP", True), "image/jpeg": ("JPEG", True)}
DEFAULT_QUALITY = 95


def crop(pixels: Pixels, width: int, height: int) -> Pixels:
    """The middle `height` x `width` of [H, W, 3] pixels."""
    top = (pixels.shape[0] - height) // 2
    left = (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def encode(pixels: Pixels, output: Output) -> bytes:
    """[H, W, 3] pixels as a file."""
    buffer = io.BytesIO()
    format_name, lossy = MEDIA_TYPES[output.media_type]
    options = {"quality": output.quality} if lossy else {}
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format_name, **options)
    return buffer.getvalue()

"""Decoded pixels -> an image file, and latents -> a preview."""

from __future__ import annotations

import io
import zlib
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, features

from sdserver import metadata, xmp
from sdserver.request import Output

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdserver.engines import PreviewMap
    from sdserver.metadata import Metadata

Array = NDArray[np.float32]
Pixels = NDArray[np.uint8]

# Media type -> Pillow's name of the format, and whether it takes a quality.
MEDIA_TYPES = {
    "image/png": ("PNG", False),
    "image/webp": ("WEBP", True),
    "image/jpeg": ("JPEG", True),
    "image/avif": ("AVIF", True),
}
# Where more time buys little size: see `benchmarks.encoding`. AVIF's tiles, and so its bytes, depend on its threads.
_SPEED: dict[str, dict[str, int]] = {
    "PNG": {"compress_level": 1, "compress_type": zlib.Z_RLE},
    "WEBP": {"method": 2},
    "JPEG": {},
    "AVIF": {"speed": 9, "max_threads": 1},
}
DEFAULT_QUALITY = 95
# JPEG takes a third of WebP's time for pictures of this size.
PREVIEW_OUTPUT = Output("image/jpeg", 80)


def crop(pixels: Pixels, width: int, height: int, step: int = 1) -> Pixels:
    """The middle `height` x `width` of [H, W, 3] pixels, from a multiple of `step` on in each direction."""
    top = (pixels.shape[0] - height) // 2 // step * step
    left = (pixels.shape[1] - width) // 2 // step * step
    return pixels[top : top + height, left : left + width]


def enlarge(pixels: Pixels, width: int, height: int) -> Pixels:
    """[height, width, 3] the picture at a greater size, by Lanczos' kernel."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling.LANCZOS))


def preview(latents: Array, preview_map: PreviewMap) -> Pixels:
    """[h, w, 3] pixels of [C, h, w] latents: a linear guess of what the decoder would draw, one pixel a place."""
    rgb = np.tensordot(np.array(preview_map.matrix, np.float32), latents, axes=1).transpose(1, 2, 0)
    return ((rgb + np.array(preview_map.bias, np.float32)) * 255).round().clip(0, 255).astype(np.uint8)


def missing_codecs(available: Callable[[str], bool | None] = features.check) -> list[str]:
    """Those of Pillow's optional codecs that MEDIA_TYPES needs and this Pillow was built without."""
    return [codec for codec in ("webp", "jpg", "zlib", "avif") if not available(codec)]


def encode(pixels: Pixels, output: Output, says: Metadata | None = None) -> bytes:
    """[H, W, 3] pixels as a file that says so much about itself."""
    buffer = io.BytesIO()
    format_name, lossy = MEDIA_TYPES[output.media_type]
    options: dict[str, object] = dict(_SPEED[format_name])
    if lossy:
        options["quality"] = output.quality
    if says is not None:
        options |= _embedded(format_name, says)
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format_name, **options)
    return buffer.getvalue()


def _embedded(format_name: str, says: Metadata) -> dict[str, object]:
    """Pillow's options that write metadata into a file of a format."""
    if format_name == "JPEG":
        # Pillow's own options refuse more than one segment of XMP.
        return {"extra": metadata.jpeg_segments(says)}
    if format_name == "PNG":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("XML:com.adobe.xmp", xmp.packet(says.properties).decode())
        chunks.add_text("parameters", says.parameters)
        return {"pnginfo": chunks}
    return {"xmp": xmp.packet(says.properties), "exif": metadata.exif(says.parameters)}

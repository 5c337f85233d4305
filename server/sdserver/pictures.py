"""Pictures that strangers send: a PNG, JPEG or WebP file -> pixels, or one sentence about what is wrong with it."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.ImageFile import ImageFile

ORIENTATION = 0x0112
# EXIF orientation -> what turns the picture upright; 1 is upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Encoders write about ten. Each scan of a progressive JPEG costs a pass over all pixels, and only a few bytes.
MAX_JPEG_SCANS = 100


class UnreadablePicture(ValueError):
    """Bytes that are no picture, or none that may be sent. Says what to send instead."""


def read_colour(data: bytes, max_bytes: int, max_pixels: int) -> Image.Image:
    """The first picture in a file, upright: mode RGB, or RGBA where a pixel is not opaque.

    The format is told by the content. Its limits are checked before anything is decoded. Raises UnreadablePicture.
    """
    picture = _decode(data, max_bytes, max_pixels)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    least, _ = picture.getchannel("A").getextrema()
    return picture if least != 255 else picture.convert("RGB")


def read_grey(data: bytes, max_bytes: int, max_pixels: int) -> Image.Image:
    """The first picture in a file, upright, as grey: mode L. What is transparent is black. Raises UnreadablePicture."""
    return _on_black(read_colour(data, max_bytes, max_pixels)).convert("L")


def read_depth(data: bytes, max_bytes: int, max_pixels: int) -> Image.Image:
    """The first picture in a file, upright, as grey with all its bits: mode F, 0 to 1. What is transparent is 0.

    Raises UnreadablePicture.
    """
    picture = _decode(data, max_bytes, max_pixels, _all_bits)
    if picture.mode != "F":
        picture = Image.fromarray(np.asarray(_on_black(picture).convert("L"), np.float32) / 255)
    return picture


def _decode(
    data: bytes, max_bytes: int, max_pixels: int, depth: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image:
    """`depth` makes of grey of 16 bits what is wanted; None: grey of 8."""
    if len(data) > max_bytes:
        raise UnreadablePicture(f"{len(data)} bytes are too many; at most {max_bytes}")
    kind = _kind(data)
    if kind is JpegImageFile and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise UnreadablePicture(f"a JPEG of more than {MAX_JPEG_SCANS} scans; save it anew")
    if kind is WebPImageFile:
        # Pillow's reader makes room for the whole picture as soon as it is opened.
        _check_size(*_webp_size(data), max_pixels)
    try:
        # Not Image.open: it knows many more formats, and warns of large pictures where they are to be refused.
        with kind(io.BytesIO(data)) as file:
            _check_size(*file.size, max_pixels)
            file.load()
            picture = (depth or _eight_bits)(file)
            orientation = _orientation(file)
    except UnreadablePicture:
        raise
    except Exception as error:
        # Decoders raise almost anything for almost anything that is not what it should be.
        raise UnreadablePicture("cannot be decoded: the file is damaged or cut off; save or send it anew") from error
    return picture.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else picture


def _on_black(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, picture.convert("RGBA"))


def _kind(data: bytes) -> type[ImageFile]:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImageFile
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImageFile
    raise UnreadablePicture("is no PNG, JPEG or WebP; convert it to one of them")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height in the first chunk. RFC 9649, sections 2.5 to 2.7."""
    try:
        match data[12:16]:
            case b"VP8X":
                return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
            case b"VP8L":
                (bits,) = struct.unpack_from("<I", data, 21)
                return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
            case b"VP8 ":
                width, height = struct.unpack_from("<HH", data, 26)
                return width & 0x3FFF, height & 0x3FFF
    except struct.error:
        pass
    raise UnreadablePicture("is a damaged WebP; save or send it anew")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise UnreadablePicture(
            f"{width} x {height} is {width * height} pixels; at most {max_pixels}, so make it smaller before"
        )


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits as grey of 8, which Pillow would cut off rather than scale; all else as it is."""
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture).astype(np.uint32)
    grey = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    transparent = picture.info.get("transparency")
    if transparent is None:
        return grey
    alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))


def _all_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits as floats, 0 to 1; all else as it is."""
    if not picture.mode.startswith("I") or "transparency" in picture.info:
        return _eight_bits(picture)
    return Image.fromarray(np.asarray(picture).astype(np.float32) / 65535)


def _orientation(file: ImageFile) -> int:
    try:
        orientation = file.getexif().get(ORIENTATION, 1)
    except Exception:
        # A picture may well be whole where its metadata are not.
        return 1
    return orientation if isinstance(orientation, int) else 1

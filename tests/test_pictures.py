"""What strangers send: every kind of picture is read as it is meant, everything else is refused in one sentence."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from sdserver.pictures import UPRIGHT, UnreadablePicture, read_colour, read_grey

FORMATS = ("PNG", "JPEG", "WEBP")
BYTES, PIXELS = 100_000, 10_000

noise = np.random.default_rng(7).integers(0, 256, (20, 30, 3), dtype=np.uint8)
rgb = Image.fromarray(noise)


def encoded(picture: Image.Image, format_name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format_name, **options)
    return buffer.getvalue()


def colour(data: bytes) -> Image.Image:
    return read_colour(data, BYTES, PIXELS)


def refusal(data: bytes) -> str:
    with pytest.raises(UnreadablePicture) as caught:
        colour(data)
    return str(caught.value)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_of_png_is_read_as_pillow_shows_it(mode: str) -> None:
    picture = Image.fromarray(noise[..., 0].astype(np.uint16) * 257) if mode == "I;16" else rgb.convert(mode)
    expected = Image.fromarray(noise[..., 0]) if mode == "I;16" else picture
    assert colour(encoded(picture, "PNG")).tobytes() == expected.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "YCbCr"])
def test_every_mode_of_jpeg_is_read(mode: str) -> None:
    flat = Image.new("RGB", (16, 16), (200, 90, 40)).convert(mode)
    read = np.asarray(colour(encoded(flat, "JPEG", quality=100))).astype(int)
    assert np.abs(read - np.asarray(flat.convert("RGB"))).max() <= 4


@pytest.mark.parametrize("format_name", ["PNG", "WEBP"])
def test_alpha_is_kept_where_there_is_any(format_name: str) -> None:
    clear = rgb.convert("RGBA")
    clear.putpixel((3, 4), (9, 8, 7, 0))
    assert colour(encoded(clear, format_name, lossless=True)).getchannel("A").tobytes().count(0) == 1
    assert colour(encoded(rgb.convert("RGBA"), format_name, lossless=True)).mode == "RGB"


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16"])
def test_a_colour_that_stands_for_transparency_is_transparent(mode: str) -> None:
    values = np.zeros((4, 4), np.uint16 if mode == "I;16" else np.uint8)
    values[0, 0] = 1
    picture = Image.fromarray(values)
    if mode == "P":
        picture.putpalette([255, 0, 0, 0, 255, 0])
    elif mode == "1":
        picture = picture.point(lambda value: value * 255).convert("1")
    data = encoded(picture, "PNG", transparency=255 if mode == "1" else 1)
    alpha = np.asarray(colour(data).getchannel("A"))
    assert (alpha[0, 0], alpha.sum()) == (0, 15 * 255)


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(format_name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    halves = Image.new("RGB", (24, 16), "white")
    halves.paste("black", (0, 0, 8, 8))
    expected = halves.transpose(UPRIGHT[orientation]) if orientation > 1 else halves
    read = colour(encoded(halves, format_name, exif=exif, quality=100))
    assert read.size == expected.size
    assert np.abs(np.asarray(read).astype(int) - np.asarray(expected)).mean() < 5


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("format_name", FORMATS)
def test_exif_that_is_broken_turns_nothing(format_name: str) -> None:
    assert colour(encoded(rgb, format_name, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")).size == rgb.size


@pytest.mark.parametrize("format_name", ["PNG", "WEBP"])
def test_of_an_animation_the_first_picture_is_read(format_name: str) -> None:
    data = encoded(rgb, format_name, save_all=True, append_images=[rgb.rotate(180)], lossless=True)
    assert colour(data).tobytes() == rgb.tobytes()


@pytest.mark.parametrize("format_name", ["GIF", "BMP", "TIFF", "ICO", "PPM", "TGA", "AVIF", "JPEG2000"])
def test_other_formats_are_refused_by_their_content(format_name: str) -> None:
    assert "no PNG, JPEG or WebP" in refusal(encoded(rgb, format_name))


@pytest.mark.parametrize("format_name", FORMATS)
def test_limits_are_those_of_bytes_and_of_pixels(format_name: str) -> None:
    data = encoded(rgb, format_name)
    assert read_colour(data, len(data), 600).size == (30, 20)
    with pytest.raises(UnreadablePicture, match="at most"):
        read_colour(data, len(data) - 1, 600)
    with pytest.raises(UnreadablePicture, match="30 x 20 is 600 pixels; at most 599"):
        read_colour(data, len(data), 599)


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def webp(width: int, height: int) -> bytes:
    sizes = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return b"RIFF\x00\x01\x00\x00WEBPVP8X\x0a\x00\x00\x00\x00\x00\x00\x00" + sizes + bytes(200)


@pytest.mark.parametrize("bomb", [png(2**31 - 1, 2**31 - 1), webp(2**24, 2**24)], ids=["png", "webp"])
def test_a_bomb_is_refused_by_its_header(bomb: bytes) -> None:
    assert "pixels; at most 10000" in refusal(bomb)


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    data = encoded(rgb, "JPEG", progressive=True)
    assert colour(data).size == rgb.size
    assert "scans" in refusal(data + b"\xff\xda" * 100)


@pytest.mark.parametrize("format_name", FORMATS)
def test_what_is_cut_off_or_empty_is_refused(format_name: str) -> None:
    data = encoded(rgb, format_name)
    for length in (0, 3, 12, 16, 20, 40, len(data) // 2, len(data) - 100):
        refusal(data[:length])


def test_masks_are_grey_and_black_where_they_are_transparent() -> None:
    mask = Image.new("RGBA", (2, 1), (255, 255, 255, 255))
    mask.putpixel((1, 0), (255, 255, 255, 0))
    assert list(read_grey(encoded(mask, "PNG"), BYTES, PIXELS).tobytes()) == [255, 0]
    red = Image.new("RGB", (2, 1), (255, 0, 0))
    assert list(read_grey(encoded(red, "PNG"), BYTES, PIXELS).tobytes()) == [76, 76]


whole = {format_name: encoded(rgb, format_name) for format_name in FORMATS}


@hypothesis_settings(max_examples=150)
@given(
    st.sampled_from(FORMATS),
    st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=4)), max_size=6),
    st.integers(0, 3000),
    st.binary(max_size=20),
)
@pytest.mark.filterwarnings("ignore")
def test_no_bytes_do_more_than_to_be_refused(
    format_name: str, changes: list[tuple[int, bytes]], length: int, tail: bytes
) -> None:
    data = bytearray(whole[format_name])
    for position, values in changes:
        data[position : position + len(values)] = values
    try:
        read = colour(bytes(data[:length]) + tail)
    except UnreadablePicture:
        return
    assert read.mode in ("RGB", "RGBA")
    assert read.width * read.height <= PIXELS

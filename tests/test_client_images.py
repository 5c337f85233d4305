"""Images as files, in Pillow and in notebooks."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import PIL.Image
import pytest
from sdclient import Image, Preview

if TYPE_CHECKING:
    from pathlib import Path


def encoded(media_type: str) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (6, 4), (10, 200, 30)).save(file, media_type.partition("/")[2])
    return file.getvalue()


def an_image(media_type: str = "image/png") -> Image:
    return Image(data=encoded(media_type), media_type=media_type, width=6, height=4, index=0, seed=0)


@pytest.mark.parametrize(
    ("media_type", "name"),
    [
        ("image/png", "lake.png"),
        ("image/png", "LAKE.PNG"),
        ("image/jpeg", "lake.jpg"),
        ("image/jpeg", "lake.jpeg"),
        ("image/webp", "lake.webp"),
        ("image/png", "lake"),
        ("image/png", "lake.v2"),
    ],
)
def test_an_image_is_saved_as_it_came(tmp_path: Path, media_type: str, name: str) -> None:
    image = an_image(media_type)
    assert image.save(tmp_path / name) == tmp_path / name
    assert (tmp_path / name).read_bytes() == image.data
    assert image.save(str(tmp_path / name)) == tmp_path / name


def test_a_suffix_that_promises_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lake.jpg"
    with pytest.raises(ValueError, match=r"lake\.jpg promises image/jpeg.*output=Output\('image/jpeg'\)"):
        an_image("image/png").save(path)
    assert not path.exists()


@pytest.mark.parametrize("media_type", ["image/png", "image/jpeg", "image/webp"])
def test_pillow_gets_the_pixels(media_type: str) -> None:
    picture = an_image(media_type).to_pil()
    assert picture.size == (6, 4)
    assert picture.getpixel((3, 2)) == pytest.approx((10, 200, 30), abs=3)


def test_a_notebook_shows_png_and_jpeg() -> None:
    png, jpeg, webp = (an_image(media_type) for media_type in ("image/png", "image/jpeg", "image/webp"))
    assert (png._repr_png_(), png._repr_jpeg_()) == (png.data, None)
    assert (jpeg._repr_png_(), jpeg._repr_jpeg_()) == (None, jpeg.data)
    assert (webp._repr_png_(), webp._repr_jpeg_()) == (None, None)


def test_the_repr_of_a_picture_has_no_bytes() -> None:
    assert (
        repr(an_image())
        == "Image(media_type='image/png', width=6, height=4, index=0, seed=0, signed=False, safety=None)"
    )
    preview = Preview(data=b"bytes", media_type="image/webp", width=6, height=4, index=0, step=5)
    assert "bytes" not in repr(preview)

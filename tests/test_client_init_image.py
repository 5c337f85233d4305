"""Initial images and masks from files, from generated images and from Pillow's."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image as Pillow
from PIL import ImageOps
from sdclient import Image, InitImage, InvalidRequestError, Mask, Outpaint, Safety, SDError, TwoPass, Variation
from sdclient._wire import to_request

if TYPE_CHECKING:
    from pathlib import Path

GENERATED = Image(data=b"a file", media_type="image/png", width=8, height=8, index=0, seed=1)


@pytest.mark.parametrize("kind", [InitImage, Mask])
def test_a_file_is_sent_as_it_is(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "photograph.jpg"
    path.write_bytes(b"any bytes")
    assert kind.open(path) == kind.open(str(path)) == kind(b"any bytes")
    with pytest.raises(FileNotFoundError):
        kind.open(tmp_path / "absent.png")


def test_options_go_along() -> None:
    assert InitImage.of(GENERATED, strength=0.5, fit="contain") == InitImage(b"a file", 0.5, "contain")
    assert Mask.of(GENERATED, feather=0) == Mask(b"a file", 0)


def test_a_blocked_image_cannot_be_started_from() -> None:
    blocked = Image(data=b"", media_type="image/png", width=8, height=8, index=0, seed=1, safety=Safety("blocked", ()))
    with pytest.raises(SDError):
        InitImage.of(blocked)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_a_pillow_image_of_any_mode_is_sent_as_png(mode: str) -> None:
    picture = Pillow.linear_gradient("L").resize((8, 4)).convert("RGB").convert(mode)
    with Pillow.open(io.BytesIO(InitImage.of(picture).data)) as sent:
        assert sent.format == "PNG"
        assert sent.convert("RGB").tobytes() == picture.convert("RGB").tobytes()


def test_a_pillow_image_that_lies_on_its_side_is_sent_with_its_orientation() -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Pillow.new("RGB", (8, 4)).save(buffer, "JPEG", exif=exif)
    with Pillow.open(buffer) as picture, Pillow.open(io.BytesIO(InitImage.of(picture).data)) as sent:
        assert ImageOps.exif_transpose(sent).size == (4, 8)


def test_making_them_of_files_imports_no_pillow(tmp_path: Path) -> None:
    (tmp_path / "lake.png").write_bytes(b"data")
    code = "import sys; from sdclient import InitImage; InitImage.open('lake.png'); sys.exit('PIL' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_zero_is_a_value_and_what_is_left_out_is_absent() -> None:
    request = to_request(
        "a lake",
        {
            "init_image": InitImage(b"x", strength=0),
            "mask": Mask(b"y", feather=0),
            "outpaint": Outpaint(),
            "variation": Variation(0, seed=0),
            "two_pass": TwoPass(),
        },
    )
    assert request.init_image.HasField("strength")
    assert request.mask.HasField("feather")
    assert request.HasField("outpaint")
    assert request.variation.HasField("strength")
    assert request.variation.HasField("seed")
    assert request.HasField("two_pass")
    assert not request.two_pass.ListFields()
    assert not to_request("a lake", {"variation": Variation(0)}).variation.HasField("seed")


def test_what_is_no_fit_is_refused_before_anything_is_sent() -> None:
    fit: Any = "crop"
    with pytest.raises(InvalidRequestError) as caught:
        to_request("a lake", {"init_image": InitImage(b"x", fit=fit)})
    assert "cover, contain, stretch" in caught.value.violations["init_image"]


def test_one_for_the_other_is_refused() -> None:
    mask: Any = Mask(b"y", feather=1)
    with pytest.raises((InvalidRequestError, TypeError)):
        to_request("a lake", {"init_image": mask})

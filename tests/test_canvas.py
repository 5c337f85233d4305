"""Initial images become as large as the result, and what is kept of them is kept exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sdserver.canvas import Fit, Outpaint, canvas, default_size, feathered
from sdserver.images import crop

if TYPE_CHECKING:
    from numpy.typing import NDArray

NONE = Outpaint()
rng = np.random.default_rng(3)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = rng.integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(values[..., 0] if bands == 1 else values, mode)


def of(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image)


def test_a_picture_of_the_right_size_is_taken_as_it_is() -> None:
    image = picture(33, 17)
    for fit in ("cover", "contain", "stretch"):
        made = canvas(image, None, 33, 17, NONE, fit, 4.0)
        np.testing.assert_array_equal(made.pixels, of(image))
        assert made.repaint is None


@pytest.mark.parametrize("size", [(20, 30), (30, 20), (19, 30), (30, 13)])
def test_cover_cuts_a_larger_picture_without_scaling_where_one_side_fits(size: tuple[int, int]) -> None:
    width, height = size
    image = picture(30, 30)
    left, top = (30 - width) // 2, (30 - height) // 2
    made = canvas(image, None, width, height, NONE, "cover", 4.0)
    np.testing.assert_array_equal(made.pixels, of(image)[top : top + height, left : left + width])


def test_contain_repaints_what_the_picture_leaves_and_stretch_and_cover_leave_nothing() -> None:
    image = picture(40, 20)
    contained = canvas(image, None, 40, 40, NONE, "contain", 0.0)
    assert contained.repaint is not None
    np.testing.assert_array_equal(contained.repaint[:, 7], [1] * 10 + [0] * 20 + [1] * 10)
    np.testing.assert_array_equal(contained.pixels[10:30], of(image))
    for fit in ("cover", "stretch"):
        assert canvas(image, None, 40, 40, NONE, fit, 4.0).repaint is None


def test_outpainting_keeps_the_picture_between_its_margins() -> None:
    image = picture(16, 12)
    made = canvas(image, None, 16 + 5 + 1, 12 + 2 + 3, Outpaint(5, 1, 2, 3), "cover", 0.0)
    np.testing.assert_array_equal(made.pixels[2:14, 5:21], of(image))
    expected = np.ones((17, 22))
    expected[2:14, 5:21] = 0
    assert made.repaint is not None
    np.testing.assert_array_equal(made.repaint, expected)


def test_transparent_pixels_are_repainted_and_their_hidden_colours_do_not_bleed() -> None:
    image = Image.new("RGBA", (40, 40), (10, 200, 30, 255))
    image.paste((255, 0, 255, 0), (0, 0, 20, 40))
    for size in (40, 24, 60):
        made = canvas(image, None, size, size, NONE, "cover", 0.0)
        assert made.repaint is not None
        assert made.repaint[:, : size // 2 - 3].min() == 1
        assert made.repaint[:, size // 2 + 3 :].max() == 0
        assert np.abs(made.pixels.astype(int) - (10, 200, 30)).max() <= 8


def test_a_picture_without_any_content_is_repainted_throughout() -> None:
    made = canvas(Image.new("RGBA", (8, 8)), None, 8, 8, NONE, "cover", 4.0)
    assert made.repaint is not None
    assert made.repaint.min() == 1


def test_gaps_are_filled_smoothly_from_around_them() -> None:
    ramp = Image.fromarray(np.linspace(0, 255, 64).astype(np.uint8)[None].repeat(64, 0)).convert("RGB")
    made = canvas(ramp, None, 128, 64, Outpaint(left=32, right=32), "cover", 4.0)
    assert made.pixels[:, 28:32].max() < 50
    assert made.pixels[:, :32].max() < 80
    assert made.pixels[:, -32:-28].min() > 205
    assert made.pixels[:, -32:].min() > 175
    holed = Image.merge("RGBA", (*ramp.split(), Image.new("L", (64, 64), 255)))
    holed.paste((0, 0, 0, 0), (24, 24, 40, 40))
    filled = canvas(holed, None, 64, 64, NONE, "cover", 4.0).pixels
    assert np.abs(filled.astype(int) - of(ramp)).max() < 40


def test_a_mask_is_fitted_as_the_picture_is_and_white_beside_it() -> None:
    mask = Image.new("L", (8, 4), 0)
    mask.paste(255, (4, 0, 8, 4))
    made = canvas(picture(16, 8), mask, 16, 16, NONE, "contain", 0.0)
    assert made.repaint is not None
    assert made.repaint[:4].min() == made.repaint[-4:].min() == 1
    assert made.repaint[4:12, :6].max() == 0
    assert made.repaint[4:12, 10:].min() == 1


def test_with_a_black_mask_everything_is_kept() -> None:
    image = picture(16, 16)
    made = canvas(image, Image.new("L", (16, 16), 0), 16, 16, NONE, "cover", 4.0)
    np.testing.assert_array_equal(made.composite(of(picture(16, 16))), of(image))


masks = st.builds(
    lambda height, width, seed, share: np.random.default_rng(seed).random((height, width)) < share,
    st.integers(1, 50),
    st.integers(1, 50),
    st.integers(0, 99),
    st.sampled_from([0.0, 0.002, 0.02, 0.5]),
)


@given(masks, st.sampled_from([0.0, 0.3, 1.0, 4.0, 64.0]))
def test_the_soft_border_lies_outside_and_ends(white: NDArray[np.bool_], feather: float) -> None:
    soft = feathered(white.astype(np.float32), feather)
    assert soft.shape == white.shape
    assert 0 <= soft.min() <= soft.max() <= 1 + 1e-6
    assert (soft[white] >= 1).all()
    reach = 2 * int(np.ceil(2 * feather))
    rows, columns = np.nonzero(white)
    for row, column in np.argwhere(~white)[::17]:
        distance = np.maximum(abs(rows - row), abs(columns - column)).min(initial=999)
        if distance > reach:
            assert soft[row, column] == 0


def test_the_soft_border_falls_steadily_and_grey_stays_grey() -> None:
    half = np.zeros((5, 60), np.float32)
    half[:, :20] = 1
    soft = feathered(half, 4.0)
    assert (np.diff(soft, axis=1) <= 1e-6).all()
    assert soft[2, 27] > 0.5 > soft[2, 28]
    grey = np.full((20, 20), 0.5, np.float32)
    np.testing.assert_allclose(feathered(grey, 4.0), 0.5, atol=1e-6)


@pytest.mark.parametrize("size", [(16, 16), (17, 30), (100, 3)])
def test_what_is_padded_is_what_cropping_takes_off(size: tuple[int, int]) -> None:
    width, height = size
    image, mask = picture(width, height), picture(width, height, "L")
    made = canvas(image, mask, width, height, NONE, "cover", 0.0)
    padded = made.padded(128, 64)
    np.testing.assert_array_equal(crop(padded, width, height), of(image))
    cells = made.repaint_in_latents(128, 64, 8)
    assert cells is not None
    assert cells.shape == (8, 16)
    assert made.repaint is not None
    top, left = (64 - height) // 2, (128 - width) // 2
    blown_up = cells.repeat(8, 0).repeat(8, 1)[top : top + height, left : left + width]
    assert (blown_up >= made.repaint).all()
    assert cells.max() == made.repaint.max()


margins = st.builds(Outpaint, *[st.integers(0, 200)] * 4)


@given(st.integers(1, 5000), st.integers(1, 5000), margins)
def test_the_default_size_is_the_pictures_own_or_the_greatest_in_proportion(
    width: int, height: int, outpaint: Outpaint
) -> None:
    most, most_pixels = 512, 147456
    made = default_size(width, height, outpaint, most, most_pixels)
    own = width + outpaint.across, height + outpaint.down
    if max(own) <= most and own[0] * own[1] <= most_pixels:
        assert made == own
        return
    across, down = made[0] - outpaint.across, made[1] - outpaint.down
    assert (across, down) == (1, 1) or max(made) <= most or min(across, down) == 1
    if min(across, down) > 1:
        assert made[0] * made[1] <= most_pixels
        assert abs(across - width * down / height) <= max(1.01, 1.01 * width / height)
        larger = (across + 1) * max(1, (down + 1) / (down or 1))
        assert larger > across


def test_fits_have_their_names() -> None:
    fits: tuple[Fit, ...] = ("cover", "contain", "stretch")
    for fit in fits:
        assert canvas(picture(9, 5), None, 7, 7, NONE, fit, 1.0).pixels.shape == (7, 7, 3)

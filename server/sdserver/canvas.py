"""An initial image as wide and high as the result: fitted, its gaps filled, and how much of each pixel is repainted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

Fit = Literal["cover", "contain", "stretch"]
FITS: tuple[Fit, ...] = ("cover", "contain", "stretch")

# The Gaussian of the soft border is cut off here, so that there are pixels beyond it.
FEATHER_REACH = 2.0
# Of 255. The colour of what is less opaque is too coarse once it was scaled.
LEAST_OPACITY = 32


@dataclass(frozen=True, slots=True)
class Outpaint:
    """New margins around the initial image, in pixels of the result."""

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0

    @property
    def across(self) -> int:
        """Pixels that it adds to the width."""
        return self.left + self.right

    @property
    def down(self) -> int:
        """Pixels that it adds to the height."""
        return self.top + self.bottom


@dataclass(frozen=True, slots=True, eq=False)
class Canvas:
    """An initial image of the result's size.

    What has no content (outpainted, transparent, beside a contained image) is filled from around it, so that an encoder
    sees no edge there.
    """

    pixels: Pixels
    """[H, W, 3]."""
    repaint: Floats | None
    """[H, W] how much of each pixel is repainted, 0 (kept exactly) to 1; None: nothing is kept, and nothing masked."""
    hidden: NDArray[np.bool_] | None = None
    """[H, W] the pixels of which half or more is repainted, without the soft border around them; None: all."""

    def padded(self, width: int, height: int) -> Pixels:
        """[height, width, 3] the pixels in the middle of a larger picture, their edges continued."""
        pixels: Pixels = np.pad(self.pixels, (*_margins(self.pixels, width, height), (0, 0)), "edge")
        return pixels

    def repaint_in_latents(self, width: int, height: int, downsampling: int) -> Floats | None:
        """[h, w] how much of each place of the latents of `padded` is repainted: as much as of any pixel in it."""
        if self.repaint is None:
            return None
        padded = np.pad(self.repaint, _margins(self.repaint, width, height), "edge")
        cells = padded.reshape(height // downsampling, downsampling, width // downsampling, downsampling)
        most: Floats = cells.max(axis=(1, 3))
        return most

    def masked(self, width: int, height: int, downsampling: int) -> tuple[Pixels, Floats]:
        """[height, width, 4] the pixels of `padded`, transparent where they are hidden, and [h, w] 1 for the places of
        the latents that are, 0 for others.

        A place is what its first pixel is, because inpainting UNets were trained with masks that were made so.
        """
        hidden = np.ones((height, width), np.bool_)
        if self.hidden is not None:
            hidden = np.pad(self.hidden, _margins(self.hidden, width, height), "edge")
        opacity = np.where(hidden, 0, 255).astype(np.uint8)
        pixels = np.concatenate([self.padded(width, height), opacity[..., None]], axis=2)
        return pixels, hidden[::downsampling, ::downsampling].astype(np.float32)

    def composite(self, pixels: Pixels) -> Pixels:
        """[H, W, 3] `pixels` where they are to be repainted, the initial image where it is kept, a blend between."""
        if self.repaint is None:
            return pixels
        kept = self.pixels.astype(np.float32)
        return (kept + self.repaint[..., None] * (pixels - kept)).round().clip(0, 255).astype(np.uint8)


def canvas(
    picture: Image.Image,
    mask: Image.Image | None,
    width: int,
    height: int,
    outpaint: Outpaint,
    fit: Fit,
    feather: float,
) -> Canvas:
    """The canvas of a picture (mode RGB or RGBA) and the mask (mode L) of what to repaint of it.

    `feather` is the standard deviation, in pixels, of the soft border around what is repainted.
    """
    placed = _placed(picture, width, height, outpaint, fit, (0, 0, 0, 0))
    rgba = np.asarray(placed)
    repaint = 1 - rgba[..., 3].astype(np.float32) / 255
    if mask is not None:
        white = np.asarray(_placed(mask, width, height, outpaint, fit, 255)).astype(np.float32) / 255
        repaint = np.maximum(repaint, white)
    pixels = _filled(rgba[..., :3], rgba[..., 3] >= LEAST_OPACITY)
    if mask is None and not repaint.any():
        return Canvas(pixels, None)
    return Canvas(pixels, feathered(repaint, feather), repaint >= 0.5)


def blank(width: int, height: int) -> Canvas:
    """A canvas of which nothing is kept."""
    return Canvas(np.zeros((height, width, 3), np.uint8), None)


def fitted_map(picture: Image.Image, width: int, height: int, fit: Fit) -> Floats:
    """[height, width] the values of a picture of mode F; where a contained one leaves gaps, they are 0."""
    return np.asarray(_fitted(picture, width, height, fit, 0), np.float32)


def resized_map(values: Floats, width: int, height: int) -> Floats:
    """[height, width] a map at another size."""
    box = 0.0, 0.0, float(values.shape[1]), float(values.shape[0])
    return np.asarray(_resized(Image.fromarray(values), width, height, box), np.float32)


def padded_map(values: Floats, width: int, height: int) -> Floats:
    """[height, width] a map in the middle of a larger one, its edges continued."""
    return np.pad(values, _margins(values, width, height), "edge")


def default_size(
    picture_width: int, picture_height: int, outpaint: Outpaint, most: int, most_pixels: int
) -> tuple[int, int]:
    """Width and height of a picture and its outpaint margins, the picture scaled down in proportion so that neither is
    above `most` and their product not above `most_pixels`. At least 1 pixel of the picture is left."""
    across, down = outpaint.across, outpaint.down
    scale = min(1.0, (most - across) / picture_width, (most - down) / picture_height)
    # (scale * width + across) * (scale * height + down) == most_pixels
    a = picture_width * picture_height
    b = picture_width * down + picture_height * across
    c = across * down - most_pixels
    scale = min(scale, (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a))
    return max(int(picture_width * scale + 1e-6), 1) + across, max(int(picture_height * scale + 1e-6), 1) + down


def feathered(repaint: Floats, feather: float) -> Floats:
    """[H, W] `repaint` with a soft border around it: what was repainted stays so, and what lies more than twice
    FEATHER_REACH * `feather` pixels away stays kept."""
    reach = math.ceil(FEATHER_REACH * feather)
    if reach == 0:
        return repaint
    # First wider and then softer by the same reach: the softening takes nothing from what is to be repainted.
    at = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (at / feather) ** 2)
    kernel /= kernel.sum()
    soft = repaint
    for axis in (0, 1):
        soft = _widened(soft, reach, axis)
    for axis in (0, 1):
        soft = _convolved(soft, kernel.astype(np.float32), axis)
    return np.maximum(soft, repaint)


def _placed(
    picture: Image.Image, width: int, height: int, outpaint: Outpaint, fit: Fit, background: int | tuple[int, ...]
) -> Image.Image:
    """The picture, fitted into what the margins leave, on a background."""
    fitted = _fitted(picture, width - outpaint.across, height - outpaint.down, fit, background)
    if fitted.size == (width, height):
        return fitted
    placed = Image.new(fitted.mode, (width, height), background)
    placed.paste(fitted, (outpaint.left, outpaint.top))
    return placed


def _fitted(picture: Image.Image, width: int, height: int, fit: Fit, background: int | tuple[int, ...]) -> Image.Image:
    if fit == "stretch":
        return _resized(picture, width, height, (0.0, 0.0, picture.width, picture.height))
    if fit == "cover":
        across = min(picture.width, picture.height * width / height)
        down = min(picture.height, picture.width * height / width)
        left, top = (picture.width - across) / 2, (picture.height - down) / 2
        if (across, down) == (width, height):
            # No scaling: whole pixels, rather than such as lie between two.
            left, top = math.floor(left), math.floor(top)
        return _resized(picture, width, height, (left, top, left + across, top + down))
    scale = min(width / picture.width, height / picture.height)
    across, down = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
    whole = _resized(picture, across, down, (0.0, 0.0, picture.width, picture.height))
    contained = Image.new(whole.mode, (width, height), background)
    contained.paste(whole, ((width - across) // 2, (height - down) // 2))
    return contained


def _resized(picture: Image.Image, width: int, height: int, box: tuple[float, float, float, float]) -> Image.Image:
    """A part of the picture at another size, as RGBA, L or F; its pixels as they are where that is the part's own."""
    left, top, right, bottom = box
    if (right - left, bottom - top) == (width, height) and left == int(left) and top == int(top):
        part = picture.crop((int(left), int(top), int(left) + width, int(top) + height))
        return part if part.mode in ("L", "F") else part.convert("RGBA")
    # Lanczos overshoots beside an edge: a mask would wave there, and a cut-out picture would have a halo.
    if picture.mode in ("L", "F"):
        return picture.resize((width, height), Image.Resampling.BILINEAR, box)
    if picture.mode == "RGBA":
        # Colours times opacity, so that the unseen colours of transparent pixels do not bleed.
        return picture.convert("RGBa").resize((width, height), Image.Resampling.BILINEAR, box).convert("RGBA")
    return picture.resize((width, height), Image.Resampling.LANCZOS, box).convert("RGBA")


def _filled(colours: Pixels, known: NDArray[np.bool_]) -> Pixels:
    """[H, W, 3] the colours where they are known, elsewhere those around: by ever coarser averages of what is known
    (push-pull, Gortler et al. 1996), so that the fill gets smoother the farther it reaches."""
    if known.all():
        return colours
    if not known.any():
        return np.full_like(colours, 128)
    height, width = known.shape
    padding = (0, height % 2), (0, width % 2)
    weights = _quartered(np.pad(known, padding).astype(np.float32))
    sums = _quartered(np.pad(np.where(known[..., None], colours, 0), (*padding, (0, 0))).astype(np.float32))
    means = (sums / np.maximum(weights, 1)[..., None]).round().astype(np.uint8)
    coarse = Image.fromarray(_filled(means, weights > 0))
    finer = np.asarray(coarse.resize((coarse.width * 2, coarse.height * 2), Image.Resampling.BILINEAR))
    filled: Pixels = np.where(known[..., None], colours, finer[:height, :width])
    return filled


def _quartered(values: Floats) -> Floats:
    """[H / 2, W / 2, ...] the sum of each four neighbours."""
    sums: Floats = values[::2, ::2] + values[1::2, ::2] + values[::2, 1::2] + values[1::2, 1::2]
    return sums


def _widened(values: Floats, reach: int, axis: int) -> Floats:
    """The greatest value within `reach` places along an axis."""
    length = values.shape[axis]
    padding = [(0, 0), (0, 0)]
    padding[axis] = reach, reach
    wide = np.pad(values, padding)
    # Doubles how far it has looked until that is 2 * reach + 1 places.
    seen = 1
    while seen < 2 * reach + 1:
        step = min(seen, 2 * reach + 1 - seen)
        wide = np.maximum(_part(wide, 0, wide.shape[axis] - step, axis), _part(wide, step, None, axis))
        seen += step
    return _part(wide, 0, length, axis)


def _convolved(values: Floats, kernel: Floats, axis: int) -> Floats:
    """A symmetric kernel along an axis; the edges are continued."""
    length, reach = values.shape[axis], len(kernel) // 2
    padding = [(0, 0), (0, 0)]
    padding[axis] = reach, reach
    wide = np.pad(values, padding, "edge")
    result = np.zeros_like(values)
    for offset, weight in enumerate(kernel):
        result += weight * _part(wide, offset, offset + length, axis)
    return result


def _part(values: Floats, start: int, stop: int | None, axis: int) -> Floats:
    return values[start:stop] if axis == 0 else values[:, start:stop]


def _margins(values: NDArray[np.generic], width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """What `np.pad` puts around [H, W, ...] values so that `images.crop` takes it off again."""
    down, across = height - values.shape[0], width - values.shape[1]
    return (down // 2, down - down // 2), (across // 2, across - across // 2)

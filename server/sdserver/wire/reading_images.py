"""What a request says about images: the one to start from, its mask and margins, variations, two passes."""

from __future__ import annotations

import hashlib
import math
import re
import secrets
from typing import TYPE_CHECKING

from sdserver.canvas import FITS, Canvas, Outpaint, canvas, default_size, fitted_map
from sdserver.noise import MAX_SEED
from sdserver.pictures import UnreadablePicture, read_colour, read_depth, read_grey
from sdserver.request import DepthMap, InitImage, Mask, TwoPass, Variation
from sdserver.wire.names import FIT_NAMES

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image
    from sdapi.v1 import generation_pb2

    from sdserver.canvas import Fit
    from sdserver.engines import Engine

DEFAULT_STRENGTH = 0.75
DEFAULT_SECOND_STRENGTH = 0.5
DEFAULT_FEATHER = 4.0
MAX_FEATHER = 64.0
# Small enough to be read out, typed again and kept by languages whose numbers are doubles.
MAX_CHOSEN_SEED = 2**32 - 1


class ImageFields:
    """Reads these fields of one message, and puts what is wrong with them into `violations`, by field path."""

    def __init__(self, message: generation_pb2.GenerateRequest, engine: Engine, violations: dict[str, str]) -> None:
        self._message = message
        self._engine = engine
        self._violations = violations
        self._picture: Image | None = None
        self._mask: Image | None = None
        self._depths: Image | None = None
        for field in ("mask", "outpaint"):
            if message.HasField(field) and not message.HasField("init_image"):
                violations[field] = "needs init_image, the image that it is about; leave it out or send that, too"
        if message.HasField("init_image"):
            self._picture = self._read("init_image", message.init_image, read_colour)
            if message.HasField("mask"):
                self._mask = self._read("mask", message.mask, read_grey)
        if message.HasField("depth_map"):
            self._depths = self._read("depth_map", message.depth_map, read_depth)
        elif engine.conditioning == "depth":
            self._check_depth_is_known()
        if engine.upscaling is not None:
            self._check_image_to_enlarge()
        self.outpaint = self._outpaint()

    def default_size(self) -> tuple[int, int]:
        """Width and height where a request leaves them open; where it names one, the other in proportion."""
        limits, defaults, message = self._engine.limits, self._engine.defaults, self._message
        if self._picture is None:
            return defaults.width, defaults.height
        outpaint = self.outpaint or Outpaint()
        across, down = (side * self._factor for side in self._picture.size)
        width, height = default_size(across, down, outpaint, limits.max_size, limits.max_pixels)
        if message.HasField("width") and not message.HasField("height"):
            scale = max(message.width - outpaint.across, 1) / across
            height = min(round(down * scale) + outpaint.down, limits.max_pixels // max(message.width, 1))
        elif message.HasField("height") and not message.HasField("width"):
            scale = max(message.height - outpaint.down, 1) / down
            width = min(round(across * scale) + outpaint.across, limits.max_pixels // max(message.height, 1))
        within = (min(max(size, limits.min_size), limits.max_size) for size in (width, height))
        return next(within), next(within)

    def init_image(self, width: int, height: int) -> InitImage | None:
        """The initial image of a result of that size; None if there is none, or anything is wrong with the request.

        Fits it and its mask, and is the last to be asked for.
        """
        field, picture = self._message.init_image, self._picture
        strength = self._share("init_image.strength", field.strength if field.HasField("strength") else None)
        fit = self._fit("init_image.fit", field.fit)
        mask = self.mask()
        outpaint = self.outpaint or Outpaint()
        wrong = any(path.startswith(("outpaint", "width", "height")) for path in self._violations)
        for name, added, size in (("width", outpaint.across, width), ("height", outpaint.down, height)):
            if 0 < size <= added and not wrong:
                self._violations["outpaint"] = (
                    f"its margins add {added} pixels to the {name} and leave nothing of its {size}; ask for a greater "
                    f"{name} or smaller margins"
                )
        if self._violations or picture is None:
            return None
        feather = DEFAULT_FEATHER if mask is None else mask.feather
        factor = self._factor
        # An upscaler's has as many pixels as the latents have places; the last ones may lie beyond the result.
        fitted = canvas(picture, self._mask, -(-width // factor), -(-height // factor), outpaint, fit, feather)
        if self._engine.upscaling is not None:
            return InitImage(_sha256(field.data), 1.0, fit, Canvas(fitted.pixels, None))
        if strength is None:
            strength = DEFAULT_STRENGTH if fitted.repaint is None else 1.0
        return InitImage(_sha256(field.data), strength, fit, fitted)

    def mask(self) -> Mask | None:
        """The mask."""
        if not self._message.HasField("mask"):
            return None
        field = self._message.mask
        feather = field.feather if field.HasField("feather") else DEFAULT_FEATHER
        if not 0 <= feather <= MAX_FEATHER:
            self._violations["mask.feather"] = f"{feather:g} is not a number of pixels from 0 to {MAX_FEATHER:g}"
        return Mask(_sha256(field.data), feather)

    def depth_map(self, width: int, height: int) -> DepthMap | None:
        """The depth map of a result of that size; None if there is none, or anything is wrong with the request."""
        if not self._message.HasField("depth_map"):
            return None
        field = self._message.depth_map
        fit = self._fit("depth_map.fit", field.fit)
        if self._violations or self._depths is None:
            return None
        return DepthMap(_sha256(field.data), fit, fitted_map(self._depths, width, height, fit))

    @property
    def _factor(self) -> int:
        """Pixels of the result, in each direction, for one of the initial image."""
        return 1 if self._engine.upscaling is None else self._engine.latents.downsampling

    def _check_image_to_enlarge(self) -> None:
        if not self._message.HasField("init_image"):
            self._violations["init_image"] = f"engine {self._engine.id} enlarges images and needs one; send it"
        elif self._message.init_image.HasField("strength") and self._message.init_image.strength != 1:
            self._violations["init_image.strength"] = (
                f"engine {self._engine.id} enlarges images, and runs the whole schedule on them; leave strength out"
            )

    def _check_depth_is_known(self) -> None:
        estimates = "depth_estimator" in self._engine.optional_roles
        if not estimates or not self._message.HasField("init_image"):
            self._violations["depth_map"] = f"engine {self._engine.id} needs one; send it" + (
                ", or init_image, of which it is then estimated" if estimates else ""
            )

    def variation(self, image_count: int) -> Variation | None:
        """The variation, of so many images."""
        if not self._message.HasField("variation"):
            return None
        field = self._message.variation
        seed = field.seed if field.HasField("seed") else secrets.randbelow(MAX_CHOSEN_SEED)
        # The last image's seed has to be one, too.
        most = MAX_SEED - max(image_count - 1, 0)
        if not 0 <= seed <= most:
            self._violations["variation.seed"] = f"{seed} is not an integer from 0 to {most}"
        strength = self._share("variation.strength", field.strength)
        if not field.HasField("strength"):
            self._violations["variation.strength"] = "is missing; 0 is the image of seed, 1 that of variation.seed"
        return Variation(seed, strength or 0.0)

    def two_pass(self, width: int, height: int) -> TwoPass | None:
        """The first pass of a result of that size, and the strength of the second."""
        if not self._message.HasField("two_pass"):
            return None
        if self._message.HasField("init_image"):
            self._violations["two_pass"] = "not together with init_image; leave one of them out"
        field, engine = self._message.two_pass, self._engine
        scale = math.sqrt(engine.native_width * engine.native_height / (max(width, 1) * max(height, 1)))
        if field.HasField("width"):
            scale = field.width / max(width, 1)
        elif field.HasField("height"):
            scale = field.height / max(height, 1)
        sizes = []
        for name, size, tiled in (("width", width, self._message.tile_x), ("height", height, self._message.tile_y)):
            if field.HasField(name):
                first: int = getattr(field, name)
                if name not in self._violations and not engine.limits.min_size <= first <= size:
                    self._violations[f"two_pass.{name}"] = (
                        f"{first} is not an integer from {engine.limits.min_size} to {size}, the {name} of the result"
                    )
            else:
                first = min(max(round(size * scale), engine.limits.min_size), size)
                if tiled:
                    # Only a multiple can be tiled, and the result's size is one.
                    multiple = engine.limits.size_multiple
                    first = max(round(first / multiple), 1) * multiple
            sizes.append(first)
        strength = self._share("two_pass.strength", field.strength if field.HasField("strength") else None)
        return TwoPass(sizes[0], sizes[1], DEFAULT_SECOND_STRENGTH if strength is None else strength)

    def _read(
        self,
        name: str,
        field: generation_pb2.InitImage | generation_pb2.Mask | generation_pb2.DepthMap,
        read: Callable[[bytes, int, int], Image],
    ) -> Image | None:
        limits = self._engine.limits
        if field.sha256 and not re.fullmatch("[0-9a-f]{64}", field.sha256):
            self._violations[f"{name}.sha256"] = "is no SHA-256 in lower-case hex, 64 characters"
        if not field.data:
            self._violations[f"{name}.data"] = (
                f"is missing; send the file of which {name}.sha256 is: resolved requests leave it out"
                if field.sha256
                else "is missing; send a PNG, JPEG or WebP"
            )
            return None
        if f"{name}.sha256" not in self._violations and field.sha256 not in ("", _sha256(field.data)):
            self._violations[f"{name}.sha256"] = "is not that of data; send the file that it is of, or leave it out"
        try:
            return read(field.data, limits.max_image_bytes, limits.max_image_pixels)
        except UnreadablePicture as error:
            self._violations[f"{name}.data"] = str(error)
            return None

    def _outpaint(self) -> Outpaint | None:
        if not self._message.HasField("outpaint"):
            return None
        field, most = self._message.outpaint, self._engine.limits.max_size
        margins = {name: getattr(field, name) for name in ("left", "right", "top", "bottom")}
        for name, margin in margins.items():
            if not 0 <= margin < most:
                self._violations[f"outpaint.{name}"] = f"{margin} is not an integer from 0 to {most - 1}"
        return Outpaint(**{name: min(max(margin, 0), most - 1) for name, margin in margins.items()})

    def _fit(self, path: str, number: int) -> Fit:
        name = FITS[0] if number == 0 else FIT_NAMES.name(number)
        fit = next((fit for fit in FITS if fit == name), None)
        if fit is None:
            self._violations[path] = f"{number} is not known to this server; one of {', '.join(FITS)}"
            return FITS[0]
        return fit

    def _share(self, path: str, value: float | None) -> float | None:
        # The comparison is false for NaN, too.
        if value is not None and not 0 <= value <= 1:
            self._violations[path] = f"{value:g} is not a number from 0 to 1"
        return value


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

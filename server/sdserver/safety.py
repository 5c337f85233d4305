"""The safety check: a classifier looks at each finished image, and the operator's mode says what follows.

    mode     an image in which a class reaches its threshold    previews
    flag     is sent as it is, FLAGGED                          as they are
    blur     is sent blurred beyond recognition, BLURRED        blurred in the same way
    block    is not sent; BLOCKED, without data                 none

A preview is of an image that nobody has checked yet, so it is treated as one in which a class reached its threshold.
Where the classifier cannot answer, the generation fails, in every mode: no image leaves unchecked.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from sdserver.errors import GenerationFailed
from sdserver.request import Safety, SafetyOutcome, SafetyScore

if TYPE_CHECKING:
    from sdserver.backends import Backend, Floats, Pixels
    from sdserver.safety_model import SafetyModel

SafetyMode = Literal["flag", "blur", "block"]

_OUTCOMES: dict[SafetyMode, SafetyOutcome] = {"flag": "flagged", "blur": "blurred", "block": "blocked"}

# A blurred picture holds this many colours along its longer side, and nothing else of the image, whatever its size.
BLURRED_SIZE = 8
# An image longer than this many times its width is looked at in parts, too: squeezed into a square, it shows nothing.
MAX_SQUEEZE = 1.5
# Parts that lie end to end; with those between them, and the whole, an image is at most twice as many pictures. That is
# what `max_batch_size` of the safety model in Triton has to be.
MAX_PARTS = 8


class SafetyCheck:
    """A safety model and what to do about its scores."""

    def __init__(self, mode: SafetyMode, model: SafetyModel, backend: Backend) -> None:
        self.mode: SafetyMode = mode
        self.model = model
        self._backend = backend

    async def __call__(self, pixels: Pixels) -> tuple[Pixels | None, Safety]:
        """What may be sent of a finished image's [H, W, 3] pixels, None for nothing, and why.

        Raises Unavailable or GenerationFailed where the safety model does not answer, or not with numbers from 0 to 1.
        """
        pictures = await asyncio.to_thread(views, pixels, self.model.image_size)
        answers = await self._scores(pictures)
        scores = tuple(
            SafetyScore(each.label, score, each.threshold)
            for each, score in zip(self.model.classes, answers.max(axis=0).tolist(), strict=True)
        )
        if all(score.score < score.threshold for score in scores):
            return pixels, Safety("passed", scores)
        return await asyncio.to_thread(self.withheld, pixels), Safety(_OUTCOMES[self.mode], scores)

    def withheld(self, pixels: Pixels) -> Pixels | None:
        """What may be sent of [H, W, 3] pixels that have not passed the check, or not yet; None: nothing."""
        match self.mode:
            case "flag":
                return pixels
            case "blur":
                return blurred(pixels)
            case "block":
                return None

    async def _scores(self, pictures: Pixels) -> Floats:
        scores = await self._backend.classify(pictures)
        expected = len(pictures), len(self.model.classes)
        # The comparison is false for NaN, too.
        if scores.shape != expected or not ((scores >= 0) & (scores <= 1)).all():
            raise GenerationFailed(
                f"{self.model.model} did not answer with {expected[1]} scores from 0 to 1 a picture, so that no image "
                "may be sent; its safety.json and its model must agree",
                "MODEL_ERROR",
                model=self.model.model,
            )
        return scores


def views(pixels: Pixels, size: int) -> Pixels:
    """[B, size, size, 3] pictures of [H, W, 3] pixels, B <= 2 MAX_PARTS: all of it, and of a long image its parts.

    Parts overlap by half and are squares, or longer where there would be too many.
    """
    height, width = pixels.shape[:2]
    short, long = sorted((height, width))
    boxes = [(0, 0, width, height)]
    if long > MAX_SQUEEZE * short:
        length = max(short, -(-long // MAX_PARTS))
        for start in np.linspace(0, long - length, -(-2 * long // length) - 1).round().astype(int).tolist():
            end = start + length
            boxes.append((start, 0, end, height) if width > height else (0, start, width, end))
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.stack([np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box)) for box in boxes])


def blurred(pixels: Pixels) -> Pixels:
    """[H, W, 3] pixels that hold no more than the mean colours of BLURRED_SIZE x BLURRED_SIZE parts, or fewer."""
    height, width = pixels.shape[:2]
    sums = pixels.astype(np.int64)
    counts = np.ones((height, width, 1), np.int64)
    for axis, side in enumerate((height, width)):
        parts = max(1, round(side * BLURRED_SIZE / max(height, width)))
        starts = np.arange(parts) * side // parts
        sums, counts = (np.add.reduceat(array, starts, axis) for array in (sums, counts))
    means = Image.fromarray((sums / counts).round().astype(np.uint8))
    return np.asarray(means.resize((width, height), Image.Resampling.BICUBIC))

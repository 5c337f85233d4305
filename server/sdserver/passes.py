"""The denoising passes of a request: their sizes, and which part of the schedule each of them runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdserver.request import GenerationRequest


@dataclass(frozen=True, slots=True)
class Pass:
    """One run of the sampler."""

    number: int
    """From 0."""
    width: int
    """Pixels, before padding."""
    height: int
    """Pixels, before padding."""
    sigmas: tuple[float, ...]
    """[steps + 1] the noise levels that it runs through, down to 0."""
    skipped: int
    """Steps of the schedule that it leaves out at its beginning."""
    before: int
    """Steps of the passes before it."""

    @property
    def steps(self) -> int:
        """Denoising steps of this pass; 0 leaves its image as it is."""
        return len(self.sigmas) - 1

    @property
    def whole_schedule(self) -> bool:
        """Whether it starts from pure noise."""
        return self.skipped == 0


def passes_of(request: GenerationRequest) -> tuple[Pass, ...]:
    """The passes of every image of a request, in their order."""
    size = request.width, request.height
    if request.two_pass is None:
        plan = [(size, 1.0 if request.init_image is None else request.init_image.strength)]
    else:
        plan = [((request.two_pass.width, request.two_pass.height), 1.0), (size, request.two_pass.strength)]
    sigmas = request.engine.sigmas(request.schedule, request.steps)
    passes: list[Pass] = []
    for number, ((width, height), strength) in enumerate(plan):
        skipped = request.steps - steps_of(strength, request.steps)
        before = sum(part.steps for part in passes)
        passes.append(Pass(number, width, height, sigmas[skipped:], skipped, before))
    return tuple(passes)


def steps_of(strength: float, steps: int) -> int:
    """How many of the last `steps` a strength runs: that share of them, rounded down, as diffusers rounds it.

    A strength of 0 runs none, and any other at least one.
    """
    if strength == 0:
        return 0
    # Strengths are 32-bit floats on the wire: 0.7 of 10 steps is 6.9999999 there.
    return min(max(math.floor(strength * steps + 1e-4), 1), steps)

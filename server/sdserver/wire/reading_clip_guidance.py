"""CLIP guidance in: the preset, what overrides it, and whatever is wrong with either."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdapi.v1 import generation_pb2

from sdserver.request import ClipGuidance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdserver.engines import Engine
    from sdserver.request import Prompt

MAX_SCALE = 10.0
MAX_CUTOUTS = 64
MAX_STEPS_PER_GRADIENT = 16
MAX_CHARACTERS = 10_000


def read_clip_guidance(
    message: generation_pb2.GenerateRequest, engine: Engine, prompts: Sequence[Prompt], violations: dict[str, str]
) -> ClipGuidance | None:
    """CLIP guidance with everything resolved, None if it is off; what is wrong is put into the violations."""
    support = engine.clip_guidance
    if support is None or not message.HasField("clip_guidance"):
        return None
    given = message.clip_guidance
    preset = support.preset(given.preset)
    if preset is None:
        names = ", ".join(preset.name for preset in support.presets)
        violations["clip_guidance.preset"] = f"{given.preset[:64]!r} is not known; one of {names}"
        preset = support.presets[0]
    # A message, so that the preset's numbers are 32-bit floats, as they will be when the resolved request is sent.
    values = generation_pb2.ClipGuidance(**preset.model_dump(exclude={"name"}))
    values.MergeFrom(given)
    for name, most in (("scale", MAX_SCALE), ("start", 1.0), ("end", 1.0)):
        value: float = getattr(values, name)
        # The comparison is false for NaN, too.
        if not 0 <= value <= most:
            violations[f"clip_guidance.{name}"] = f"{value:g} is not a number from 0 to {most:g}"
    if not 0 <= values.cutouts <= MAX_CUTOUTS:
        violations["clip_guidance.cutouts"] = f"{values.cutouts} is not an integer from 0 to {MAX_CUTOUTS}"
    if not 1 <= values.steps_per_gradient <= MAX_STEPS_PER_GRADIENT:
        violations["clip_guidance.steps_per_gradient"] = (
            f"{values.steps_per_gradient} is not an integer from 1 to {MAX_STEPS_PER_GRADIENT}"
        )
    if values.start >= values.end:
        violations.setdefault(
            "clip_guidance.end", f"{values.end:g} must be greater than start, which is {values.start:g}"
        )
    if len(values.prompt) > MAX_CHARACTERS:
        violations["clip_guidance.prompt"] = f"{len(values.prompt)} characters are too many; at most {MAX_CHARACTERS}"
    elif not values.prompt.strip() and not any(prompt.weight > 0 for prompt in prompts):
        violations["clip_guidance.prompt"] = "is empty; say what CLIP is to see, because no prompt has a weight above 0"
    return ClipGuidance(
        scale=values.scale,
        cutouts=values.cutouts,
        start=values.start,
        end=values.end,
        steps_per_gradient=values.steps_per_gradient,
        prompt=values.prompt if values.prompt.strip() else "",
        exact=values.exact,
    )

"""The flags of `sdclient generate` that are about CLIP guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._types import ClipGuidance

if TYPE_CHECKING:
    import argparse


def add_clip_flags(parser: argparse.ArgumentParser) -> None:
    """Adds them; `clip_guidance` reads them."""
    option = parser.add_argument_group("CLIP guidance").add_argument
    option(
        "--clip-guidance",
        dest="clip",
        nargs="?",
        const="",
        metavar="SCALE|PRESET",
        help="steer by CLIP, 0 to 10 or a preset of `sdclient engines`; default: the engine's first preset",
    )
    option("--clip-prompt", metavar="TEXT", help="what CLIP is to see, instead of the positive prompts")
    option("--clip-cutouts", type=int, metavar="COUNT", help="random crops that CLIP looks at; 0: the whole image")
    option("--clip-start", type=float, metavar="SHARE", help="share of the steps at which it starts, 0 to 1")
    option("--clip-end", type=float, metavar="SHARE", help="share of the steps at which it ends, 0 to 1")
    option("--clip-steps-per-gradient", type=int, metavar="COUNT", help="steps that one gradient serves, 1 to 16")
    option("--clip-exact", action="store_true", help="take the gradient through the UNet, too: slower")


def clip_guidance(arguments: argparse.Namespace) -> ClipGuidance | None:
    """CLIP guidance as the flags say it, each of which turns it on; None where there is none of them."""
    scale, preset = _scale_or_preset(arguments.clip)
    guidance = ClipGuidance(
        scale=scale,
        cutouts=arguments.clip_cutouts,
        start=arguments.clip_start,
        end=arguments.clip_end,
        steps_per_gradient=arguments.clip_steps_per_gradient,
        prompt=arguments.clip_prompt,
        preset=preset,
        exact=arguments.clip_exact,
    )
    return None if arguments.clip is None and guidance == ClipGuidance() else guidance


def _scale_or_preset(text: str | None) -> tuple[float | None, str | None]:
    if not text:
        return None, None
    try:
        return float(text), None
    except ValueError:
        return None, text

"""The flags of `sdclient generate` that are about images: an image to start from, a mask, variations, two passes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from ._types import DepthMap, Fit, GenerateOptions, InitImage, Mask, Outpaint, TwoPass, Upscale, Variation


def add_image_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags. `image_options` makes options of what is read."""
    option = parser.add_argument_group("starting from an image").add_argument
    option("--init", type=Path, metavar="FILE", help="PNG, JPEG or WebP to start from, instead of noise")
    option("--strength", type=float, help="how much of the schedule is run on it, 0 (keeps it) to 1")
    option("--fit", choices=get_args(Fit), metavar="NAME", help=f"{', '.join(get_args(Fit))}: an image of another size")
    option("--mask", type=Path, metavar="FILE", help="white is repainted, black is kept")
    option("--feather", type=float, metavar="PIXELS", help="soft border between kept and repainted")
    sides = "LEFT,RIGHT,TOP,BOTTOM"
    option("--outpaint", type=_margins, metavar=sides, help="new margins around the image, in pixels")
    option("--depth-map", type=Path, metavar="FILE", help="how far away everything is: bright is near, dark is far")
    option("--noise-level", type=int, metavar="N", help="with an upscaler: noise that hides the image's faults")
    option = parser.add_argument_group("variations and large images").add_argument
    option("--variation-strength", type=float, metavar="SHARE", help="varies the image of --seed, 0 (not at all) to 1")
    option("--variation-seed", type=int, metavar="SEED", help="makes it resemble the image of this seed")
    option("--two-pass", action="store_true", help="make a smaller image first, enlarge it and denoise it again")
    option("--two-pass-size", type=_size, metavar="WIDTHxHEIGHT", help="size of the smaller image")
    option("--two-pass-strength", type=float, metavar="SHARE", help="how much of the schedule the second pass runs")
    parser.set_defaults(refuse=parser.error)


def image_options(arguments: argparse.Namespace) -> GenerateOptions:
    """The options that the flags say. Exits where one of them lacks another; raises OSError for unreadable files."""
    for flags, needed in (
        (("strength", "fit", "mask", "outpaint"), "init"),
        (("feather",), "mask"),
        (("variation_seed",), "variation_strength"),
    ):
        for flag in flags:
            if getattr(arguments, flag) is not None and getattr(arguments, needed) is None:
                arguments.refuse(f"--{flag.replace('_', '-')} needs --{needed.replace('_', '-')}")
    options: GenerateOptions = {}
    if arguments.init is not None:
        options["init_image"] = InitImage.open(arguments.init, strength=arguments.strength, fit=arguments.fit)
        options["outpaint"] = arguments.outpaint
    if arguments.mask is not None:
        options["mask"] = Mask.open(arguments.mask, feather=arguments.feather)
    if arguments.depth_map is not None:
        options["depth_map"] = DepthMap.open(arguments.depth_map)
    if arguments.noise_level is not None:
        options["upscale"] = Upscale(arguments.noise_level)
    if arguments.variation_strength is not None:
        options["variation"] = Variation(arguments.variation_strength, arguments.variation_seed)
    if arguments.two_pass or arguments.two_pass_size is not None or arguments.two_pass_strength is not None:
        width, height = arguments.two_pass_size or (None, None)
        options["two_pass"] = TwoPass(width, height, arguments.two_pass_strength)
    return options


def _margins(text: str) -> Outpaint:
    try:
        left, right, top, bottom = (int(margin) for margin in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} are no four whole numbers such as 64,64,0,0") from None
    return Outpaint(left, right, top, bottom)


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(side) for side in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no size such as 512x512") from None
    return width, height

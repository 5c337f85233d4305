"""Writes the model card from `evaluation.json` and the stages' checkpoints: no figure in it is written by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from training import clip, dataset, unet, vae
from training.common import records, train_dir
from training.heldout import CASES, FOREST_PROMPTS, NEGATIVE
from training.world import FORMATS

TARGETS: dict[str, float] = {
    "time of day": 0.95,
    "terrain": 0.9,
    "trees present or absent": 0.9,
    "house colour": 0.7,
    "boat colour": 0.7,
}
"""What the engine must reach on held-out prompts, as shares."""


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def verdicts(result: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """(what, reached, must reach, whether it does) for every target of the engine."""
    rows = [
        (name, _share(result["adherence"][name]), f">= {_share(target)}", result["adherence"][name] >= target)
        for name, target in TARGETS.items()
    ]
    negative, guidance, psnr = result["negative_prompt"], result["clip_guidance"], result["world"]["psnr_db"]
    rows.append(
        ("negative prompt cuts green of forests by", _share(negative["cut"]), ">= 60 %", negative["cut"] >= 0.6)
    )
    hours = negative["time_of_day_right"]
    rows.append(("time of day right under it", _share(hours), ">= 90 %", hours >= 0.9))
    raised = guidance["share_raised"]
    rows.append(("CLIP guidance raises the CLIP score", _share(raised), ">= 80 %", raised >= 0.8))
    rows.append(("autoencoder PSNR on the held-out world", f"{psnr:.1f} dB", ">= 27 dB", psnr >= 27))
    return rows


def _curves(curves: dict[str, Any]) -> list[str]:
    """What a weight and a negative weight do, as two tables."""
    against, negative = curves["trees_against_sea"], curves["negative_weight"]
    return [
        "",
        "## What weights do",
        "Shares of pixels, as means over the seeds. Blue is that of the lower 40 %.",
        "",
        "| `trees : w \\| sea : 1 - w`, w | " + " | ".join(f"{row['trees']:g}" for row in against) + " |",
        "| --- |" + " --- |" * len(against),
        "| green | " + " | ".join(_share(row["green_share"]) for row in against) + " |",
        "| blue | " + " | ".join(_share(row["blue_share"]) for row in against) + " |",
        "",
        f"| `{FOREST_PROMPTS[0][0]} \\| {NEGATIVE} : w`, w | "
        + " | ".join(f"{row['weight'] or 0:g}" for row in negative)
        + " |",
        "| --- |" + " --- |" * len(negative),
        "| green | " + " | ".join(_share(row["green_share"]) for row in negative) + " |",
        "| trees, as the judge sees it | " + " | ".join(_share(row["trees_probability"]) for row in negative) + " |",
    ]


def card(result: dict[str, Any], stages: list[dict[str, Any]]) -> str:
    """The model card as Markdown."""
    rows = verdicts(result)
    failed = [name for name, _, _, passed in rows if not passed]
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: diffusers",
        "tags: [stable-diffusion, text-to-image, procedural]",
        "---",
        "# tiny-landscape",
        "A very small engine of Stable Diffusion 2.1's own architecture: an OpenCLIP text and image tower, an",
        "AutoencoderKL (8x, 4 channels) and a UNet2DConditionModel on the penultimate text states, v-prediction.",
        "It paints flat landscapes, so that prompts, weights, negative prompts and CLIP guidance can be seen and",
        "measured without a GPU. Written by `python -m training.card`; every figure comes from the evaluation.",
        "",
        "## Data",
        f"A procedural world (`training/world.py`, `painter.py`): {2 * dataset.PAIRS[FORMATS[0]]:,} scenes at",
        f"{FORMATS[0][0]}x{FORMATS[0][1]} and {2 * dataset.PAIRS[FORMATS[1]]:,} of each of the formats "
        + ", ".join(f"{width}x{height}" for width, height in FORMATS[1:])
        + ",",
        "captioned by `training/captions.py`. No photograph, no picture and no text of anyone.",
        "",
        "## Recipe",
        f"Autoencoder channels {vae.CHANNELS}, no attention; text width {clip.WIDTH}, image {clip.IMAGE_SIZE}x"
        f"{clip.IMAGE_SIZE}; UNet channels {unet.CHANNELS}.",
        "",
        "| stage | core-minutes | steps | last figures |",
        "| --- | --- | --- | --- |",
    ]
    for last in stages:
        figures = ", ".join(
            f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.3f}"
            for name, value in last.items()
            if name not in ("stage", "step", "core_minutes")
        )
        lines.append(f"| {last['stage']} | {last.get('core_minutes', 0):.0f} | {last.get('step', 0):.0f} | {figures} |")
    lines += [
        "",
        f"## Figures: {len(CASES)} held-out prompts, {result['seeds']} seeds each, {result['steps']} DDIM steps, "
        f"guidance {result['guidance_scale']:g}",
        "",
        "| what | reached | must reach | |",
        "| --- | --- | --- | --- |",
        *(f"| {name} | {value} | {target} | {'yes' if ok else '**no**'} |" for name, value, target, ok in rows),
        "",
        "Judge: an attribute classifier that saw the true world alone; its accuracy on held-out scenes: "
        + ", ".join(f"{name} {_share(value)}" for name, value in result["world"]["classifier_accuracy"].items())
        + ".",
        "",
        "| further | figure |",
        "| --- | --- |",
        *(f"| {name} | {_share(value)} |" for name, value in result["adherence"].items() if name not in TARGETS),
    ]
    for size, found in result["formats"].items():
        lines += [f"| {size}: {name.replace('_', ' ')} | {_share(value)} |" for name, value in found.items()]
    lines += [f"| diversity: {name.replace('_', ' ')} | {value:.3f} |" for name, value in result["diversity"].items()]
    lines += _curves(result["curves"])
    lines += ["", "## Limits", "It knows only its world and its words; other words do little or something odd."]
    lines.append(
        f"It does not reach: {', '.join(failed)}." if failed else "Every figure that it must reach, it reaches."
    )
    if result["failures"]:
        lines += [f"{len(result['failures'])} checks of single pictures failed; the first of them:", ""]
        lines += [f"- {failure}" for failure in result["failures"][:12]]
    lines += [
        "",
        "## Licence",
        "Apache-2.0, weights and data alike: everything was made by the code of this project.",
        "",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.card", description=__doc__)
    parser.add_argument("--out", type=Path, help="file to write (default: `engine/README.md` of the training folder)")
    options = parser.parse_args(arguments)
    source = train_dir() / "evaluation.json"
    if not source.exists():
        raise SystemExit(f"{source} is missing: run `python -m training.evaluate` first")
    out: Path = options.out or train_dir() / "engine" / "README.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(card(json.loads(source.read_text()), records()))
    print(out)


if __name__ == "__main__":
    main()

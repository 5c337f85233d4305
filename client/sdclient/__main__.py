"""`sdclient` on the command line: generate images, list engines, read how an image was made, make it again.

Environment: SDCLIENT_API_KEY is the API key; SDCLIENT_SERVER, SDCLIENT_TLS, SDCLIENT_TLS_CERTIFICATE and
SDCLIENT_TLS_PRIVATE_KEY are the defaults of the flags of these names.
Exit status: 0 done, 1 failed, 2 wrong usage, 3 the safety check has blocked an image, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from ._clip_flags import add_clip_flags, clip_guidance
from ._connection_flags import add_connection_flags, connect
from ._errors import BlockedImageError, SDError
from ._events import MEDIA_TYPES, Accepted, Finished, Image
from ._image_flags import add_image_flags, image_options
from ._inspect import inspect
from ._reproduce import reproduce
from ._terminal import print_sections, progress_bar
from ._types import Blending, BlockCache, GenerateOptions, Lora, Output, Prompt, Sampler, Schedule, Windows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._types import Engine, LoraInfo


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], None] = arguments.command
    try:
        command(arguments)
    except KeyboardInterrupt:
        print("sdclient: cancelled", file=sys.stderr)
        return 130
    except BlockedImageError as error:
        _report(error)
        return 3
    except SDError as error:
        _report(error)
        return 1
    except (ImportError, OSError, ValueError) as error:
        print(f"sdclient: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    add_connection_flags(common)
    common.add_argument("--json", action="store_true", help="print JSON")

    parser = argparse.ArgumentParser(prog="sdclient", description="Stable Diffusion over gRPC.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    engines = commands.add_parser("engines", parents=[common], help="list the server's engines")
    engines.set_defaults(command=_engines)

    generate = commands.add_parser(
        "generate",
        parents=[common],
        help="generate images",
        epilog="The server chooses what is left out. `sdclient engines` shows its defaults and limits.",
    )
    generate.set_defaults(command=_generate)
    # A flag with the name of an option of `Client.generate` becomes that option.
    option = generate.add_argument
    syntax = "what to show, or several with weights: 'a portrait : 2 | blender, cropped : -2'"
    option("prompts", nargs="+", metavar="PROMPT", help=syntax)
    option("-N", "--negative", action="append", default=[], metavar="TEXT", help="what not to show; may be repeated")
    option(
        "-o",
        "--output",
        dest="file",
        type=_file,
        default="out.png",
        metavar="FILE",
        help=f"{', '.join(MEDIA_TYPES)}; {{index}} and {{seed}} are replaced; default: out.png, or out-{{index}}.png "
        "for several images",
    )
    option("-W", "--width", type=int, metavar="PIXELS")
    option("-H", "--height", type=int, metavar="PIXELS")
    option("-s", "--steps", type=int, help="denoising steps")
    option("-S", "--seed", type=int, help="seed of the first image; the others have the seeds after it")
    option("--seeds", type=_seeds, metavar="SEED,SEED", help="the seed of each image, instead of --seed")
    option("-n", "--image-count", type=int, metavar="COUNT", help="images to generate")
    option("-g", "--guidance-scale", type=float, metavar="SCALE", help="how strongly to follow the prompts; 1 is off")
    option("--guidance-rescale", type=float, metavar="SHARE", help="takes back the contrast that guidance adds, 0 to 1")
    option("--sampler", choices=get_args(Sampler), metavar="NAME", help=", ".join(get_args(Sampler)))
    option("--eta", type=float, help="fresh noise in each step of a DDIM, DDPM, ancestral or SDE sampler, 0 to 1")
    option("--churn", type=float, help="noise that euler, heun or dpm2 adds before its steps, 0 to 100")
    option("--schedule", choices=get_args(Schedule), metavar="NAME", help=", ".join(get_args(Schedule)))
    option("--blending", choices=get_args(Blending), metavar="NAME", help=", ".join(get_args(Blending)))
    option("--lora", dest="loras", action="append", type=_lora, metavar="NAME:WEIGHT", help="a LoRA; may be repeated")
    option("--block-cache", type=int, metavar="STEPS", help="run the whole UNet only in the first of so many steps")
    option("--window", type=int, metavar="PIXELS", help="denoise large images in windows of this size; 0: as a whole")
    option("--window-overlap", type=int, metavar="PIXELS", help="overlap of windows")
    option("--tile-x", action="store_true", default=None, help="make the right border continue at the left one")
    option("--tile-y", action="store_true", default=None, help="make the lower border continue at the upper one")
    option("--engine", metavar="ID", help="an engine of `sdclient engines`")
    option("--quality", type=int, help="quality of JPEG, WebP and AVIF, 1 to 100")
    option("--no-metadata", action="store_true", help="write images that do not say how they were made")
    option("--timeout", type=float, default=600.0, metavar="SECONDS", help="default: 600")
    option("--open", action="store_true", help="open the images")
    add_image_flags(generate)
    add_clip_flags(generate)

    inspecting = commands.add_parser("inspect", help="show how images were made, as their files say")
    inspecting.set_defaults(command=lambda arguments: inspect(arguments.files, arguments.json))
    inspecting.add_argument("files", nargs="+", type=Path, metavar="FILE")
    inspecting.add_argument("--json", action="store_true", help="print JSON")

    reproducing = commands.add_parser("reproduce", parents=[common], help="make the pixels of an image again")
    reproducing.set_defaults(command=_reproduce)
    option = reproducing.add_argument
    option("file", type=Path, metavar="FILE", help="an image that says how it was made; see `sdclient inspect`")
    option("-o", "--output", dest="made", type=_file, metavar="FILE", help="default: FILE-again, in the same format")
    option("--init", type=Path, metavar="FILE", help="the initial image that it was made from")
    option("--mask", type=Path, metavar="FILE", help="the mask that it was made with")
    option("--depth-map", type=Path, metavar="FILE", help="the depth map that it was made with")
    option("--force", action="store_true", help="go on with another version of the engine, or with other pixels")
    option("--timeout", type=float, default=600.0, metavar="SECONDS", help="default: 600")
    return parser


def _file(text: str) -> Path:
    """The file to write, refused before any work is done for it."""
    path = Path(text)
    if path.suffix.lower() not in MEDIA_TYPES:
        raise argparse.ArgumentTypeError(f"{text} must end in one of {', '.join(MEDIA_TYPES)}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no list of whole numbers such as 7,0,42") from None


def _lora(text: str) -> Lora:
    name, colon, weight = text.partition(":")
    try:
        return Lora(name, float(weight) if colon else None)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no LoRA such as ink-style or ink-style:0.8") from None


def _report(error: SDError) -> None:
    text = "the request is not valid" if error.violations else str(error)
    print(f"sdclient: {text}", file=sys.stderr)
    for field, problem in error.violations.items():
        print(f"  {field}: {problem}", file=sys.stderr)
    if error.request_id is not None:
        print(f"  (request {error.request_id})", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------- generate


def _generate(arguments: argparse.Namespace) -> None:
    prompts = [*arguments.prompts, *(Prompt(text, -1.0) for text in arguments.negative)]
    # A flag with the name of an option may say only a part of it, as --mask does.
    chosen = {name: value for name, value in vars(arguments).items() if name in GenerateOptions.__annotations__}
    for name in ("mask", "outpaint", "depth_map", "two_pass", "block_cache"):
        del chosen[name]
    options = cast("GenerateOptions", {**chosen, **image_options(arguments)})
    options["clip_guidance"] = clip_guidance(arguments)
    if arguments.block_cache is not None:
        options["block_cache"] = BlockCache(arguments.block_cache)
    if arguments.window is not None or arguments.window_overlap is not None:
        options["windows"] = Windows(arguments.window, arguments.window_overlap)
    media_type = MEDIA_TYPES[arguments.file.suffix.lower()]
    options["output"] = Output(media_type, arguments.quality, False if arguments.no_metadata else None)
    pattern = _pattern(arguments.file, len(arguments.seeds) if arguments.seeds else arguments.image_count)

    start = time.monotonic()
    report: dict[str, Any] = {"images": []}
    blocked = 0
    with connect(arguments) as client, progress_bar() as show, client.stream(prompts, **options) as events:
        for event in events:
            show(event)
            match event:
                case Accepted():
                    report |= {
                        "request_id": event.request_id,
                        "prompts": event.prompts,
                        "prompt_usage": event.prompt_usage,
                        "options": event.options,
                    }
                    if not arguments.json:
                        _print_long_prompts(event)
                case Image():
                    blocked += event.blocked
                    named = pattern.replace("{index}", str(event.index)).replace("{seed}", str(event.seed))
                    path = None if event.blocked else event.save(named)
                    seconds = time.monotonic() - start
                    report["images"].append(
                        {
                            "path": path and str(path),
                            "media_type": event.media_type,
                            "width": event.width,
                            "height": event.height,
                            "index": event.index,
                            "seed": event.seed,
                            "seconds": round(seconds, 3),
                            "safety": event.safety,
                        }
                    )
                    if not arguments.json:
                        what = f"{path or 'no file'}  {event.width}x{event.height}  seed {event.seed}  {seconds:.2f} s"
                        print(what + _objection(event), flush=True)
                    if arguments.open and path is not None:
                        _open(path)
                case Finished():
                    report |= {"usage": event.usage, "timings": event.timings}
    if arguments.json:
        print(json.dumps(report, indent=2, default=_plain))
    if blocked:
        raise BlockedImageError(
            f"the server's safety check has blocked {blocked} of {len(report['images'])} images; try another prompt or "
            "seed",
            code="OK",
        )


def _objection(image: Image) -> str:
    """What the safety check did and why; empty where it passed, or was not made."""
    if image.safety is None or image.safety.outcome == "passed":
        return ""
    reached = [f"{each.label} {each.score:.2f}" for each in image.safety.reached]
    return f"  {image.safety.outcome or 'changed'} by the safety check: {', '.join(reached)}"


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass as JSON can have it: the data of an image is in its own file."""
    return {name: part for name, part in asdict(value).items() if not isinstance(part, bytes)}


def _print_long_prompts(accepted: Accepted) -> None:
    for number, usage in enumerate(accepted.prompt_usage, start=1):
        if usage.chunks > 1:
            print(f"prompt {number}: {usage.tokens} tokens in {usage.chunks} chunks", file=sys.stderr)


def _pattern(file: Path, image_count: int | None) -> str:
    several = image_count is not None and image_count > 1
    if several and "{index}" not in str(file) and "{seed}" not in str(file):
        file = file.with_stem(f"{file.stem}-{{index}}")
    return str(file)


def _open(path: Path) -> None:
    import webbrowser

    webbrowser.open(path.resolve().as_uri())


# ---------------------------------------------------------------------------------------------------------- reproduce


def _reproduce(arguments: argparse.Namespace) -> None:
    with connect(arguments) as client:
        made = reproduce(
            client,
            arguments.file,
            arguments.made,
            init=arguments.init,
            mask=arguments.mask,
            depth_map=arguments.depth_map,
            force=arguments.force,
            timeout=arguments.timeout,
        )
    if arguments.json:
        print(json.dumps(made, indent=2, default=str))
    else:
        print(f"{made['path']}  seed {made['seed']}  {made['verdict']}")


# ------------------------------------------------------------------------------------------------------------ engines


def _engines(arguments: argparse.Namespace) -> None:
    with connect(arguments) as client:
        engines = client.engines()
    if arguments.json:
        print(json.dumps([asdict(engine) for engine in engines], indent=2))
    else:
        _print_table(engines)


def _clip_presets(engine: Engine) -> str:
    if engine.clip_guidance is None:
        return "none"
    return "; ".join(
        f"{preset.name}: scale {preset.scale:g}, cutouts {preset.cutouts}, "
        f"steps {preset.start:.0%} to {preset.end:.0%}, a gradient serves {preset.steps_per_gradient}"
        for preset in engine.clip_guidance.presets
    )


def _lora_line(lora: LoraInfo) -> str:
    about = ", ".join(lora.trigger_words), lora.license.name if lora.license else ""
    return " ".join([lora.name, *(f"({each})" for each in about if each)])


def _print_table(engines: Sequence[Engine]) -> None:
    sections = []
    for engine in engines:
        limits, defaults = engine.limits, engine.defaults
        rows = {
            "engine": engine.id if engine.ready else f"{engine.id} (not ready)",
            "": engine.description,
            "sizes": f"{limits.min_size} to {limits.max_size} px, at most {limits.max_pixels} pixels; "
            f"trained for {engine.native_width}x{engine.native_height}",
            "windows": "none"
            if engine.windows is None
            else f"{engine.windows.size} px, which overlap by {engine.windows.overlap} px",
            "limits": f"{limits.max_steps} steps, {limits.max_image_count} images, "
            f"{limits.max_prompt_chunks} chunks of 75 tokens a prompt",
            "initial images": f"at most {limits.max_image_bytes} bytes and {limits.max_image_pixels} pixels"
            if engine.image_to_image or engine.upscaling
            else "none",
            "defaults": f"{defaults.width}x{defaults.height}, {defaults.steps} steps, {defaults.sampler}, "
            f"{defaults.schedule}, guidance scale {defaults.guidance_scale:g}",
            "samplers": ", ".join(engine.samplers),
            "schedules": ", ".join(engine.schedules),
            "formats": ", ".join(engine.media_types),
            "safety check": engine.safety_mode or "unknown",
            "CLIP guidance": _clip_presets(engine),
            "conditioning": (engine.conditioning or "unknown")
            + (", estimated from initial images" if engine.estimates_depth else "")
            + (f", {engine.upscaling.factor} times in each direction" if engine.upscaling else ""),
            "block caching": "yes" if engine.block_cache else "none",
            "LoRAs": "; ".join(map(_lora_line, engine.loras)) or "none",
            "licence": "; ".join(filter(None, (engine.license.name, engine.license.url))),
            "restrictions": engine.license.use_restrictions or "none",
        }
        sections.append(rows)
    print_sections(sections)


if __name__ == "__main__":
    sys.exit(main())

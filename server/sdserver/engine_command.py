"""`sdserver engine add | list | remove | verify`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sdserver.conversion import ConversionFailed, convert, prepare
from sdserver.engine_families import CLIPS, KNOWN
from sdserver.engine_store import EngineStore, engine_id_of
from sdserver.engines import Engine, EngineError
from sdserver.settings import Settings
from sdserver.triton_models import Placement

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MIRROR = "SDSERVER_ENGINE_MIRROR"
# Of which also a quarter, the overlap, is in whole places of the latents.
DECODE_TILE_MULTIPLE = 32
LEAST_DECODE_TILE = 128


def main(arguments: Sequence[str]) -> int:
    """Runs a command; returns the exit status. Reports go to standard output, progress to standard error."""
    options = _parser().parse_args(arguments)
    store = EngineStore(options.model_repository or Settings().model_repository)
    try:
        status: int = options.run(store, options)
    except ConversionFailed as error:
        if options.json:
            print(json.dumps({"error": error.message, "problems": error.problems}))
        print(f"sdserver engine: {error}", file=sys.stderr)
        return 1
    except (EngineError, OSError) as error:
        print(f"sdserver engine: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sdserver engine: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return status


def _add(store: EngineStore, options: argparse.Namespace) -> int:
    source, title = options.source, options.title or ""
    conversion = {
        name: value
        for name in ("dtype", "prediction_type", "clip", "sha256", "file", "revision")
        if (value := getattr(options, name)) is not None
    }
    engine_id = options.name
    # A folder or file of that name comes first: it is what the user sees.
    if not Path(source).exists() and (known := KNOWN.get(source)):
        pinned = {"file": known.file, "sha256": known.sha256, "prediction_type": known.prediction_type}
        conversion = {**pinned, **conversion}
        source = options.mirror or os.environ.get(MIRROR) or known.repository
        engine_id, title = engine_id or known.engine_id, title or known.title
    engine_id = engine_id or engine_id_of(source)
    if engine_id_of(engine_id) != engine_id:
        raise EngineError(
            f"--name {engine_id!r} is not possible: a to z, 0 to 9 and hyphens, such as {engine_id_of(engine_id)}"
        )
    before = store.find(engine_id)
    if before is not None:
        conversion["existing_plan"] = before.source.plan if before.source else ""
        conversion["existing_files"] = before.weights
    written: list[str] = []

    block_cache = options.block_cache or bool(before and before.block_cache)
    unprepared = ""

    with _bar() as bar:

        def on_event(event: dict[str, Any]) -> None:
            if event["event"] == "progress":
                bar.advance(event["stage"], event["file"], event["done"], event["total"])
            elif event["event"] == "stage":
                bar.stage(event["stage"])
            elif event["action"] == "written":
                written.append(f"engines/{engine_id}/{event['file']}")
                bar.say(f"{event['action']} {event['file']} {event['sha256'][:12]}")

        facts = convert({"source": source, "into": str(store.folder(engine_id)), **conversion}, on_event)
        preparation = {
            "folder": str(store.folder(engine_id)),
            "weights": facts["files"],
            "device": options.device,
            "runtime": options.runtime,
            "block_cache": block_cache,
            "preview": before is None or before.preview_map is None,
        }
        try:
            prepared = prepare(preparation, on_event)
        except ConversionFailed as error:
            # The engine is whole without it.
            unprepared = error.message
        else:
            facts["preview_map"] = prepared["preview_map"]
            written += [f"engines/{engine_id}/{name}" for name in prepared["networks"]]
    placement = Placement(
        options.device, options.precision, options.runtime, options.row_buckets or "", options.compile, options.threads
    )
    report = store.complete(
        engine_id,
        title,
        options.license or "",
        facts,
        placement,
        block_cache=block_cache,
        decode_tile=options.decode_tile,
    )
    written += report.written
    engine = report.engine
    if options.json:
        done = {"written": written, "ignored": report.ignored, "unprepared": unprepared}
        print(json.dumps({**_summary(store, engine), **done}, indent=2))
        return 0
    if unprepared:
        print(f"sdserver engine: left to the first start: {unprepared}", file=sys.stderr)
    if not written:
        print(f"{engine_id} is there already, and whole")
        return 0
    print(f"{engine_id}: {engine.description}")
    print(f"  {engine.prediction_type}, {_megabytes(store.size(engine))} in {facts['source']['dtype']}")
    print(f"  licence: {engine.license.name} {engine.license.url}")
    if engine.license.use_restrictions:
        print(f"  {engine.license.use_restrictions}")
    print(f"  models: {', '.join(engine.models)}")
    print(f"  previews: {'yes' if engine.preview_map else 'no'}")
    if networks := [name for name in written if "/openvino/" in name]:
        print(f"  converted for OpenVINO: {', '.join(networks)}")
    if engine.clip_guidance is None:
        print(
            f"  no CLIP guidance: --clip adds the image tower of the same CLIP, {CLIPS[facts['family']]} or its files"
        )
    if report.ignored:
        print(f"  not used: {', '.join(report.ignored)}")
    return 0


def _list(store: EngineStore, options: argparse.Namespace) -> int:
    engines = store.engines()
    if options.json:
        print(json.dumps([_summary(store, engine) for engine in engines], indent=2))
        return 0
    table = Table("engine", "native size", "predicts", "size", "licence", "roles", box=None)
    for engine in engines:
        table.add_row(
            engine.id,
            f"{engine.native_width} x {engine.native_height}",
            engine.prediction_type,
            _megabytes(store.size(engine)),
            engine.license.name,
            " ".join(engine.roles),
        )
    Console().print(table)
    for engine_id in store.unfinished():
        print(f"{engine_id} is unfinished: add it again, or remove it")
    return 0


def _remove(store: EngineStore, options: argparse.Namespace) -> int:
    if not options.yes:
        if not sys.stdin.isatty():
            raise EngineError(f"removing {options.engine} deletes its files: say --yes")
        if input(f"Delete the engine {options.engine} and its files? [y/N] ").strip().lower() not in ("y", "yes"):
            return 1
    store.remove(options.engine)
    print(json.dumps({"removed": options.engine}) if options.json else f"{options.engine} is removed")
    return 0


def _verify(store: EngineStore, options: argparse.Namespace) -> int:
    engines = [engine for engine in store.engines() if options.engine in (None, engine.id)]
    if not engines:
        raise EngineError(f"there is no engine {options.engine!r}; sdserver engine list shows them")
    total = sum(store.size(engine) for engine in engines)
    done = 0
    problems: dict[str, list[str]] = {}
    with _bar() as bar:

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            bar.advance("", f"reading {engine.id}", done, total)

        for engine in engines:
            problems[engine.id] = store.problems(engine, on_bytes)
    if options.json:
        print(json.dumps(problems, indent=2))
    else:
        for engine_id, found in problems.items():
            print("\n  ".join([f"{engine_id}: {'whole' if not found else 'damaged'}", *found]))
    if any(problems.values()):
        print("sdserver engine: the same `engine add` as before repairs an engine", file=sys.stderr)
        return 1
    return 0


def _summary(store: EngineStore, engine: Engine) -> dict[str, Any]:
    return {
        "id": engine.id,
        "name": engine.name,
        "digest": engine.digest,
        "bytes": store.size(engine),
        "prediction_type": engine.prediction_type,
        "native_width": engine.native_width,
        "native_height": engine.native_height,
        "models": engine.models,
        "license": engine.license.model_dump(),
        "source": engine.source.model_dump() if engine.source else None,
        "weights": engine.weights,
    }


class _Bar:
    """A progress bar on a terminal; elsewhere a line for each stage."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress, self._console = progress, console
        self._task = progress.add_task("starting", total=None, amount="")
        self._stage = ""

    def say(self, line: str) -> None:
        """A line above the bar."""
        self._console.print(line, highlight=False)

    def advance(self, stage: str, file: str, done: float, total: float) -> None:
        """So many bytes of a stage are done."""
        self._begin(stage)
        amount = f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
        self._progress.update(
            self._task, description=f"{stage} {file}".strip(), completed=done, total=total, amount=amount
        )

    def stage(self, name: str) -> None:
        """A stage begins that does not say how far it is."""
        self._begin(name)
        self._progress.reset(self._task, description=name, total=None, amount="")

    def _begin(self, stage: str) -> None:
        if stage != self._stage and not self._console.is_terminal:
            self.say(stage)
        self._stage = stage


@contextmanager
def _bar() -> Iterator[_Bar]:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _Bar(progress, console)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return int(text)


def _tile(text: str) -> int:
    if not text.isdecimal() or int(text) % DECODE_TILE_MULTIPLE or 0 < int(text) < LEAST_DECODE_TILE:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be 0, or a multiple of {DECODE_TILE_MULTIPLE} from {LEAST_DECODE_TILE} on"
        )
    return int(text)


def _row_buckets(text: str) -> str:
    return ",".join(str(_count(each)) for each in text.split(","))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="report as JSON")
    common.add_argument("--model-repository", type=Path, help="folder with the engines; SDSERVER_MODEL_REPOSITORY")
    parser = argparse.ArgumentParser(prog="sdserver engine", description="The engines of a model repository.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add = commands.add_parser("add", parents=[common], help="make an engine from a checkpoint")
    add.add_argument(
        "source",
        metavar="PATH_OR_REPO",
        help=f"diffusers folder, original file, repository of the hub, or {', '.join(KNOWN)}",
    )
    add.add_argument("--name", help="the engine's id; default: after the source")
    add.add_argument("--title", help="the engine's name for people")
    add.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), default="fp16", help="what the weights are stored as")
    add.add_argument("--prediction-type", choices=("epsilon", "v_prediction"), help="where the source does not say it")
    add.add_argument("--clip", metavar="PATH_OR_REPO", help="open_clip's files of the whole CLIP, for CLIP guidance")
    add.add_argument("--block-cache", action="store_true", help="take block caching: the UNet is loaded a second time")
    add.add_argument(
        "--decode-tile",
        type=_tile,
        metavar="PIXELS",
        help="decode larger images in squares of this side, for less memory; 0: never; default: the native size",
    )
    add.add_argument("--license", help="its name or SPDX id; default: the model card's or the family's")
    add.add_argument("--sha256", help="refuse a file of another digest")
    add.add_argument("--file", help="the one file to take of a repository")
    add.add_argument("--revision", help="branch, tag or commit of a repository")
    add.add_argument("--mirror", metavar="REPO", help=f"who hands out a pinned checkpoint; {MIRROR}")
    models = add.add_argument_group("where its models run", "what is left out is chosen when they start")
    models.add_argument(
        "--device",
        choices=("auto", "cpu", "gpu"),
        default="auto",
        help="auto: every GPU, or the CPU where there is none",
    )
    models.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="",
        help="what the UNet computes in, whatever is stored",
    )
    models.add_argument("--runtime", choices=("openvino", "torch"), default="", help="what runs the UNet on a CPU")
    models.add_argument("--threads", type=_count, metavar="N", help="CPU threads of each model")
    models.add_argument(
        "--row-buckets", type=_row_buckets, metavar="1,2,4", help="with torch: the UNet sees so many rows"
    )
    models.add_argument("--compile", action="store_true", help="on a GPU: the UNet by torch.compile, as CUDA graphs")
    add.set_defaults(run=_add)

    listing = commands.add_parser("list", parents=[common], help="show the engines")
    listing.set_defaults(run=_list)

    remove = commands.add_parser("remove", parents=[common], help="delete an engine and its Triton models")
    remove.add_argument("engine")
    remove.add_argument("--yes", action="store_true", help="do not ask")
    remove.set_defaults(run=_remove)

    verify = commands.add_parser("verify", parents=[common], help="compare the files with the descriptors' digests")
    verify.add_argument("engine", nargs="?")
    verify.set_defaults(run=_verify)
    return parser

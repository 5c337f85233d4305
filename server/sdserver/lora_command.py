"""`sdserver lora add | list | remove`: the LoRAs of an engine."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from sdserver.conversion import ConversionFailed, add_lora
from sdserver.engine_store import EngineStore
from sdserver.engines import LORA_NAME, EngineError
from sdserver.lora_store import LoraStore, lora_name_of
from sdserver.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdserver.engines import LoraInfo


def main(arguments: Sequence[str]) -> int:
    """Runs a command; returns the exit status."""
    options = _parser().parse_args(arguments)
    repository: Path = options.model_repository or Settings().model_repository
    try:
        options.run(repository, options)
    except (EngineError, OSError) as error:
        if options.json and isinstance(error, ConversionFailed):
            print(json.dumps({"error": error.message, "problems": error.problems}))
        print(f"sdserver lora: {error}", file=sys.stderr)
        return 1
    return 0


def _add(repository: Path, options: argparse.Namespace) -> None:
    store = LoraStore(repository, options.engine)
    name = options.name or lora_name_of(str(options.file))
    if not re.fullmatch(LORA_NAME, name):
        raise EngineError(f"--name {name!r} is not possible: letters, digits, dots, hyphens and underscores")
    before = store.find(name)
    with options.file.open("rb") as file:
        if before and before.source.sha256 != hashlib.file_digest(file, "sha256").hexdigest():
            raise EngineError(f"{name} is another LoRA already: choose another --name, or remove it first")
    facts = add_lora({"lora": str(options.file), "engine": str(store.engine_folder)})
    said = {field: value for field in ("title", "description") if (value := getattr(options, field)) is not None}
    if options.trigger_words is not None:
        said["trigger_words"] = [word.strip() for word in options.trigger_words.split(",") if word.strip()]
    lora = store.complete(name, {**facts, **said}, options.license or "")
    if options.json:
        print(lora.model_dump_json(indent=2))
        return
    print(f"{lora.name}: {_changes(lora)}")
    for field, value in (
        ("title", lora.title),
        ("about", lora.description),
        ("trigger words", ", ".join(lora.trigger_words)),
        ("licence", lora.license.name if lora.license else "not known; --license says it"),
    ):
        if value:
            print(f"  {field}: {value}")


def _list(repository: Path, options: argparse.Namespace) -> None:
    engines = [options.engine] if options.engine else [engine.id for engine in EngineStore(repository).engines()]
    found = {engine: LoraStore(repository, engine).loras() for engine in engines}
    if options.json:
        listed = {engine: [lora.model_dump(mode="json") for lora in loras] for engine, loras in found.items()}
        print(json.dumps(listed, indent=2))
        return
    table = Table("engine", "LoRA", "changes", "trigger words", "licence", box=None)
    for engine, loras in found.items():
        for lora in loras:
            licence = lora.license.name if lora.license else ""
            table.add_row(engine, lora.name, _changes(lora), ", ".join(lora.trigger_words), licence)
    Console().print(table)


def _remove(repository: Path, options: argparse.Namespace) -> None:
    LoraStore(repository, options.engine).remove(options.name)
    print(json.dumps({"removed": options.name}) if options.json else f"{options.name} is removed")


def _changes(lora: LoraInfo) -> str:
    counts = ((lora.unet_modules, "of the UNet"), (lora.text_encoder_modules, "of the text encoder"))
    layers = " and ".join(f"{count} layers {where}" for count, where in counts if count)
    return f"{layers}, rank {lora.rank}"


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="report as JSON")
    common.add_argument("--model-repository", type=Path, help="folder with the engines; SDSERVER_MODEL_REPOSITORY")
    parser = argparse.ArgumentParser(prog="sdserver lora", description="The LoRAs of an engine.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add = commands.add_parser("add", parents=[common], help="put a LoRA beside an engine")
    add.add_argument("engine")
    add.add_argument("file", type=Path, help=".safetensors of kohya's scripts, diffusers or PEFT")
    add.add_argument("--name", help="what requests call it; default: after the file")
    add.add_argument("--title", help="its name for people; default: as the file says")
    add.add_argument("--description", help="what it is for; default: as the file says")
    add.add_argument("--trigger-words", metavar="WORD,WORD", help="for the prompt; default: as the file says")
    add.add_argument("--license", help="its name or SPDX id; default: as the file says")
    add.set_defaults(run=_add)

    listing = commands.add_parser("list", parents=[common], help="show the LoRAs of an engine, or of all")
    listing.add_argument("engine", nargs="?")
    listing.set_defaults(run=_list)

    remove = commands.add_parser("remove", parents=[common], help="take a LoRA away")
    remove.add_argument("engine")
    remove.add_argument("name")
    remove.set_defaults(run=_remove)
    return parser

"""`sdserver doctor`: looks at this machine, its Triton and its engines, and says what does not work and what to do."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sdserver import hardware as hardware_of
from sdserver.backends.triton import TritonBackend
from sdserver.calibrate import seconds_of_call
from sdserver.doctor import EngineFacts, Finding, findings, kind_of
from sdserver.engine_memory import engine_memory
from sdserver.engine_store import EngineStore
from sdserver.engines import EngineError
from sdserver.errors import RequestError
from sdserver.settings import ServeSettings
from sdserver.triton_host import why_not
from sdserver.triton_models import parameters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdserver.engines import Engine
    from sdserver.hardware import Hardware

CALLS = 5
ROWS = 2
COLOURS = {"ok": "green", "note": "yellow", "wrong": "red"}


def main(arguments: Sequence[str], hardware: Hardware | None = None) -> int:
    """Shows what was found; returns 1 if anything is wrong. `hardware`: of this machine unless it is given."""
    parser = argparse.ArgumentParser(
        prog="sdserver doctor", description="What of this machine and its engines works, and what to do where it fails."
    )
    parser.add_argument("--triton-url", help="host:port of a Triton's gRPC endpoint that may run; SDSERVER_TRITON_URL")
    parser.add_argument("--model-repository", type=Path, help="folder with the engines; SDSERVER_MODEL_REPOSITORY")
    parser.add_argument("--json", action="store_true", help="report as JSON")
    options = parser.parse_args(arguments)
    try:
        settings = ServeSettings()
    except ValidationError as error:
        print(f"sdserver doctor: {error}", file=sys.stderr)
        return 2
    url = options.triton_url or settings.triton_url
    repository = options.model_repository or settings.model_repository
    seen = hardware_of.read() if hardware is None else hardware
    problems: list[Finding] = []
    facts: list[EngineFacts] = []
    answers = False
    try:
        engines = EngineStore(repository).engines()
        answers, steps = asyncio.run(_ask(url, engines))
        facts = [_facts(repository, engine, steps, seen) for engine in engines]
    except (EngineError, OSError, ValueError, KeyError) as error:
        problems.append(Finding("engines", "wrong", str(error), "sdserver engine verify says what is damaged"))
    found = [*findings(seen, why_not(), url, answers, facts), *problems]
    is_well = all(finding.state != "wrong" for finding in found)
    if options.json:
        report = {
            "ok": is_well,
            "findings": [dataclasses.asdict(finding) for finding in found],
            "hardware": dataclasses.asdict(seen),
            "engines": [dataclasses.asdict(engine) for engine in facts],
        }
        print(json.dumps(report, indent=2))
    else:
        _show(found)
    return int(not is_well)


def _facts(repository: Path, engine: Engine, steps: dict[str, float | None], seen: Hardware) -> EngineFacts:
    folder = repository / "engines" / engine.id
    configuration = (repository / engine.model("unet") / "config.pbtxt").read_text(encoding="utf-8")
    in_bf16 = seen.cpu.has_bf16 and parameters(configuration).get("precision") != "fp32"
    return EngineFacts(
        engine.id,
        len(engine.models),
        kind_of(configuration),
        engine_memory(folder, engine, on_gpu=False, in_bf16=in_bf16),
        engine_memory(folder, engine, on_gpu=True),
        engine.id in steps,
        steps.get(engine.id),
    )


async def _ask(url: str, engines: Sequence[Engine]) -> tuple[bool, dict[str, float | None]]:
    """Whether a Triton answers at `url`, and for each engine that it serves how long a step takes there."""
    backend = TritonBackend(url)
    try:
        is_live = await backend.is_live()
        steps = {
            engine.id: await _step_seconds(backend, engine) for engine in engines if await backend.is_ready(engine)
        }
    finally:
        await backend.close()
    return is_live, steps


async def _step_seconds(backend: TritonBackend, engine: Engine) -> float | None:
    """The median of CALLS calls of ROWS rows at the native size; None where they fail."""
    scale = engine.latents.downsampling
    shape = engine.native_height // scale, engine.native_width // scale
    try:
        # The first call makes kernels and memory.
        seconds = [await seconds_of_call(engine, backend, ROWS, shape) for _ in range(CALLS + 1)][1:]
    except RequestError:
        return None
    return statistics.median(seconds)


def _show(found: Sequence[Finding]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in found:
        text = Text(finding.text)
        if finding.advice:
            text.append(f"\n{finding.advice}", "bold")
        table.add_row(Text(finding.state, COLOURS[finding.state]), finding.name, text)
    Console().print(table)

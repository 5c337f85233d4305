"""Runs `sdmodels.conversion` as a process of its own: this one has no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from sdserver.engines import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class ConversionFailed(EngineError):
    """A checkpoint cannot become an engine; `problems` lists what is wrong with it."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__("\n  ".join([message, *problems]))
        self.message = message
        self.problems = problems


def convert(options: Mapping[str, Any], on_event: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The facts of a checkpoint, after its files are written; `on_event` gets what happens on the way.

    Raises ConversionFailed. Leaving by an exception ends the process; what it has finished stays for the next run.
    """
    return _run("convert", options, on_event)


def prepare(options: Mapping[str, Any], on_event: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """What the engine's first start and first preview need, made of its files; otherwise as `convert`."""
    return _run("prepare", options, on_event)


def add_lora(options: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a LoRA (`sdmodels.conversion.lora`), after its file is written; otherwise as `convert`."""
    return _run("lora", options, lambda _: None)


def _run(task: str, options: Mapping[str, Any], on_event: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    command = [sys.executable, "-m", "sdmodels.conversion", task, json.dumps(dict(options))]
    # In a process group of its own: Ctrl-C is for this process, which ends that one.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", process_group=0) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                event = json.loads(line)
                match event.pop("event"):
                    case "done":
                        facts: dict[str, Any] = event
                        return facts
                    case "error":
                        raise ConversionFailed(event["message"], tuple(event["problems"]))
                    case kind:
                        on_event({"event": kind, **event})
            status = process.wait()
        except BaseException:
            process.kill()
            raise
    raise ConversionFailed(
        f"the conversion ended with status {status} and without a word; run the command again, which goes on where it "
        "stopped. It needs pip install 'sd-service[models]', and memory for the largest tensor"
    )

"""`make demo`: starts a real Triton and the server, writes three pictures and a contact sheet, stops everything."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image as Pillow
from PIL import ImageDraw
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sdclient import Client, DeadlineExceededError, Image, UnavailableError
from sdclient import Progress as Step
from sdserver.triton_process import why_not

if TYPE_CHECKING:
    from collections.abc import Iterator

# File name, prompt, width, height. The last two differ by the negative prompt alone.
PICTURES = [
    ("village", "a blue house and pine trees below snowy mountains, day", 384, 128),
    ("forest", "a forest below snowy mountains, sunny day", 256, 128),
    ("without-forest", "a forest below snowy mountains, sunny day | trees, forest, greenery : -1", 256, 128),
]
SEED = 1
START_SECONDS = 180.0


def main() -> int:
    """Runs the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("out/demo"), help="folder for the pictures (out/demo)")
    folder: Path = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    log = folder / "server.log"
    times = Table("part", "seconds")
    started = time.monotonic()

    reason = why_not()
    if reason:
        console.print(f"Triton cannot run here, so the models run inside the server: {reason}")
    columns = (TextColumn("{task.description:<32}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task("start the server" if reason else "start Triton and the server", total=None)
        with running_server("in-process" if reason else "triton", log) as (target, process), Client(target) as client:
            wait_until_ready(client, process, log)
            done(bars, bar, times)
            files = []
            for name, prompt, width, height in PICTURES:
                bar = bars.add_task(name, total=None)
                files.append(folder / f"{name}.png")
                with client.stream(prompt, width=width, height=height, seed=SEED) as events:
                    for event in events:
                        match event:
                            case Step(step=step, steps=steps):
                                bars.update(bar, completed=step, total=steps)
                            case Image():
                                event.save(files[-1])
                done(bars, bar, times)
            bar = bars.add_task("stop everything", total=None)
        done(bars, bar, times)

    sheet = folder / "contact-sheet.png"
    write_contact_sheet(sheet, files)
    times.add_row("all", f"{time.monotonic() - started:.2f}", style="bold")
    console.print(times)
    for path in (*files, sheet):
        console.print(f"wrote {path}", highlight=False)
    return 0


@contextmanager
def running_server(backend: str, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server, with Triton if `backend` is triton, on free ports; its log goes to a file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ports = [f"--{name}=0" for name in ("triton-grpc-port", "triton-http-port", "triton-metrics-port")]
    command = [sys.executable, "-m", "sdserver", "up", f"--port={port}", f"--backend={backend}", *ports]
    # On the CPU on every machine: so that it needs no driver that fits, and makes the pictures of the README.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    with log.open("wb") as output, subprocess.Popen(command, stderr=output, stdout=output, env=environment) as process:
        try:
            yield f"127.0.0.1:{port}", process
        finally:
            process.terminate()


def wait_until_ready(client: Client, process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits until an engine is ready. Raises SystemExit with the end of the log when the server ends instead."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if any(engine.ready for engine in client.engines(timeout=5)):
                return
        except (UnavailableError, DeadlineExceededError):
            pass
        time.sleep(0.2)
    lines = log.read_text(errors="replace").splitlines()
    raise SystemExit("\n".join([*lines[-20:], f"demo: the server did not start; its log is {log}"]))


def done(bars: Progress, bar: int, times: Table) -> None:
    """Marks a part as done and notes how long it took."""
    task = bars.tasks[bar]
    total = task.total or 1
    bars.update(task.id, total=total, completed=total)
    bars.stop_task(task.id)
    times.add_row(task.description, f"{task.elapsed or 0:.2f}")


def write_contact_sheet(path: Path, files: list[Path]) -> None:
    """The first picture above the other two, which stand side by side; all at twice their size under their prompts."""
    margin, caption = 8, 20
    pictures = []
    for file in files:
        with Pillow.open(file) as opened:
            pictures.append(opened.convert("RGB").resize((opened.width * 2, opened.height * 2)))
    first, left, right = pictures
    second_row = first.height + caption + 2 * margin
    places = [(margin, margin), (margin, second_row), (left.width + 2 * margin, second_row)]
    width = left.width + right.width + 3 * margin
    sheet = Pillow.new("RGB", (width, second_row + caption + left.height + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for picture, (x, y), (_, prompt, *_) in zip(pictures, places, PICTURES, strict=True):
        draw.text((x, y + 4), prompt, fill="black")
        sheet.paste(picture, (x, y + caption))
    sheet.save(path)


if __name__ == "__main__":
    sys.exit(main())

"""What the commands show on a terminal. rich is optional."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ._events import Accepted, Image, Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ._events import Event


@contextmanager
def progress_bar() -> Iterator[Callable[[Event], None]]:
    """Shows events on standard error, if that is a terminal: the place in the queue, then steps and times."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as ProgressBar
    except ImportError:
        print("sdclient: no progress bar without rich: pip install 'sd-service[cli]'", file=sys.stderr)
        yield lambda event: None
        return

    console = Console(stderr=True)
    with ProgressBar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as bar:
        task = bar.add_task("connecting", total=None)

        def show(event: Event) -> None:
            match event:
                case Accepted(queue_position=0):
                    bar.update(task, description="starting")
                case Accepted(queue_position=ahead):
                    bar.update(task, description=f"waiting, {ahead} ahead")
                case Progress(step, steps):
                    bar.update(
                        task, description="denoising" if step < steps else "decoding", completed=step, total=steps
                    )
                case Image():
                    bar.stop()

        yield show


def print_sections(sections: Sequence[Mapping[str, str]]) -> None:
    """Prints names and values, section by section, as a table. Needs rich."""
    try:
        from rich.console import Console
        from rich.table import Column, Table
        from rich.text import Text
    except ImportError as error:
        raise ImportError("the table needs rich: pip install 'sd-service[cli]', or use --json") from error

    table = Table("name", Column("value", overflow="fold"), show_header=False)
    for section in sections:
        for name, value in section.items():
            # Text, and nothing that a terminal obeys: what a server or a file says is no markup.
            table.add_row(name, Text("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in value)))
        table.add_section()
    Console().print(table)

"""`sdserver top`: what servers do right now, from their metrics, in a terminal."""

from __future__ import annotations

import argparse
import http.client
import math
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sdserver.figures import Figures, Scrape

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.console import RenderableType

DEFAULT = "127.0.0.1:9464"
STAGES = ("queue", "encode", "denoise", "decode", "write")
MOST_TENANTS = 10


def main(arguments: Sequence[str]) -> int:
    """Shows the figures until Ctrl-C, or once; returns the exit status."""
    parser = argparse.ArgumentParser(prog="sdserver top", description="What servers do right now.")
    parser.add_argument(
        "servers",
        nargs="*",
        default=[DEFAULT],
        metavar="HOST:PORT",
        help=f"where servers show metrics (--metrics-port); several are taken together; default: {DEFAULT}",
    )
    parser.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="between two looks; default: 2")
    parser.add_argument("--once", action="store_true", help="look twice, print, and end")
    options = parser.parse_args(arguments)
    if not options.interval > 0:
        parser.error("--interval must be greater than 0")
    console = Console()
    looks = look(options.servers, options.interval)
    try:
        if options.once:
            figures, failures = next(looks)
            console.print(view(figures, failures))
            return int(not figures.servers)
        with Live(console=console, screen=True, auto_refresh=False) as live:
            for figures, failures in looks:
                live.update(view(figures, failures), refresh=True)
    except KeyboardInterrupt:
        return 130
    return 0


def look(servers: Sequence[str], interval: float) -> Iterator[tuple[Figures, dict[str, str]]]:
    """The figures of each stretch of `interval` seconds, and which servers have none, and why."""
    with ThreadPoolExecutor(len(servers)) as pool:
        before: dict[str, Scrape] = {}
        while True:
            failures: dict[str, str] = {}
            after: dict[str, Scrape] = {}
            for server, found in zip(servers, pool.map(_scrape, servers), strict=True):
                if isinstance(found, Scrape):
                    after[server] = found
                else:
                    failures[server] = found
            if before or not after:
                known = before.keys() & after.keys()
                yield Figures([(before[server], after[server]) for server in servers if server in known]), failures
            before = after
            time.sleep(interval)


def _scrape(server: str) -> Scrape | str:
    """Its figures, or why there are none."""
    url = server if "://" in server else f"http://{server}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return Scrape.of(answer.read().decode(), time.monotonic())
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        return f"{reason}; is it started with --metrics-port?"


def view(figures: Figures, failures: Mapping[str, str]) -> RenderableType:
    """Everything as it is printed."""
    parts: list[RenderableType] = [_failure(server, reason) for server, reason in failures.items()]
    if figures.servers:
        for part in (_summary(figures), _engines(figures), _stages(figures), _tenants(figures)):
            parts += [part, Text()]
    return Group(*parts)


def _failure(server: str, reason: str) -> Text:
    return Text(f"{server}: {reason}", style="red")


def _summary(figures: Figures) -> Text:
    active, waiting = (sum(figures.now(f"{name}_requests")) for name in ("active", "queued"))
    ended = [
        f"{figures.rate('requests_total', outcome=outcome):.2f}/s {outcome}"
        for outcome in figures.labels("requests_total", "outcome")
        if figures.rise("requests_total", outcome=outcome)
    ]
    facts = [
        f"{active:g} running",
        f"{waiting:g} waiting",
        f"who comes now waits {_seconds(max(figures.now('queue_seconds')))}",
        f"ended: {', '.join(ended) or 'none'}",
    ]
    servers = f"{figures.servers} server{'s' * (figures.servers != 1)}"
    return Text("   ").join([Text(servers, style="bold"), *map(Text, facts)])


def _engines(figures: Figures) -> Table:
    table = _table(
        "engine", "ready", "images/min", "calls/s", "step", "p95", "rows a call", "fill", "useful", "first row"
    )
    for engine in figures.labels("engine_ready", "engine"):
        ready = figures.now("engine_ready", engine=engine)
        rows = figures.rise("rows_total", engine=engine)
        useful = figures.rise("rows_total", engine=engine, kind="useful") / rows if rows else math.nan
        table.add_row(
            engine,
            Text(f"{sum(ready):g}/{len(ready)}", style="green" if all(ready) else "red"),
            f"{60 * figures.rate('images_total', engine=engine):.1f}",
            f"{figures.rate('step_seconds_count', engine=engine):.1f}",
            _seconds(figures.mean("step_seconds", engine=engine)),
            _seconds(figures.quantile(0.95, "step_seconds", engine=engine)),
            _number(figures.mean("batch_rows", engine=engine)),
            _percent(figures.mean("batch_fill", engine=engine)),
            _percent(useful),
            _seconds(figures.mean("first_row_seconds", engine=engine)),
        )
    return table


def _stages(figures: Figures) -> Table:
    table = _table("stage", "mean", "p95", "a second")
    for stage in STAGES:
        table.add_row(
            stage,
            _seconds(figures.mean("stage_seconds", stage=stage)),
            _seconds(figures.quantile(0.95, "stage_seconds", stage=stage)),
            f"{figures.rate('stage_seconds_count', stage=stage):.2f}",
        )
    return table


def _tenants(figures: Figures) -> Table:
    table = _table("key", "of the work", "Mpixel steps/s")
    spent = {
        tenant: figures.rate("tenant_pixel_steps_total", tenant=tenant)
        for tenant in figures.labels("tenant_pixel_steps_total", "tenant")
    }
    total = sum(spent.values())
    for tenant, rate in sorted(spent.items(), key=lambda item: -item[1])[:MOST_TENANTS]:
        table.add_row(tenant, _percent(rate / total if total else math.nan), f"{rate / 1e6:.2f}")
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(first, style="bold")
    for name in others:
        table.add_column(name, justify="right")
    return table


def _seconds(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.0%}"


def _number(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:.1f}"

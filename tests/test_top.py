"""`sdserver top`: rates, means and quantiles between two scrapes, and what a terminal shows of them."""

from __future__ import annotations

import asyncio
import math
import sys
from typing import TYPE_CHECKING

import grpc
import pytest
from calls import a_request, events_of
from fakes import FakeBackend
from sdapi.v1.generation_pb2_grpc import GenerationServiceStub
from sdserver.figures import Figures, Scrape
from sdserver.server import Server

if TYPE_CHECKING:
    from sdserver.settings import ServeSettings

HEAD = "# TYPE sdserver_images_total counter\n# TYPE sdserver_step_seconds histogram\n"


def scrape(time: float, lines: str) -> Scrape:
    return Scrape.of(HEAD + lines + "\n", time)


def images(count: float, engine: str = "a") -> str:
    return f'sdserver_images_total{{engine="{engine}"}} {count}'


def test_a_rate_is_what_a_counter_grew_a_second_over_all_servers_and_labels() -> None:
    first = scrape(10, images(5)), scrape(12, f"{images(9)}\n{images(2, 'b')}")
    second = scrape(11, images(100)), scrape(13, images(101))
    figures = Figures([first, second])
    assert (figures.servers, figures.seconds) == (2, 2)
    assert figures.rate("images_total") == (4 + 2 + 1) / 2
    assert figures.rate("images_total", engine="b") == 1
    assert figures.labels("images_total", "engine") == ["a", "b"]


def test_a_server_that_was_restarted_counts_from_zero() -> None:
    assert Figures([(scrape(0, images(1000)), scrape(1, images(3)))]).rise("images_total") == 3


def histogram(*upto: int, total: float = 0.0) -> str:
    """Cumulative counts up to 0.1 s, 0.2 s, and all."""
    lines = [
        f'sdserver_step_seconds_bucket{{le="{bound}"}} {count}'
        for bound, count in zip(("0.1", "0.2", "+Inf"), upto, strict=True)
    ]
    return "\n".join([*lines, f"sdserver_step_seconds_count {upto[-1]}", f"sdserver_step_seconds_sum {total}"])


@pytest.mark.parametrize(
    ("share", "upto", "expected"),
    [(0.5, (10, 10, 10), 0.05), (0.5, (0, 10, 10), 0.15), (0.75, (5, 10, 10), 0.15), (0.95, (0, 0, 10), 0.2)],
)
def test_a_quantile_lies_where_prometheus_says(share: float, upto: tuple[int, int, int], expected: float) -> None:
    figures = Figures([(scrape(0, histogram(0, 0, 0)), scrape(1, histogram(*upto)))])
    assert figures.quantile(share, "step_seconds") == pytest.approx(expected)


def test_where_nothing_happened_there_is_no_mean_and_no_quantile() -> None:
    same = histogram(3, 4, 5, total=2.0)
    figures = Figures([(scrape(0, same), scrape(1, same))])
    assert math.isnan(figures.mean("step_seconds"))
    assert math.isnan(figures.quantile(0.5, "step_seconds"))
    assert math.isnan(Figures([]).quantile(0.5, "step_seconds"))
    assert Figures([]).rate("images_total") == 0


def test_a_mean_is_that_of_the_time_between() -> None:
    before, after = histogram(0, 0, 10, total=100.0), histogram(4, 4, 14, total=101.0)
    assert Figures([(scrape(0, before), scrape(1, after))]).mean("step_seconds") == 0.25


@pytest.mark.parametrize("text", ["<html>", "# TYPE up gauge\nup 1\n", ""])
def test_what_is_not_from_a_server_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Scrape.of(text, 0)


async def top(*arguments: str) -> tuple[int, str]:
    """Exit status and output of `sdserver top --once`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sdserver", "top", "--once", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={"COLUMNS": "140", "PATH": ""},
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_a_working_server_and_one_that_is_not_there_are_shown(settings: ServeSettings) -> None:
    backend = FakeBackend(delay=0.02)
    async with (
        Server(settings.model_copy(update={"metrics_port": 0}), backend) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        work = asyncio.create_task(busy(GenerationServiceStub(channel)))
        status, output = await top(f"127.0.0.1:{server.metrics_port}", "127.0.0.1:1", "--interval", "0.5")
        work.cancel()
    assert status == 0
    assert "127.0.0.1:1: " in output
    assert "1 server " in output
    [line] = [line for line in output.splitlines() if line.startswith("tiny-landscape")]
    words = line.split()
    assert words[1] == "1/1"
    assert float(words[2]) > 0
    assert "ms" in line
    assert "100%" in line, "all rows are useful"
    for stage in ("encode", "denoise", "decode", "write", "anonymous"):
        assert any(line.startswith(stage) for line in output.splitlines()), stage


async def busy(stub: object) -> None:
    while True:
        await events_of(stub, a_request(steps=5))  # type: ignore[arg-type]


async def test_without_any_server_it_says_how_to_get_one() -> None:
    status, output = await top("127.0.0.1:1")
    assert status == 1
    assert "--metrics-port" in output

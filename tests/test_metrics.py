"""What Prometheus sees: every figure is one that a scrape of a real server has."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from calls import a_request, events_of, failure_of
from fakes import FakeBackend
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from sdapi.v1.generation_pb2_grpc import GenerationServiceStub
from sdserver.metrics import MAX_TENANTS, Metrics
from sdserver.server import Server, ServerError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sdapi.v1.generation_pb2_grpc import GenerationServiceAsyncStub
    from sdserver.settings import ServeSettings

ROOT = Path(__file__).parents[1]
ENGINE = "tiny-landscape"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def scraped(server: Server) -> str:
    with await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{server.metrics_port}/metrics") as answer:
        return str(answer.read().decode())


def samples_of(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Scrape:
    """The figures of a server at one moment."""

    def __init__(self, text: str) -> None:
        self._samples = samples_of(text)

    def __call__(self, name: str, **labels: str) -> float:
        """A figure; 0 for a series that has not begun."""
        return self._samples.get((f"sdserver_{name}", frozenset(labels.items())), 0.0)

    def labels(self, name: str) -> set[frozenset[tuple[str, str]]]:
        return {labels for found, labels in self._samples if found == f"sdserver_{name}"}


async def scrape(server: Server) -> Scrape:
    return Scrape(await scraped(server))


@pytest.fixture(scope="session")
def measured(settings: ServeSettings) -> ServeSettings:
    return settings.model_copy(update={"metrics_port": 0})


@pytest.fixture
async def server(measured: ServeSettings, backend: FakeBackend) -> AsyncIterator[Server]:
    async with Server(measured, backend) as server:
        yield server


async def test_a_generation_is_in_every_figure(
    stub: GenerationServiceAsyncStub, server: Server, backend: FakeBackend
) -> None:
    backend.delay = 0.01
    usage = (await events_of(stub, a_request(image_count=2, steps=3)))[-1].finished.usage
    now = await scrape(server)
    assert now("requests_total", engine=ENGINE, outcome="ok") == 1
    assert now("images_total", engine=ENGINE, size="<=256px") == 2
    assert now("rows_total", engine=ENGINE, kind="useful") == usage.unet_rows == 12
    assert now("rows_total", engine=ENGINE, kind="wasted") == now("rows_total", engine=ENGINE, kind="padded") == 0
    assert now("tenant_pixel_steps_total", tenant="anonymous") == usage.pixel_steps
    calls = now("step_seconds_count", engine=ENGINE)
    assert calls == len(backend.batches) == now("batch_rows_count", engine=ENGINE)
    assert now("step_seconds_sum", engine=ENGINE) >= 0.01 * calls
    assert now("batch_rows_sum", engine=ENGINE) == 12
    assert 0 < now("batch_fill_sum", engine=ENGINE) / now("batch_fill_count", engine=ENGINE) <= 1
    assert now("admission_seconds_count") == now("first_row_seconds_count", engine=ENGINE) == 1
    for stage, times in {"queue": 1, "encode": 1, "denoise": 2, "decode": 2, "write": 2}.items():
        assert now("stage_seconds_count", engine=ENGINE, stage=stage) == times, stage
    assert now("text_cache_requests_total", result="miss") == 2, "the prompt and the empty one"
    assert now("engine_ready", engine=ENGINE) == 1


async def test_a_prompt_that_comes_again_is_a_hit(stub: GenerationServiceAsyncStub, server: Server) -> None:
    for _ in range(2):
        await events_of(stub, a_request())
    now = await scrape(server)
    assert (now("text_cache_requests_total", result="hit"), now("text_cache_requests_total", result="miss")) == (2, 2)


async def test_a_failure_is_counted_by_status_and_by_reason(
    stub: GenerationServiceAsyncStub, server: Server, backend: FakeBackend
) -> None:
    await failure_of(stub, a_request(steps=0))
    await failure_of(stub, a_request(engine="nope"))
    backend.not_finite = True
    await failure_of(stub, a_request())
    now = await scrape(server)
    # The engine of a request that cannot be read is not known, and never what a caller says.
    assert now("requests_total", engine="", outcome="invalid_argument") == 1
    assert now("requests_total", engine="", outcome="not_found") == 1
    assert now("requests_total", engine=ENGINE, outcome="internal") == 1
    for reason in ("INVALID_REQUEST", "UNKNOWN_ENGINE", "NOT_FINITE"):
        assert now("refusals_total", reason=reason) == 1, reason


async def test_a_caller_that_goes_is_told_from_one_that_is_out_of_time(
    stub: GenerationServiceAsyncStub, server: Server, backend: FakeBackend
) -> None:
    backend.delay = 0.05
    call = stub.Generate(a_request(steps=100))
    await aiter(call).__anext__()
    while not backend.running:
        await asyncio.sleep(0.005)
    call.cancel()
    with pytest.raises(grpc.aio.AioRpcError):
        _ = [event async for event in stub.Generate(a_request(steps=100), timeout=0.3)]
    await asyncio.sleep(0.2)
    now = await scrape(server)
    assert now("requests_total", engine=ENGINE, outcome="cancelled") == 1
    assert now("requests_total", engine=ENGINE, outcome="deadline_exceeded") == 1
    assert now("tenant_pixel_steps_total", tenant="anonymous") > 0, "what was computed is counted, wanted or not"


async def test_rows_of_an_image_that_is_cancelled_while_they_run_are_wasted(
    stub: GenerationServiceAsyncStub, server: Server, backend: FakeBackend
) -> None:
    backend.delay = 0.1
    staying = asyncio.create_task(events_of(stub, a_request(steps=8)))
    going = stub.Generate(a_request(steps=100))
    await aiter(going).__anext__()
    while not (backend.batches[-1:] == [4] and backend.running):
        await asyncio.sleep(0.005)
    going.cancel()
    usage = (await staying)[-1].finished.usage
    now = await scrape(server)
    assert now("rows_total", engine=ENGINE, kind="wasted") == 2
    assert now("rows_total", engine=ENGINE, kind="useful") >= usage.unet_rows


async def test_places_are_shown_as_they_are(measured: ServeSettings, backend: FakeBackend) -> None:
    backend.delay = 0.02
    small = measured.model_copy(update={"max_active": 1})
    async with Server(small, backend) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub: GenerationServiceAsyncStub = GenerationServiceStub(channel)
        before = await scrape(server)
        assert [before(name) for name in ("active_requests", "queued_requests", "queue_seconds")] == [0, 0, 0]
        running = [asyncio.create_task(events_of(stub, a_request(steps=20))) for _ in range(3)]
        while server.admission.queued < 2:
            await asyncio.sleep(0.005)
        during = await scrape(server)
        assert (during("active_requests"), during("queued_requests")) == (1, 2)
        assert during("queue_seconds") > 0
        await asyncio.gather(*running)
        after = await scrape(server)
        assert after("active_requests") == 0
        assert after("admission_seconds_count") == 3
        assert after("admission_seconds_sum") > 3 * 20 * 0.02


async def test_an_engine_that_does_not_answer_is_not_ready(server: Server, backend: FakeBackend) -> None:
    backend.ready = False
    await asyncio.sleep(0.2)
    now = await scrape(server)
    assert now.labels("engine_ready") == {frozenset({("engine", ENGINE)})}
    assert now("engine_ready", engine=ENGINE) == 0


async def test_servers_in_one_process_count_for_themselves(measured: ServeSettings, server: Server) -> None:
    async with (
        Server(measured, FakeBackend()) as other,
        grpc.aio.insecure_channel(f"127.0.0.1:{other.port}") as channel,
    ):
        await events_of(GenerationServiceStub(channel), a_request())
        counts = [(await scrape(each))("requests_total", engine=ENGINE, outcome="ok") for each in (server, other)]
    assert counts == [0, 1]


def test_an_image_belongs_to_the_square_of_as_many_pixels() -> None:
    metrics = Metrics()
    for width, height in ((256, 256), (128, 512), (257, 256), (512, 512), (768, 768), (2048, 512), (1024, 1040)):
        metrics.image_done("e", width, height)
    values = {
        sample.labels["size"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "sdserver_images_total"
    }
    assert values == {"<=256px": 2, "<=512px": 2, "<=768px": 1, "<=1024px": 1, "larger": 1}


def test_tenants_beyond_the_hundredth_are_one() -> None:
    metrics = Metrics()
    for _ in range(2):
        for number in range(MAX_TENANTS + 5):
            metrics.spent(f"tenant-{number}", 10)
    values = {
        sample.labels["tenant"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "sdserver_tenant_pixel_steps_total"
    }
    assert len(values) == MAX_TENANTS + 1
    assert values["other"] == 100
    assert values["tenant-99"] == 20


def documented() -> set[str]:
    """The names in the table of docs/operations.md."""
    rows = re.findall(r"^\| `(sdserver_[a-z_]+)", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    assert len(rows) == len(set(rows))
    return set(rows)


async def test_the_table_of_the_documents_is_what_a_scrape_has(
    stub: GenerationServiceAsyncStub, server: Server
) -> None:
    await events_of(stub, a_request())
    await failure_of(stub, a_request(steps=0))
    families = list(text_string_to_metric_families(await scraped(server)))
    names = {family.name + "_total" * (family.type == "counter") for family in families if family.samples}
    assert {name for name in names if name.startswith("sdserver_")} == documented()
    assert "process_resident_memory_bytes" in names


async def test_prometheus_gets_the_format_that_it_asks_for(server: Server) -> None:
    url = f"http://127.0.0.1:{server.metrics_port}/metrics"
    request = urllib.request.Request(url, headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    with await asyncio.to_thread(urllib.request.urlopen, request) as answer:
        assert "openmetrics" in answer.headers["Content-Type"]
        parse: Any = openmetrics_families
        families = [family.name for family in parse(answer.read().decode())]
    assert "sdserver_queue_seconds" in families


async def test_promtool_has_nothing_to_say(stub: GenerationServiceAsyncStub, server: Server) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    await events_of(stub, a_request())
    text = await scraped(server)
    checked = await asyncio.to_thread(
        subprocess.run, [promtool, "check", "metrics"], input=text, capture_output=True, text=True
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


async def test_a_port_of_metrics_that_is_taken_is_one_clear_message(measured: ServeSettings, server: Server) -> None:
    taken = measured.model_copy(update={"metrics_port": server.metrics_port})
    with pytest.raises(ServerError, match=f"cannot show metrics on 127.0.0.1:{server.metrics_port}"):
        async with Server(taken, FakeBackend()):
            pass


async def test_the_port_is_free_again_when_the_server_has_ended(measured: ServeSettings) -> None:
    async with Server(measured, FakeBackend()) as first:
        port = first.metrics_port
    async with Server(measured.model_copy(update={"metrics_port": port}), FakeBackend()) as second:
        assert (second.metrics_port, bool(await scraped(second))) == (port, True)


def test_what_is_off_is_not_imported() -> None:
    code = """
import sys
import sdserver.__main__
from sdserver.server import Server
from sdserver.settings import ServeSettings
Server(ServeSettings())
print(*(name for name in ("prometheus_client", "opentelemetry") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []

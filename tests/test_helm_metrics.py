"""Alerts and dashboard ask for metrics that there are, and alerts fire when they should."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
import time
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import charts
import grpc
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from sdapi.v1.generation_pb2 import GenerateRequest, Prompt
from sdapi.v1.generation_pb2_grpc import GenerationServiceStub
from sdclient import AsyncClient, NotFoundError
from sdserver import errors
from sdserver.server import Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from fakes import FakeBackend
    from sdserver.settings import ServeSettings
    from sdserver.triton_process import TritonProcess

RUNBOOK = charts.CHART.parent / "docs/runbook.md"
# As the ServiceMonitors name server and Triton.
JOB = "sd-sd-service"
# There are none of these without a GPU.
GPU = {"nv_gpu_utilization", "nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes"}
# Made by Prometheus itself, or labels that it gives to every target.
PROMETHEUS_LABELS = {"namespace", "job", "instance", "le", "gpu_uuid"}
SUFFIXES = r"_(total|bucket|sum|count)$"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool: apt-get install prometheus")


def rules() -> list[dict[str, Any]]:
    values = {"metrics": {"prometheusRule": {"enabled": True}}}
    [rule] = charts.of_kind(charts.render(values), "PrometheusRule")
    found: list[dict[str, Any]] = rule["spec"]["groups"][0]["rules"]
    return found


def dashboard() -> dict[str, Any]:
    [config] = charts.of_kind(charts.render({"metrics": {"dashboard": {"enabled": True}}}), "ConfigMap")
    found: dict[str, Any] = json.loads(config["data"]["sd-service.json"])
    return found


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in rules())
    yield from (target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", []))
    for name in ("keda", "hpa"):
        for each in charts.render(charts.values_of(name)):
            for trigger in each.get("spec", {}).get("triggers", []):
                yield trigger["metadata"]["query"]
            for metric in each.get("spec", {}).get("metrics", []):
                yield metric["pods"]["metric"]["name"]


def selectors(expression: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Metrics of an expression, with the labels that it selects by."""
    for name, labels in re.findall(r"\b((?:sdserver|nv)_[a-z_]+)(?:\{([^}]*)\})?", expression):
        yield name, dict(re.findall(r'(\w+)(?:=~|!=|=)"([^"]*)"', labels))


def samples(url: str) -> dict[str, set[str]]:
    """Names of samples, with the names of their labels."""
    with urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        # Known, though without a label's value nothing has been counted yet.
        found.setdefault(family.name, set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.fixture
async def scraped(settings: ServeSettings, backend: FakeBackend) -> AsyncIterator[dict[str, set[str]]]:
    """What a real server shows after a generation, one that was refused and one for an unknown engine."""
    async with (
        Server(settings.model_copy(update={"metrics_port": 0}), backend) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub = GenerationServiceStub(channel)
        request = GenerateRequest(prompts=[Prompt(text="a lake", weight=1)], steps=2)
        async for _ in stub.Generate(request):
            pass
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in stub.Generate(GenerateRequest(prompts=request.prompts, engine="none")):
                pass
        yield samples(f"http://127.0.0.1:{server.metrics_port}/metrics")


def test_every_metric_of_the_server_is_in_a_real_scrape_with_its_labels(scraped: dict[str, set[str]]) -> None:
    asked = {name for expression in expressions() for name, _ in selectors(expression) if name.startswith("sdserver")}
    assert len(asked) > 15
    assert asked <= scraped.keys()
    families = {name for name in scraped if name.startswith("sdserver") and not re.search(SUFFIXES, name)}
    assert families == {re.sub(SUFFIXES, "", name) for name in asked}, "shown is all that is counted"
    for expression in expressions():
        for name, labels in selectors(expression):
            if name.startswith("sdserver"):
                assert labels.keys() - PROMETHEUS_LABELS <= scraped[name], expression
        for group in re.findall(r"\bby \(([^)]*)\)", expression):
            known = set().union(*(scraped.get(name, set()) for name, _ in selectors(expression)))
            if "sdserver" in expression:
                assert set(group.split(", ")) - PROMETHEUS_LABELS <= known, expression


def test_every_metric_of_triton_is_in_a_real_scrape(triton: TritonProcess) -> None:
    found = samples(f"http://127.0.0.1:{triton.metrics_port}/metrics")
    asked = {name for expression in expressions() for name, _ in selectors(expression) if name.startswith("nv_")}
    assert len(asked) > 5
    assert asked - GPU <= found.keys()


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus: apt-get install prometheus")
async def test_a_real_prometheus_has_an_answer_for_every_panel_and_every_scaler(
    triton_settings: ServeSettings, triton: TritonProcess, tmp_path: Path
) -> None:
    panels = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    scalers = [
        trigger["metadata"]["query"]
        for each in charts.of_kind(charts.render(charts.values_of("keda")), "ScaledObject")
        for trigger in each["spec"]["triggers"]
    ]
    settings = triton_settings.model_copy(update={"metrics_port": 0})
    async with Server(settings) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        async with prometheus(tmp_path, [server.metrics_port, triton.metrics_port]) as ask:
            await client.generate("a lake", steps=2)
            with pytest.raises(NotFoundError):
                await client.generate("a lake", engine="none")
            unanswered = panels + scalers
            until = time.monotonic() + 40
            while time.monotonic() < until:
                # So that counters grow between two scrapes.
                await client.generate("a lake", steps=2, seed=1)
                await asyncio.sleep(0.2)
                unanswered = [each for each in unanswered if not await ask(each)]
                if all(GPU & set(re.findall(r"\w+", each)) for each in unanswered):
                    break
        assert not [each for each in unanswered if not GPU & set(re.findall(r"\w+", each))]


@asynccontextmanager
async def prometheus(folder: Path, ports: list[int | None]) -> AsyncIterator[Callable[[str], Awaitable[list[Any]]]]:
    """Scrapes ports as the ServiceMonitors have it, and answers expressions."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    targets = [{"targets": [f"127.0.0.1:{port}" for port in ports], "labels": {"namespace": charts.NAMESPACE}}]
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"},
        "scrape_configs": [{"job_name": JOB, "static_configs": targets}],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    options = [f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
    process = await asyncio.create_subprocess_exec(
        *("prometheus", *options, f"--web.listen-address={address}", "--log.level=error")
    )

    async def ask(expression: str) -> list[Any]:
        for name, value in {"$__rate_interval": "1m", "$namespace": charts.NAMESPACE, "$job": JOB}.items():
            expression = expression.replace(name, value)
        url = f"http://{address}/api/v1/query?{urlencode({'query': expression})}"
        try:
            with await asyncio.to_thread(urlopen, url, timeout=10) as answer:
                found: list[Any] = json.load(answer)["data"]["result"]
        except HTTPError as error:
            if error.code != HTTPStatus.SERVICE_UNAVAILABLE:
                raise
            # It is starting.
            return []
        except URLError:
            assert process.returncode is None
            return []
        return [each for each in found if each["value"][1] != "NaN"]

    try:
        yield ask
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 30)


def test_every_expression_is_about_one_release_only() -> None:
    for expression in expressions():
        for name, labels in selectors(expression):
            # A custom metric of an HPA is bound to the pods of its target.
            assert expression == name or {"namespace", "job"} <= labels.keys(), expression


def test_the_alerts_name_reasons_and_outcomes_that_there_are() -> None:
    outcomes = {code.name.lower() for code in grpc.StatusCode} | {"cancelled"}
    reasons = {
        kind.reason
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.RequestError)
    }
    for rule in rules():
        for _, labels in selectors(rule["expr"]):
            assert set(labels.get("outcome", "ok").split("|")) <= outcomes | {"ok"}
            if "nv_" not in rule["expr"]:
                assert labels.get("reason", "QUEUE_FULL") in reasons


def test_every_alert_has_its_heading_in_the_runbook_and_links_to_it() -> None:
    headings = re.findall(r"^## (.+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert headings == [rule["alert"] for rule in rules()]
    for rule in rules():
        assert rule["annotations"]["runbook_url"].endswith(f"docs/runbook.md#{rule['alert'].lower()}")
        assert rule["annotations"]["summary"].endswith(".")
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["for"]


def test_an_alert_can_be_left_out() -> None:
    [rule] = charts.of_kind(charts.render(charts.values_of("monitoring")), "PrometheusRule")
    left = {each["alert"] for each in rule["spec"]["groups"][0]["rules"]}
    assert {each["alert"] for each in rules()} - left == {"SDServiceGpuMemoryFull"}


def test_the_panels_have_a_place_of_their_own_and_say_what_they_show() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(places)) == len(places)
    assert max(x for x, _ in places) < 24
    assert all(panel["description"] for panel in panels if panel["type"] != "row")


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rule_file(folder: Path) -> Path:
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "sd-service", "rules": rules()}]}))
    return path


@needs_promtool
def test_prometheus_reads_the_alerts(tmp_path: Path) -> None:
    assert f"{len(rules())} rules found" in promtool("check", "rules", rule_file(tmp_path))


@needs_promtool
def test_prometheus_reads_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    panels = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "5m")}
        for number, expression in enumerate(expressions())
    ]
    path = tmp_path / "panels.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": panels}]}))
    promtool("check", "rules", path)


# Alert -> series that fire it, and the same a little less, which do not. Values are those of each minute.
RELEASE = f'namespace="{charts.NAMESPACE}",job="{JOB}"'
FIRING: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "SDServiceDown": ({"up{R}": "0x30"}, {"up{R,pod='a'}": "0x30", "up{R,pod='b'}": "1x30"}),
    "SDServiceEngineNotReady": (
        {"sdserver_engine_ready{R,engine='e',pod='a'}": "0x30"},
        {"sdserver_engine_ready{R,engine='e',pod='a'}": "0x30", "sdserver_engine_ready{R,engine='e',pod='b'}": "1x30"},
    ),
    "SDServiceFailures": (
        {
            "sdserver_requests_total{R,outcome='ok'}": "0+97x30",
            "sdserver_requests_total{R,outcome='internal'}": "0+3x30",
        },
        {
            "sdserver_requests_total{R,outcome='ok'}": "0+300x30",
            "sdserver_requests_total{R,outcome='internal'}": "0+1x30",
            "sdserver_requests_total{R,outcome='cancelled'}": "0+100x30",
        },
    ),
    "SDServiceUnavailable": (
        {
            "sdserver_requests_total{R,outcome='ok'}": "0+9x30",
            "sdserver_requests_total{R,outcome='unavailable'}": "0+1x30",
        },
        {
            "sdserver_requests_total{R,outcome='ok'}": "0+99x30",
            "sdserver_requests_total{R,outcome='unavailable'}": "0+1x30",
        },
    ),
    "SDServiceQueueFull": (
        {"sdserver_refusals_total{R,reason='QUEUE_FULL'}": "0+1x30"},
        {"sdserver_refusals_total{R,reason='INVALID_REQUEST'}": "0+100x30"},
    ),
    "SDServiceQueueLong": (
        {"sdserver_queue_seconds{R,pod='a'}": "50x30", "sdserver_queue_seconds{R,pod='b'}": "20x30"},
        {"sdserver_queue_seconds{R,pod='a'}": "50x30", "sdserver_queue_seconds{R,pod='b'}": "0x30"},
    ),
    "SDServiceStepsSlow": (
        {
            "sdserver_step_seconds_sum{R,engine='e'}": "0+6x300 1806+18x30",
            "sdserver_step_seconds_count{R,engine='e'}": "0+60x331",
        },
        {
            "sdserver_step_seconds_sum{R,engine='e'}": "0+6x300 1806+9x30",
            "sdserver_step_seconds_count{R,engine='e'}": "0+60x331",
        },
    ),
    "SDServiceWorkWasted": (
        {"sdserver_rows_total{R,kind='useful'}": "0+7x60", "sdserver_rows_total{R,kind='wasted'}": "0+3x60"},
        {"sdserver_rows_total{R,kind='useful'}": "0+9x60", "sdserver_rows_total{R,kind='wasted'}": "0+1x60"},
    ),
    "SDServiceTritonBacklog": (
        {
            "nv_inference_pending_request_count{R,instance='a',model='u'}": "30x30",
            "nv_inference_pending_request_count{R,instance='b',model='u'}": "4x30",
        },
        {
            "nv_inference_pending_request_count{R,instance='a',model='u'}": "30x30",
            "nv_inference_pending_request_count{R,instance='b',model='u'}": "1x30",
        },
    ),
    "SDServiceTritonFailures": (
        {"nv_inference_request_failure{R,model='u',reason='BACKEND'}": "0+1x30"},
        {"nv_inference_request_failure{R,model='u',reason='CANCELED'}": "0+9x30"},
    ),
    "SDServiceGpuMemoryFull": (
        {"nv_gpu_memory_used_bytes{R,gpu_uuid='g'}": "98x30", "nv_gpu_memory_total_bytes{R,gpu_uuid='g'}": "100x30"},
        {"nv_gpu_memory_used_bytes{R,gpu_uuid='g'}": "96x30", "nv_gpu_memory_total_bytes{R,gpu_uuid='g'}": "100x30"},
    ),
}


def test_every_alert_has_a_case_that_fires_it_and_one_that_does_not() -> None:
    assert list(FIRING) == [rule["alert"] for rule in rules()]


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    tests = []
    for alert, cases in FIRING.items():
        for fires, series in zip((True, False), cases, strict=True):
            minutes = max(_minutes(values) for values in series.values()) - 1
            tests.append(
                {
                    "interval": "1m",
                    "input_series": [
                        {"series": name.replace("{R", f"{{{RELEASE}").replace("'", '"'), "values": values}
                        for name, values in series.items()
                    ],
                    "promql_expr_test": [
                        {
                            "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})',
                            "eval_time": f"{minutes}m",
                            "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
                        }
                    ],
                }
            )
    path = tmp_path / "tests.yaml"
    document = {"rule_files": [str(rule_file(tmp_path))], "evaluation_interval": "1m", "tests": tests}
    path.write_text(yaml.safe_dump(document))
    assert "SUCCESS" in promtool("test", "rules", path)


def _minutes(values: str) -> int:
    return sum(int(part.split("x")[1]) for part in values.split())

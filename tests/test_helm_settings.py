"""What the chart's containers are told is what the real programs understand, and what they say is what probes ask."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

import charts
import grpc
import pytest
from charts import VALUES, Object
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from sdclient.__main__ import _parser as client_parser
from sdserver import engine_command, triton_process
from sdserver.engine_families import KNOWN
from sdserver.server import Server
from sdserver.service import SERVICE
from sdserver.settings import ServeSettings, TritonSettings

if TYPE_CHECKING:
    from pathlib import Path

    from fakes import FakeBackend
    from sdserver.settings import Settings

COMMANDS: dict[str, type[Settings]] = {"serve": ServeSettings, "triton": TritonSettings}


def settings_of(container: Object, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings that `sdserver` reads in a container."""
    kind = COMMANDS[container["command"][1]]
    for name, value in charts.environment(container).items():
        monkeypatch.setenv(name, value)
    return kind()


def named(objects: list[Object], name: str) -> Object:
    [found] = [
        each for _, pod in charts.pod_templates(objects) for each in charts.containers(pod) if each["name"] == name
    ]
    return found


@pytest.mark.parametrize("name", VALUES)
def test_the_real_settings_read_every_container(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = charts.render(charts.values_of(name))
    for _, pod in charts.pod_templates(objects):
        for container in charts.containers(pod):
            if container["command"][0] != "sdserver" or container["command"][1] not in COMMANDS:
                continue
            assert "args" not in container
            settings = settings_of(container, monkeypatch)
            for variable in charts.environment(container):
                if variable.startswith("SDSERVER_"):
                    assert variable.removeprefix("SDSERVER_").lower() in type(settings).model_fields, variable


def test_values_arrive_as_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "server": {
            "maxActive": 100000,
            "maxQueued": 1000000,
            "maxGenerationSeconds": 99,
            "textCacheMb": 0,
            "settings": {"send_timeout_seconds": 12.5, "engine_watch_seconds": 1000000},
        },
        "engines": {"default": "123"},
    }
    settings = settings_of(named(charts.render(values), "server"), monkeypatch)
    assert isinstance(settings, ServeSettings)
    assert (settings.max_active, settings.max_queued, settings.max_generation_seconds) == (100000, 1000000, 99)
    assert (settings.text_cache_mb, settings.default_engine) == (0, "123")
    assert (settings.send_timeout_seconds, settings.engine_watch_seconds) == (12.5, 1000000)


@pytest.mark.parametrize(
    ("values", "parallel_calls"),
    [
        ({}, 1),
        ({"triton": {"replicas": 4}}, 4),
        ({"triton": {"replicas": 0}}, 1),
        ({"triton": {"replicas": 4, "placement": "sidecar"}}, 1),
        ({"triton": {"replicas": 9, "autoscaling": {"kind": "hpa", "minReplicas": 2, "maxReplicas": 8}}}, 2),
        ({"triton": {"replicas": 4}, "server": {"parallelCalls": 3}}, 3),
    ],
)
def test_a_server_keeps_as_many_gpus_busy_as_it_has_tritons(
    values: dict[str, Any], parallel_calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(named(charts.render(values), "server"), monkeypatch)
    assert isinstance(settings, ServeSettings)
    assert settings.parallel_calls == parallel_calls


def test_files_that_settings_name_are_files_of_a_mounted_secret() -> None:
    for name in VALUES:
        objects = charts.render(charts.values_of(name))
        for _, pod in charts.pod_templates(objects):
            volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
            for container in charts.containers(pod):
                files = {
                    f"{mount['mountPath']}/{item['path']}"
                    for mount in container.get("volumeMounts", [])
                    for source in (volumes[mount["name"]].get("secret", volumes[mount["name"]].get("configMap", {})),)
                    for item in source.get("items", [])
                }
                meant = {value for value in charts.environment(container).values() if value.startswith("/etc/")}
                meant |= {each.split("=")[1] for each in container.get("args", []) if "=/etc/" in each}
                assert meant <= files, (name, meant, files)


def test_the_ports_of_the_settings_are_those_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = charts.render({})
    server, triton = named(objects, "server"), named(objects, "triton")
    ports = {port["name"]: port["containerPort"] for each in (server, triton) for port in each["ports"]}
    serving, running = settings_of(server, monkeypatch), settings_of(triton, monkeypatch)
    assert isinstance(serving, ServeSettings)
    assert isinstance(running, TritonSettings)
    assert (serving.port, serving.health_port, serving.metrics_port) == (
        ports["grpc"],
        ports["health"],
        ports["metrics"],
    )
    assert running.triton_grpc_port == ports["triton-grpc"]
    assert running.triton_http_port == ports["triton-http"]
    assert running.triton_metrics_port == ports["triton-metrics"]
    # Other pods reach them.
    assert serving.host == serving.metrics_host == running.triton_host == "0.0.0.0"
    [service] = charts.of_kind(objects, "Service", "triton")
    assert serving.triton_url == f"{service['metadata']['name']}:{running.triton_grpc_port}"


def test_nothing_of_a_service_in_the_namespace_becomes_a_setting() -> None:
    # Kubernetes would otherwise set SDSERVER_PORT=tcp://... for a release of the name sdserver.
    for _, pod in charts.pod_templates(charts.render({}, name="sdserver")):
        assert pod["spec"]["enableServiceLinks"] is False


async def test_probes_ask_what_a_real_server_answers_on_its_health_port(
    settings: ServeSettings, backend: FakeBackend
) -> None:
    server = named(charts.render(charts.values_of("tls")), "server")
    live, ready = server["livenessProbe"]["grpc"], server["readinessProbe"]["grpc"]
    assert live.get("service", "") == ""
    assert ready["service"] == SERVICE
    async with (
        Server(settings.model_copy(update={"health_port": 0}), backend) as running,
        grpc.aio.insecure_channel(f"127.0.0.1:{running.health_port}") as channel,
    ):
        health: Any = health_pb2_grpc.HealthStub(channel)
        for probe in (live, ready):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=probe.get("service", "")))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_route_has_every_service_of_a_real_server(server: Server) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub_class: Any = reflection_pb2_grpc.ServerReflectionStub
        reflection = stub_class(channel)
        question = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        [answer] = [answer async for answer in reflection.ServerReflectionInfo(question)]
    [route] = charts.of_kind(charts.render(charts.values_of("grpcroute")), "GRPCRoute")
    routed = [match["method"]["service"] for match in route["spec"]["rules"][0]["matches"]]
    assert sorted(routed) == sorted(service.name for service in answer.list_services_response.service)


def test_a_sidecars_triton_is_there_for_its_server_alone_and_its_metrics_for_prometheus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objects = charts.render(charts.values_of("many-gpus"))
    triton = settings_of(named(objects, "triton"), monkeypatch)
    server = settings_of(named(objects, "server"), monkeypatch)
    assert isinstance(triton, TritonSettings)
    assert isinstance(server, ServeSettings)
    assert (triton.triton_host, triton.triton_metrics_host) == ("127.0.0.1", "0.0.0.0")
    assert server.triton_url == f"{triton.triton_host}:{triton.triton_grpc_port}"
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        command = named(objects, "triton")[probe]["exec"]["command"]
        assert command[:3] == ["python", "/opt/sd-service/healthcheck.py", "triton"]


def test_liveness_never_asks_triton_and_tritons_own_is_not_its_readiness() -> None:
    objects = charts.render({})
    assert named(objects, "server")["livenessProbe"]["grpc"] == {"port": 50052}
    assert named(objects, "triton")["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"


def test_triton_has_time_to_load_and_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = charts.render({"triton": {"startSeconds": 1000}})
    triton = named(objects, "triton")
    settings = settings_of(triton, monkeypatch)
    assert isinstance(settings, TritonSettings)
    probe = triton["startupProbe"]
    # sdserver gives up first, and says why.
    assert probe["periodSeconds"] * probe["failureThreshold"] > settings.triton_start_seconds == 1000
    [deployment] = charts.of_kind(objects, "Deployment", "triton")
    grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    stopping = 15 + triton_process.EXIT_MARGIN_SECONDS + triton_process.KILLED_SECONDS
    assert int(triton["lifecycle"]["preStop"]["exec"]["command"][1]) + stopping < grace


@pytest.mark.parametrize("name", ["engines-job", "sidecar-cpu", "one-gpu"])
def test_the_real_command_understands_what_the_job_adds(name: str) -> None:
    [job] = charts.of_kind(charts.render(charts.values_of(name)), "Job")
    parser = engine_command._parser()
    *adding, verifying = charts.containers(job["spec"]["template"])
    wanted = charts.values_of(name)["engines"]["add"]
    for container, engine in zip(adding, wanted, strict=True):
        assert container["command"] == ["sdserver", "engine", "add"]
        options = vars(parser.parse_args(["add", *container["args"]]))
        for key, value in engine.items():
            assert options[{"predictionType": "prediction_type"}.get(key, key)] == value
    assert verifying["command"] == ["sdserver", "engine", "verify"]


def test_the_examples_add_a_checkpoint_that_is_known() -> None:
    [engine] = charts.values_of("one-gpu")["engines"]["add"]
    assert engine["name"] == KNOWN[engine["source"]].engine_id


@pytest.mark.parametrize("name", [name for name in VALUES if name not in ("bare", "mutual-tls")])
def test_the_real_command_line_understands_the_helm_test(name: str) -> None:
    [pod] = charts.of_kind(charts.render(charts.values_of(name)), "Pod", "test")
    [container] = pod["spec"]["containers"]
    # The folder of the picture is there in the pod.
    arguments = [each.replace("/tmp/", "/") for each in container["args"]]
    options: Any = client_parser().parse_args([*container["command"][1:], *arguments])
    assert options.prompts == ["a lake at dusk"]
    assert bool(options.tls) == ("tls" in charts.values_of(name))


async def test_the_helm_test_generates_an_image_from_a_real_server(server: Server, tmp_path: Path) -> None:
    [pod] = charts.of_kind(charts.render({}), "Pod", "test")
    [container] = pod["spec"]["containers"]
    arguments = [each.replace("/tmp/", f"{tmp_path}/") for each in container["args"]]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sdclient", *container["command"][1:], *arguments),
        env={"SDCLIENT_SERVER": f"127.0.0.1:{server.port}"},
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0
    assert json.loads(output)
    assert (tmp_path / "image.png").read_bytes().startswith(b"\x89PNG")

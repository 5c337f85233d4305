"""The containers of a release, run on this machine as their manifests say, generate an image together.

Each is the command, the arguments and the variables that Kubernetes would start; ports and folders are this machine's.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import urlopen

import charts
import grpc
import pytest
from charts import Object
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sdserver.triton_process import why_not

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import Callable

    from sdserver.settings import ServeSettings

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.skipif("CHECK_HELM" not in os.environ, reason="`make check-helm` runs it: it starts Triton twice"),
    pytest.mark.timeout(400),
]
# Where NVIDIA's or Docker's Linux has them, and where this machine does.
BIN = Path(sys.executable).parent
STARTING_SECONDS = 240


class Node:
    """Runs containers of a release one by one, in a network where each port of the manifests is a free one of here."""

    def __init__(self, objects: list[Object], models: Path, folder: Path) -> None:
        self._objects = objects
        self._folder = folder
        self._moved = {"/models": str(models), "0.0.0.0": "127.0.0.1"}
        self.ports = {port: _free_port() for port in ("8000", "8001", "8002", "9464", "50051", "50052")}

    def container(self, name: str) -> Object:
        """By its name."""
        everything = [each for _, pod in charts.pod_templates(self._objects) for each in charts.containers(pod)]
        [found] = [each for each in everything if each["name"] == name]
        return found

    async def start(self, name: str) -> Process:
        container = self.container(name)
        variables = {key: self._here(value) for key, value in charts.environment(container).items()}
        command = [*container["command"], *(self._here(each) for each in container.get("args", []))]
        with (self._folder / f"{name}.log").open("wb") as log:
            return await asyncio.create_subprocess_exec(
                *(str(BIN / command[0]), *command[1:]),
                env={"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(self._folder), **variables},
                cwd=self._folder,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
            )

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def _here(self, value: str) -> str:
        if value in self.ports:
            return self.ports[value]
        host, _, port = value.rpartition(":")
        if port in self.ports and host:
            return f"127.0.0.1:{self.ports[port]}"
        for there, here in self._moved.items():
            value = value.replace(there, here)
        return value.replace("/tmp/", f"{self._folder}/") if value.startswith("--") else value


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


async def until(process: Process, ready: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + STARTING_SECONDS
    while not await asyncio.to_thread(ready):
        assert process.returncode is None, what()
        assert time.monotonic() < deadline, what()
        await asyncio.sleep(0.3)


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, TimeoutError, ConnectionError):
        return False


def serves(port: str, probe: Object) -> bool:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        request = health_pb2.HealthCheckRequest(service=probe["grpc"].get("service", ""))
        try:
            health: Any = health_pb2_grpc.HealthStub(channel)
            answer = health.Check(request, timeout=5)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def stopped(process: Process, seconds: float) -> int:
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
    return await asyncio.wait_for(process.wait(), seconds)


@pytest.mark.parametrize("placement", ["separate", "sidecar"])
async def test_the_containers_of_a_release_generate_an_image_and_stop_in_order(
    placement: str, settings: ServeSettings, tmp_path: Path
) -> None:
    objects = charts.render({"triton": {"placement": placement, "preStopSeconds": 0}, "server": {"preStopSeconds": 0}})
    node = Node(objects, settings.model_repository, tmp_path)

    verifying = await node.start("verify-engines")
    assert await asyncio.wait_for(verifying.wait(), 60) == 0, node.log("verify-engines")
    assert "whole" in node.log("verify-engines")

    triton = await node.start("triton")
    running = [triton]
    try:
        probe = node.container("triton")["startupProbe"]
        path = probe["httpGet"]["path"] if "httpGet" in probe else "/v2/health/ready"
        await until(triton, lambda: answers(f"http://127.0.0.1:{node.ports['8000']}{path}"), lambda: node.log("triton"))
        if "httpGet" in probe:
            # As kubelet asks for its readiness: Triton answers for any name, and for none.
            assert serves(node.ports["8001"], node.container("triton")["readinessProbe"])
        server = await node.start("server")
        running.append(server)
        readiness = node.container("server")["readinessProbe"]
        await until(server, lambda: serves(node.ports["50052"], readiness), lambda: node.log("server"))
        assert answers(f"http://127.0.0.1:{node.ports['9464']}/metrics")
        assert answers(f"http://127.0.0.1:{node.ports['8002']}/metrics")

        testing = await node.start("generate")
        assert await asyncio.wait_for(testing.wait(), 120) == 0, node.log("generate")
        assert (tmp_path / "image.png").read_bytes().startswith(b"\x89PNG")
        # In one pod, tensors need no gRPC.
        shares_not = "does not share memory" in node.log("server")
        assert not (placement == "sidecar" and shares_not), node.log("server")

        grace = {
            each["metadata"]["labels"]["app.kubernetes.io/component"]: pod["spec"].get("terminationGracePeriodSeconds")
            for each, pod in charts.pod_templates(objects)
        }
        assert await stopped(server, grace["server"]) == 0
        assert await stopped(triton, grace.get("triton", 30)) == 0
    finally:
        for process in running:
            await stopped(process, 60)

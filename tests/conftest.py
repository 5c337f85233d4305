from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING

# Before anything imports torch: its threads would otherwise spin at each barrier and starve Triton of the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The same bytes on every machine: what the tests compare was made on CPUs.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# OpenVINO tells its makers where it is imported: not from here.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
# A shell that starts the tests in the background makes them, and what they start, deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

import grpc
import hypothesis
import pytest
from fakes import FakeBackend
from sdapi.v1.generation_pb2_grpc import GenerationServiceStub
from sdmodels.cores import physical_cores
from sdserver.engines import Catalog, load_catalog
from sdserver.server import Server
from sdserver.settings import ServeSettings
from sdserver.triton_process import TritonProcess, why_not

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from sdapi.v1.generation_pb2_grpc import GenerationServiceAsyncStub


# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _torch_threads() -> None:
    """Each test computes on as many threads as the models in Triton, whatever the one before it chose: on others,
    sums round otherwise."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(physical_cores())


@pytest.fixture(scope="session")
def settings() -> ServeSettings:
    """The shipped model repository, a free port on loopback, quick looks at the models."""
    return ServeSettings(port=0, health_interval_seconds=0.05, drain_seconds=5.0)


@pytest.fixture(scope="session")
def catalog(settings: ServeSettings) -> Catalog:
    return load_catalog(settings.model_repository)


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def server(settings: ServeSettings, backend: FakeBackend) -> AsyncIterator[Server]:
    """A real gRPC server over a backend without weights."""
    async with Server(settings, backend) as server:
        yield server


@pytest.fixture
async def stub(server: Server) -> AsyncIterator[GenerationServiceAsyncStub]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield GenerationServiceStub(channel)


@pytest.fixture(scope="session")
def triton(settings: ServeSettings, catalog: Catalog) -> Iterator[TritonProcess]:
    """A real Triton with the shipped engine, for the whole session."""
    if reason := why_not():
        pytest.skip(reason)
    models = [model for engine in catalog for model in engine.models]
    process = TritonProcess(settings.model_repository, models, grpc_port=0, http_port=0, metrics_port=0)
    with asyncio.Runner() as runner:
        yield runner.run(process.__aenter__())
        runner.run(process.__aexit__())


@pytest.fixture
def triton_settings(settings: ServeSettings, triton: TritonProcess) -> ServeSettings:
    """A server over the real Triton."""
    return settings.model_copy(update={"triton_url": f"127.0.0.1:{triton.grpc_port}"})

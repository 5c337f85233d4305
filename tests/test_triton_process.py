"""Triton starts, answers like the models, says what is wrong, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
from sdmodels.cores import physical_cores
from sdmodels.precision import decoder_precision
from sdmodels.runtimes import load_unet
from sdmodels.text_encoder import TextEncoder
from sdmodels.vae import VaeDecoder
from sdserver.triton_process import Host, TritonProcess, TritonProcessError, why_not
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from numpy.typing import NDArray

MODEL_REPOSITORY = Path(__file__).parents[1] / "model_repository"
ENGINE = "tiny-landscape"
ENGINE_FOLDER = MODEL_REPOSITORY / "engines" / ENGINE

needs_triton = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

CONFIG = """
backend: "python"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ 1 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 1 ] } ]
instance_group [ { kind: KIND_CPU } ]
"""
# `y` is `x`; an `x` above 0 takes so many seconds.
ECHO = """
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        {initialize}

    def execute(self, requests):
        return [self.answer(pb_utils.get_input_tensor_by_name(request, "x").as_numpy()) for request in requests]

    def answer(self, x):
        time.sleep(max(0, float(x[0, 0])))
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", x)])
"""


async def infer(client: InferenceServerClient, model: str, output: str, **inputs: NDArray[Any]) -> NDArray[Any]:
    tensors = []
    for name, array in inputs.items():
        tensor = InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    answer: NDArray[Any] = (await client.infer(model, tensors)).as_numpy(output)
    return answer


async def echo(client: InferenceServerClient, seconds: float = 0) -> float:
    return float((await infer(client, "echo", "y", x=np.array([[seconds]], np.float32)))[0, 0])


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """`echo`, `slow`, which takes a minute to load, and `broken`, which cannot be loaded."""
    initializations = {"echo": "pass", "slow": "time.sleep(60)", "broken": "raise RuntimeError('no weights here')"}
    for name, initialize in initializations.items():
        folder = tmp_path / "repository" / name
        (folder / "1").mkdir(parents=True)
        (folder / "config.pbtxt").write_text(CONFIG)
        (folder / "1/model.py").write_text(ECHO.format(initialize=initialize))
    return tmp_path / "repository"


def echo_triton(repository: Path, *models: str, **options: Any) -> TritonProcess:
    return TritonProcess(repository, models or ["echo"], grpc_port=0, http_port=0, metrics_port=0, **options)


def http_status(url: str, method: str = "GET") -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method)) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def listening(triton: TritonProcess) -> set[tuple[str, int]]:
    """Addresses and ports that Triton listens on: gRPC is there before the others."""
    connections = psutil.Process(triton.pid).net_connections()
    return {(each.laddr.ip, each.laddr.port) for each in connections if each.status == psutil.CONN_LISTEN}


def callers(triton: TritonProcess) -> set[tuple[str, int]]:
    """Whose connections Triton's gRPC has."""
    connections = psutil.Process(triton.pid).net_connections()
    return {
        each.raddr
        for each in connections
        if each.laddr.port == triton.grpc_port and each.status == psutil.CONN_ESTABLISHED
    }


class Traces:
    """The processes, shared memory and folder of a Triton."""

    def __init__(self, triton: TritonProcess) -> None:
        server = psutil.Process(triton.pid)
        children = [each for each in server.children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE]
        self.processes = [server, *children]
        maps = {Path(each.path) for process in self.processes for each in process.memory_maps()}
        self.regions = {path for path in maps if path.is_relative_to("/dev/shm")}
        self.folder = Path(server.cwd())

    def left(self) -> list[str]:
        """What of them still exists."""
        processes = [each for each in self.processes if resident(each)]
        paths = [path for path in (*self.regions, self.folder) if path.exists()]
        return [str(each) for each in (*processes, *paths)]


def resident(process: psutil.Process) -> bool:
    """Whether the process holds memory. One that has ended may stay in the table until init looks at it."""
    try:
        return bool(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return False


async def traces_of_loading(triton: TritonProcess) -> Traces:
    """The traces of a Triton that is being entered, once it has a process for its model."""
    async with asyncio.timeout(30):
        while True:
            # A process may end between being listed and being looked at.
            with contextlib.suppress(TritonProcessError, psutil.NoSuchProcess):
                traces = Traces(triton)
                if traces.regions:
                    return traces
            await asyncio.sleep(0.05)


@pytest.fixture
async def client(triton: TritonProcess) -> AsyncIterator[InferenceServerClient]:
    """A client of the Triton with the shipped engine."""
    client = InferenceServerClient(f"127.0.0.1:{triton.grpc_port}")
    yield client
    await client.close()


@contextlib.asynccontextmanager
async def client_of(triton: TritonProcess) -> AsyncIterator[InferenceServerClient]:
    client = InferenceServerClient(f"127.0.0.1:{triton.grpc_port}")
    try:
        yield client
    finally:
        await client.close()


# The shipped models


async def test_the_text_encoder_answers_as_without_triton(client: InferenceServerClient) -> None:
    encode = TextEncoder(ENGINE_FOLDER)
    texts: list[tuple[str, list[tuple[int, int, float]]]] = [
        ("a lake at dusk", []),
        ("", []),
        ("Bäume, 木 und Sterne", [(0, 5, 1.5), (7, 8, 0.0)]),
        ("trees, " * 60, [(0, 2, 3.0)]),
    ]
    for text, emphasis in texts:
        inputs = {
            "text": np.array([[text.encode()]], object),
            "emphasis_range": np.array([part[:2] for part in emphasis], np.int32).reshape(1, -1, 2),
            "emphasis_factor": np.array([[factor for *_, factor in emphasis]], np.float32),
        }
        states, tokens, chunks, features = encode(text, emphasis)
        model = f"{ENGINE}.text_encoder"
        answer = await infer(client, model, "text_states", **inputs)
        np.testing.assert_allclose(answer, states[None], atol=5e-6)
        assert (await infer(client, model, "token_count", **inputs)).tolist() == [[tokens]]
        assert (await infer(client, model, "chunk_count", **inputs)).tolist() == [[chunks]]
        assert features is not None
        np.testing.assert_allclose(await infer(client, model, "text_features", **inputs), features[None], atol=5e-6)


async def test_the_unet_answers_as_without_triton(client: InferenceServerClient) -> None:
    rng = np.random.default_rng(3)
    latents, text_states = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 4, 16, 24), (3, 77, 128)))
    timestep = np.array([[999], [500.5], [0]], np.float32)
    prediction = await infer(
        client, f"{ENGINE}.unet", "prediction", latents=latents, timestep=timestep, text_states=text_states
    )
    expected = load_unet(ENGINE_FOLDER, physical_cores())(latents, timestep[:, 0], text_states)
    np.testing.assert_allclose(prediction, expected, atol=1e-5)


async def test_the_vae_decoder_answers_as_without_triton(client: InferenceServerClient) -> None:
    latents = np.random.default_rng(4).standard_normal((2, 4, 16, 24)).astype(np.float32)
    image = await infer(client, f"{ENGINE}.vae_decoder", "image", latents=latents)
    expected = VaeDecoder(ENGINE_FOLDER, precision=decoder_precision(None))(latents)
    assert image.shape == (2, 128, 192, 3)
    difference = image.astype(int) - expected
    if decoder_precision(None) == "fp32":
        assert np.abs(difference).max() <= 1
    # In bf16 sums over other numbers of threads round to other last digits; 50 dB.
    assert np.square(difference).mean() < 255**2 / 10**5


async def test_a_bad_request_is_named_and_hurts_no_other(client: InferenceServerClient) -> None:
    good = np.zeros((1, 4, 16, 16), np.float32)
    model = f"{ENGINE}.vae_decoder"
    calls = [infer(client, model, "image", latents=latents) for latents in (good, good * np.nan, good)]
    first, second, third = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(second, InferenceServerException)
    assert second.status() == "StatusCode.INVALID_ARGUMENT"
    assert "NaN" in second.message()
    assert "/" not in second.message()
    assert isinstance(first, np.ndarray)
    assert isinstance(third, np.ndarray)
    np.testing.assert_array_equal(first, third)


async def test_text_that_is_no_utf8_is_refused(client: InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="not valid UTF-8"):
        await infer(
            client,
            f"{ENGINE}.text_encoder",
            "text_states",
            text=np.array([[b"\xff"]], object),
            emphasis_range=np.zeros((1, 0, 2), np.int32),
            emphasis_factor=np.zeros((1, 0), np.float32),
        )


async def test_rows_that_wait_for_the_unet_run_together(client: InferenceServerClient) -> None:
    async def executions() -> int:
        statistics = await client.get_inference_statistics(f"{ENGINE}.unet")
        return int(statistics.model_stats[0].execution_count)

    before = await executions()
    row = {
        "latents": np.zeros((1, 4, 32, 32), np.float32),
        "timestep": np.zeros((1, 1), np.float32),
        "text_states": np.zeros((1, 77, 128), np.float32),
    }
    await asyncio.gather(*(infer(client, f"{ENGINE}.unet", "prediction", **row) for _ in range(8)))
    # Triton counts a call after it has answered it.
    async with asyncio.timeout(10):
        while await executions() == before:
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.2)
    assert await executions() - before < 8


# Start and stop


@needs_triton
async def test_two_run_at_the_same_time_and_stopping_leaves_nothing(repository: Path) -> None:
    async with echo_triton(repository) as first:
        async with echo_triton(repository) as second, client_of(first) as one, client_of(second) as other:
            assert first.grpc_port != second.grpc_port
            assert list(await asyncio.gather(echo(one, -1), echo(other, -2))) == [-1, -2]
            traces = Traces(second)
            assert len(traces.processes) == 2
            assert traces.regions
        assert traces.left() == []
        async with client_of(first) as one:
            assert await echo(one, -3) == -3
        traces = Traces(first)
    assert traces.left() == []


@needs_triton
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_all_its_ports_listen_on_the_host_and_on_no_other(repository: Path, host: str) -> None:
    async with echo_triton(repository, host=host) as triton:
        ports = {triton.grpc_port, triton.http_port, triton.metrics_port}
        # gRPC is there first, and ready.
        async with asyncio.timeout(20):
            while {port for _, port in listening(triton)} != ports:
                await asyncio.sleep(0.1)
        # gRPC says the same addresses as those of IPv6.
        spoken = {"::": "0.0.0.0", "::ffff:127.0.0.1": "127.0.0.1"}
        assert {spoken.get(ip, ip) for ip, _ in listening(triton)} == {host}
        assert triton.address == "127.0.0.1"


@needs_triton
async def test_what_triton_logs_can_be_followed_until_it_ends(repository: Path) -> None:
    async with echo_triton(repository) as triton, client_of(triton) as client:
        lines: list[str] = []
        # It is ready before it has said its last words of the start.
        await asyncio.sleep(1)
        following = asyncio.create_task(triton.follow_log(lines.append))
        await asyncio.sleep(0.5)
        # What was said before is not said again.
        assert lines == []
        await client.unload_model("echo")
        await client.load_model("echo")
        async with asyncio.timeout(20):
            while not any("successfully loaded 'echo'" in line for line in lines):
                await asyncio.sleep(0.1)
        psutil.Process(triton.pid).kill()
        await asyncio.wait_for(following, 10)
        assert all(line and "\n" not in line for line in lines)


@needs_triton
async def test_the_metrics_may_listen_elsewhere_than_the_rest(repository: Path) -> None:
    async with echo_triton(repository, metrics_host="127.0.0.2") as triton:
        async with asyncio.timeout(20):
            while ("127.0.0.2", triton.metrics_port) not in listening(triton):
                await asyncio.sleep(0.1)
        assert await asyncio.to_thread(http_status, f"http://127.0.0.2:{triton.metrics_port}/metrics") == 200
        assert {port for ip, port in listening(triton) if ip.endswith("127.0.0.2")} == {triton.metrics_port}


@needs_triton
async def test_others_of_the_network_get_only_what_the_server_needs(repository: Path) -> None:
    async with echo_triton(repository, host="0.0.0.0") as triton, client_of(triton) as client:
        assert await echo(client, -1) == -1
        await client.load_model("echo")
        for refused in (
            client.get_log_settings(),
            client.get_trace_settings(),
            client.get_system_shared_memory_status(),
        ):
            with pytest.raises(InferenceServerException, match="restricted"):
                await refused
        web = f"http://127.0.0.1:{triton.http_port}/v2"
        async with asyncio.timeout(20):
            while triton.http_port not in {port for _, port in listening(triton)}:
                await asyncio.sleep(0.1)
        assert await asyncio.to_thread(http_status, f"{web}/health/ready") == 200
        assert await asyncio.to_thread(http_status, f"{web}/repository/index", method="POST") == 403
        assert await asyncio.to_thread(http_status, f"{web}/models/echo/infer", method="POST") == 403


@needs_triton
async def test_a_connection_of_its_age_is_closed_after_its_calls(repository: Path) -> None:
    async with echo_triton(repository, max_connection_age_seconds=0.5) as triton, client_of(triton) as client:
        assert await echo(client, 2) == 2
        assert await echo(client, -1) == -1
        before = callers(triton)
        await asyncio.sleep(2)
        assert await echo(client, -1) == -1
        assert not before & callers(triton)


@needs_triton
async def test_a_request_in_flight_is_answered_before_triton_stops(repository: Path) -> None:
    triton = echo_triton(repository)
    async with triton, client_of(triton) as client:
        request = asyncio.create_task(echo(client, 1.5))
        await asyncio.sleep(0.5)
        await triton.__aexit__()
        assert await request == 1.5


@needs_triton
async def test_what_hangs_is_killed(repository: Path) -> None:
    async with echo_triton(repository, exit_seconds=1) as triton, client_of(triton) as client:
        traces = Traces(triton)
        request = asyncio.create_task(echo(client, 600))
        await asyncio.sleep(0.5)
        started = time.monotonic()
        await triton.__aexit__()
        assert time.monotonic() - started < 15
        assert traces.left() == []
        with pytest.raises(InferenceServerException):
            await request


@needs_triton
async def test_a_killed_triton_is_noticed_and_leaves_nothing(repository: Path) -> None:
    async with echo_triton(repository) as triton:
        traces = Traces(triton)
        waiting = asyncio.create_task(triton.wait())
        for process in reversed(traces.processes):
            process.kill()
        assert await asyncio.wait_for(waiting, 10) == -signal.SIGKILL
        assert "Started GRPCInferenceService" in triton.log_tail()
    assert traces.left() == []
    assert "Started GRPCInferenceService" in triton.log_tail()


@needs_triton
async def test_triton_ends_when_the_process_that_started_it_is_killed(repository: Path, tmp_path: Path) -> None:
    code = f"""
import asyncio, pathlib
from sdserver.triton_process import TritonProcess
async def main():
    repository = pathlib.Path({str(repository)!r})
    async with TritonProcess(repository, ["echo"], grpc_port=0, http_port=0, metrics_port=0) as triton:
        print(triton.pid, flush=True)
        await triton.wait()
asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        # Killed, it cannot remove its folder.
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert parent.stdout is not None
    async for line in parent.stdout:
        if line.strip().isdigit():
            break
    server = psutil.Process(int(line))
    processes = [server, *server.children()]
    regions = {Path(each.path) for each in processes[1].memory_maps() if each.path.startswith("/dev/shm")}
    assert regions
    parent.kill()
    await parent.wait()
    async with asyncio.timeout(20):
        while any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in processes):
            await asyncio.sleep(0.1)
    assert not any(region.exists() for region in regions)


@needs_triton
async def test_progress_names_each_model(repository: Path) -> None:
    lines: list[str] = []
    async with echo_triton(repository, on_progress=lines.append):
        pass
    assert lines[0] == "Triton loads echo"
    assert lines[-1].startswith("Triton is ready after ")


@needs_triton
async def test_a_model_that_cannot_be_loaded_is_named_with_the_end_of_tritons_log(repository: Path) -> None:
    with pytest.raises(TritonProcessError) as caught:
        await echo_triton(repository, "echo", "broken").__aenter__()
    assert "load failed for model 'broken'" in str(caught.value)
    assert "RuntimeError: no weights here" in str(caught.value)


@needs_triton
async def test_an_unknown_model_is_named(repository: Path) -> None:
    with pytest.raises(TritonProcessError, match="failed to poll model 'nothing'"):
        await echo_triton(repository, "nothing").__aenter__()


@needs_triton
async def test_a_start_that_takes_too_long_is_given_up(repository: Path) -> None:
    triton = echo_triton(repository, "slow", start_seconds=6)
    start = asyncio.create_task(triton.__aenter__())
    traces = await traces_of_loading(triton)
    with pytest.raises(TritonProcessError, match="not ready after 6 s"):
        await start
    assert traces.left() == []


@needs_triton
async def test_a_cancelled_start_leaves_nothing(repository: Path) -> None:
    triton = echo_triton(repository, "slow")
    start = asyncio.create_task(triton.__aenter__())
    traces = await traces_of_loading(triton)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert traces.left() == []


@needs_triton
async def test_a_port_in_use_is_named_at_once(repository: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(TritonProcessError, match=f"port {port} is in use"):
            await TritonProcess(repository, ["echo"], grpc_port=port, http_port=0, metrics_port=0).__aenter__()


@needs_triton
async def test_another_tritonserver_is_run_as_it_is(repository: Path) -> None:
    wheel = Host.this().wheel
    assert wheel is not None
    # Without the folder of its backends it has none, and loads no model.
    async with TritonProcess(
        *(repository, []), grpc_port=0, http_port=0, metrics_port=0, executable=wheel / "bin/tritonserver"
    ) as triton:
        command = psutil.Process(triton.pid).cmdline()
    assert command[0] == str(wheel / "bin/tritonserver")
    assert not any(option.startswith("--backend-directory") for option in command)


# What the server's client counts on


@needs_triton
async def test_a_model_whose_process_was_killed_answers_again_after_unload_and_load(repository: Path) -> None:
    async with echo_triton(repository) as triton, client_of(triton) as client:
        _, stub = Traces(triton).processes
        stub.kill()
        with pytest.raises(InferenceServerException, match="Stub process 'echo_0_0' is not healthy") as caught:
            await echo(client)
        assert caught.value.status() == "StatusCode.INTERNAL"
        assert await client.is_model_ready("echo")
        await client.unload_model("echo")
        with pytest.raises(InferenceServerException, match="has no available versions") as caught:
            await echo(client)
        assert caught.value.status() == "StatusCode.NOT_FOUND"
        await client.load_model("echo")
        assert await echo(client, -1) == -1
        traces = Traces(triton)
    assert traces.left() == []


# Where it runs

GOOD = Host(
    system="Linux",
    machine="x86_64",
    glibc=(2, 35),
    python=(3, 11),
    wheel=Path("wheel"),
    stub=Path("stub"),
    libpython=Path("libpython"),
    numpy="1.26.4",
)


@pytest.mark.parametrize(
    ("host", "words"),
    [
        (replace(GOOD, system="Darwin", machine="arm64"), "x86-64 Linux only, and this is Darwin on arm64"),
        (replace(GOOD, machine="aarch64"), "x86-64 Linux only, and this is Linux on aarch64"),
        (replace(GOOD, glibc=(2, 31)), "glibc 2.35 or newer, and this system has glibc 2.31"),
        (replace(GOOD, glibc=None), "glibc 2.35 or newer, and this system has another C library"),
        (replace(GOOD, wheel=None, stub=None), "pip install 'sd-service[triton]'"),
        (replace(GOOD, python=(3, 14), stub=None), "no Python backend for Python 3.14"),
        (replace(GOOD, libpython=None), "apt-get install libpython3.11"),
        (replace(GOOD, numpy="2.1.0"), "numpy 2.1.0 gives empty answers there: pip install 'numpy<2'"),
        (replace(GOOD, numpy=None), "numpy is missing: pip install 'numpy<2'"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(host: Host, words: str) -> None:
    sentence = why_not(host)
    assert sentence is not None
    assert words in sentence
    assert "\n" not in sentence


def test_nothing_is_missing_where_it_runs() -> None:
    assert why_not(GOOD) is None

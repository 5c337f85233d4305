"""`sdserver` as an operator starts it: usage, settings, one process after another, an orderly end."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from sdclient import AsyncClient
from sdserver.__main__ import LEAST_UPTIME_SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sdserver.engines import Catalog
    from sdserver.settings import ServeSettings

# Some of these tests start two Tritons, each with a process for every model, beside other tests.
pytestmark = pytest.mark.timeout(900)
START_SECONDS = 250

FREE_PORTS = ["--port=0", "--triton-grpc-port=0", "--triton-http-port=0", "--triton-metrics-port=0"]


class Command:
    """A running `sdserver` and the JSON lines of its log."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []

    async def logged(self, event: str) -> dict[str, object]:
        """Waits for a log line with this event."""
        assert self.process.stderr is not None
        async with asyncio.timeout(START_SECONDS):
            while line := await self.process.stderr.readline():
                self.lines.append(line.decode())
                if line.startswith(b"{") and json.loads(line)["event"] == event:
                    return dict(json.loads(line))
        raise AssertionError("".join(self.lines))

    async def ended(self) -> int:
        """Waits for the end; returns the exit status."""
        _, rest = await asyncio.wait_for(self.process.communicate(), 60)
        self.lines += rest.decode().splitlines(keepends=True)
        assert self.process.returncode is not None
        return self.process.returncode

    async def stopped(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return await self.ended()


@asynccontextmanager
async def running(*arguments: str) -> AsyncIterator[Command]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sdserver", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield Command(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["nope"], 2), (["--help"], 0), (["serve", "--help"], 0)])
async def test_usage_is_shown_where_it_is_asked_for_or_needed(arguments: list[str], status: int) -> None:
    async with running(*arguments) as command:
        output, errors = await command.process.communicate()
        assert command.process.returncode == status
        assert b"usage: sdserver" in (output if status == 0 else errors)


async def test_a_wrong_setting_is_one_clear_message(tmp_path: Path) -> None:
    for arguments, expected in (
        (["--max-active=0"], "max_active"),
        ([f"--model-repository={tmp_path}"], "SDSERVER_MODEL_REPOSITORY"),
        (["--default-engine=nope"], "tiny-landscape"),
    ):
        async with running("serve", "--port=0", *arguments) as command:
            assert await command.ended() != 0
            assert expected in "".join(command.lines)
            assert "Traceback" not in "".join(command.lines)


async def test_a_port_that_is_taken_is_one_clear_message() -> None:
    async with running("serve", "--port=0", "--triton-url=127.0.0.1:1") as first:
        port = (await first.logged("serving"))["port"]
        async with running("serve", f"--port={port}") as second:
            assert await second.ended() == 1
            assert f"cannot listen on 127.0.0.1:{port}" in "".join(second.lines)
        assert await first.stopped() == 0


async def test_serve_generates_without_torch_in_its_memory(triton_settings: ServeSettings) -> None:
    async with running("serve", "--port=0", f"--triton-url={triton_settings.triton_url}") as command:
        port = (await command.logged("serving"))["port"]
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            assert await client.generate("a lake", steps=2)
        files = {Path(mapped.path).name for mapped in psutil.Process(command.process.pid).memory_maps()}
        assert not [name for name in files if re.match(r"libtorch|libc10", name)]
        assert await command.stopped() == 0


async def until_ready(client: AsyncClient) -> None:
    async with asyncio.timeout(START_SECONDS):
        while not (await client.engines())[0].ready:
            await asyncio.sleep(0.1)


async def test_up_starts_both_starts_triton_again_when_it_dies_and_leaves_nothing_behind(catalog: Catalog) -> None:
    async with running("up", *FREE_PORTS) as command:
        port = (await command.logged("serving"))["port"]
        server = psutil.Process(command.process.pid)
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            await until_ready(client)
            assert await client.generate("a lake", steps=2)
            first = server.children(recursive=True)
            assert len(first) == 1 + len(catalog.default.models), "Triton and one process for each model"
            # One that dies sooner than this is not worth another start.
            await asyncio.sleep(LEAST_UPTIME_SECONDS)
            server.children()[0].kill()
            await command.logged("Triton ended by itself and is started again")
            await command.logged("engine is ready")
            assert await client.generate("a lake", steps=2)
            second = server.children(recursive=True)
        assert await command.stopped() == 0
    assert not [process for process in (*first, *second) if process.is_running()]


async def test_triton_alone_serves_the_models_and_stops_in_order() -> None:
    async with running("triton", *FREE_PORTS[1:]) as command:
        ready = ""
        while "Triton is ready" not in ready:
            assert command.process.stderr is not None
            line = await asyncio.wait_for(command.process.stderr.readline(), START_SECONDS)
            assert line, "".join(command.lines)
            ready = json.loads(line)["event"]
        url = f"127.0.0.1:{ready.split()[-1]}"
        family = psutil.Process(command.process.pid).children(recursive=True)
        async with running("serve", "--port=0", f"--triton-url={url}") as server:
            port = (await server.logged("serving"))["port"]
            async with AsyncClient(f"127.0.0.1:{port}") as client:
                assert await client.generate("a lake", steps=2)
        assert await command.stopped() == 0
    assert not [process for process in family if process.is_running()]


async def test_a_triton_that_dies_at_once_ends_up_with_its_log() -> None:
    async with running("up", *FREE_PORTS) as command:
        await command.logged("serving")
        psutil.Process(command.process.pid).children()[0].kill()
        assert await command.ended() == 1
        assert "Triton ended by itself; the end of its log:" in "".join(command.lines)


async def test_a_server_that_runs_the_models_itself_makes_the_same_picture(triton_settings: ServeSettings) -> None:
    async with (
        running("up", "--port=0", "--backend=in-process") as alone,
        running("serve", "--port=0", f"--triton-url={triton_settings.triton_url}") as over_triton,
    ):
        pictures = []
        for command in (alone, over_triton):
            port = (await command.logged("serving"))["port"]
            async with AsyncClient(f"127.0.0.1:{port}") as client:
                await until_ready(client)
                pictures += await client.generate("a lake at sunset", steps=4, seed=0)
            assert await command.stopped() == 0
        first, second = (picture.to_pil().tobytes() for picture in pictures)
        assert max(abs(a - b) for a, b in zip(first, second, strict=True)) <= 1

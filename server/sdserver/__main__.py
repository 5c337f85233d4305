"""`sdserver up | serve | triton`: a Triton Inference Server for this machine, the gRPC server, or both."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

import structlog
from pydantic_settings import CliApp

from sdserver import logs
from sdserver.engines import EngineError, load_catalog
from sdserver.server import Server, ServerError
from sdserver.settings import ServeSettings, TritonSettings, UpSettings
from sdserver.triton_process import TritonProcess, TritonProcessError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

log = structlog.get_logger()

USAGE = """\
usage: sdserver COMMAND [--help] [flags]

  up       start a Triton Inference Server on this machine, and the gRPC server
  serve    start the gRPC server; Triton runs already, at --triton-url
  triton   start a Triton Inference Server on this machine

Every flag is an environment variable, too: --max-active is SDSERVER_MAX_ACTIVE."""

# A Triton that ends sooner than this after its start would end again: it is not started once more.
LEAST_UPTIME_SECONDS = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command until it is told to stop by SIGINT or SIGTERM; returns the exit status."""
    command, *flags = (sys.argv[1:] if arguments is None else arguments) or [""]
    if command in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    # argparse, which pydantic-settings uses, takes the program's name from here.
    sys.argv[0] = f"sdserver {command}"
    match command:
        case "up":
            return _run(up, CliApp.run(UpSettings, cli_args=flags))
        case "serve":
            return _run(serve, CliApp.run(ServeSettings, cli_args=flags))
        case "triton":
            return _run(triton, CliApp.run(TritonSettings, cli_args=flags))
    print(USAGE, file=sys.stderr)
    return 2


async def serve(settings: ServeSettings) -> None:
    """Runs the gRPC server until it is cancelled."""
    async with Server(settings):
        await asyncio.Event().wait()


async def triton(settings: TritonSettings) -> None:
    """Runs Triton until it is cancelled. Raises TritonProcessError if it ends by itself."""
    async with _triton(settings) as process:
        await process.wait()
        raise TritonProcessError(f"Triton ended by itself; the end of its log:\n{process.log_tail()}")


async def up(settings: UpSettings) -> None:
    """Runs Triton and the gRPC server until it is cancelled; a Triton that ends is started again."""
    process = _triton(settings)
    await process.__aenter__()
    try:
        async with Server(settings.model_copy(update={"triton_url": f"127.0.0.1:{process.grpc_port}"})):
            while True:
                await process.wait()
    finally:
        await process.__aexit__(None, None, None)


def _run(command: Callable[[S], Coroutine[None, None, None]], settings: S) -> int:
    logs.configure(settings.log_level, settings.log_format)
    try:
        asyncio.run(_until_stopped(command(settings)))
    except (EngineError, ServerError, TritonProcessError) as error:
        print(f"sdserver {command.__name__}: {error}", file=sys.stderr)
        return 1
    return 0


async def _until_stopped(work: Coroutine[None, None, None]) -> None:
    """Runs `work` until SIGINT or SIGTERM, then lets it end in order; a second signal ends the process at once."""
    task = asyncio.create_task(work)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
            signal.signal(number, lambda number, _: os._exit(128 + number))
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()

"""`sdserver up | serve | triton | calibrate | doctor | plan | engine | lora | top`: the service and what it needs."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, NoReturn, TypeVar

import structlog
from pydantic import ValidationError
from pydantic_settings import CliApp

from sdserver import engine_command, logs
from sdserver.block_list import BlockListError
from sdserver.calibrate import UnknownEngine, calibrate
from sdserver.engines import EngineError, load_catalog
from sdserver.errors import RequestError
from sdserver.safety_model import SafetyError, load_safety_model
from sdserver.server import Server, ServerError
from sdserver.settings import CalibrateSettings, ServeSettings, TritonSettings, UpSettings
from sdserver.triton_process import TritonProcess, TritonProcessError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from sdserver.settings import Settings

    S = TypeVar("S", bound=Settings)

log = structlog.get_logger()

USAGE = """\
usage: sdserver COMMAND [--help] [flags]

  up         start a Triton Inference Server on this machine, and the gRPC server
  serve      start the gRPC server; Triton runs already, at --triton-url
  triton     start a Triton Inference Server on this machine
  calibrate  measure what UNet calls cost here, so that batches are as large as pays; Triton runs already
  doctor     say what of this machine, its Triton and its engines works, and what to do where it fails
  engine     add, list, remove or verify engines: sdserver engine --help
  lora       add, list or remove LoRAs of an engine: sdserver lora --help
  plan       say how many GPUs so many images need, from what calibrate measured
  top        show what servers do right now, from their metrics

Every flag is an environment variable, too: --max-active is SDSERVER_MAX_ACTIVE."""

# A Triton that ends sooner than this after its start would only end again.
LEAST_UPTIME_SECONDS = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command until SIGINT or SIGTERM; returns the exit status."""
    command, *flags = (sys.argv[1:] if arguments is None else arguments) or [""]
    if command in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    # argparse, which pydantic-settings uses, takes the program's name from here.
    sys.argv[0] = f"sdserver {command}"
    match command:
        case "up":
            return _run(up, UpSettings, flags)
        case "serve":
            return _run(serve, ServeSettings, flags)
        case "triton":
            return _run(triton, TritonSettings, flags)
        case "calibrate":
            return _run(calibrate, CalibrateSettings, flags)
        case "doctor":
            from sdserver import doctor_command

            return doctor_command.main(flags)
        case "engine":
            return engine_command.main(flags)
        case "lora":
            from sdserver import lora_command

            return lora_command.main(flags)
        case "plan":
            from sdserver import plan_command

            return plan_command.main(flags)
        case "top":
            from sdserver import top_command

            return top_command.main(flags)
    print(USAGE, file=sys.stderr)
    return 2


async def serve(settings: ServeSettings) -> None:
    """Runs the gRPC server until it is cancelled."""
    async with Server(settings):
        await asyncio.Event().wait()


async def triton(settings: TritonSettings) -> None:
    """Runs Triton until it is cancelled. Raises TritonProcessError if it ends by itself."""
    async with _triton(settings) as process:
        await process.follow_log(lambda line: log.info("Triton says", line=line))
        raise TritonProcessError(f"Triton ended by itself; the end of its log:\n{process.log_tail()}")


async def up(settings: UpSettings) -> None:
    """Runs Triton and the gRPC server until it is cancelled; a Triton that ends by itself is started again.

    Raises TritonProcessError if it ends too soon to be worth another start.
    """
    if settings.backend == "in-process":
        await serve(settings)
        return
    async with AsyncExitStack() as stack:
        process = await stack.enter_async_context(_triton(settings))
        url = f"{process.address}:{process.grpc_port}"
        async with Server(settings.model_copy(update={"triton_url": url})):
            while True:
                started = time.monotonic()
                await process.wait()
                ended = f"Triton ended by itself; the end of its log:\n{process.log_tail()}"
                if time.monotonic() - started < LEAST_UPTIME_SECONDS:
                    raise TritonProcessError(ended)
                log.error("Triton ended by itself and is started again", triton_log=process.log_tail())
                await stack.aclose()
                again = settings.model_copy(update={"triton_grpc_port": process.grpc_port})
                process = await stack.enter_async_context(_triton(again))


def models_to_load(settings: TritonSettings) -> list[str]:
    """Names of the Triton models of all engines and of the safety check. Raises EngineError or SafetyError."""
    models = [model for engine in load_catalog(settings.model_repository) for model in engine.models]
    if settings.safety_model:
        models.append(load_safety_model(settings.model_repository, settings.safety_model).model)
    return models


def _triton(settings: TritonSettings) -> TritonProcess:
    return TritonProcess(
        settings.model_repository,
        models_to_load(settings),
        host=settings.triton_host,
        grpc_port=settings.triton_grpc_port,
        http_port=settings.triton_http_port,
        metrics_host=settings.triton_metrics_host,
        metrics_port=settings.triton_metrics_port,
        start_seconds=settings.triton_start_seconds,
        max_connection_age_seconds=settings.triton_max_connection_age_seconds,
        executable=settings.triton_executable,
    )


def _run(command: Callable[[S], Coroutine[None, None, None]], settings_class: type[S], flags: list[str]) -> int:
    try:
        settings = CliApp.run(settings_class, cli_args=flags)
    except ValidationError as error:
        for problem in error.errors():
            print(
                f"sdserver {command.__name__}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}", file=sys.stderr
            )
        return 2
    logs.configure(settings.log_level, settings.log_format)
    try:
        asyncio.run(_until_stopped(command(settings)))
    except (
        *(EngineError, SafetyError, BlockListError, ServerError, TritonProcessError, UnknownEngine, RequestError),
    ) as error:
        print(f"sdserver {command.__name__}: {error}", file=sys.stderr)
        return 1
    return 0


async def _until_stopped(work: Coroutine[None, None, None]) -> None:
    """Runs `work` until SIGINT or SIGTERM, then lets it end in order; a second signal ends the process at once."""
    task = asyncio.create_task(work)
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(each, _exit, each)
        log.info("stopping; a second signal stops at once", signal=number.name)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()


def _exit(number: signal.Signals) -> NoReturn:
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())

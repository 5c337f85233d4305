"""A Triton Inference Server of this machine's own, as a child process.

The wheel `nvidia-pytriton` holds a real `tritonserver` with its Python backend; `why_not` says whether it runs here.

    async with TritonProcess(model_repository, ["tiny-landscape.unet"], grpc_port=0) as triton:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{triton.grpc_port}")
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import select
import signal
import socket
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Self

import structlog
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from sdserver.triton_host import Host, why_not

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TextIO

__all__ = ["Host", "TritonProcess", "TritonProcessError", "why_not"]

log = structlog.get_logger()

LOOPBACK = "127.0.0.1"
EVERYWHERE = ("0.0.0.0", "::")
# Parts of Triton's API that the server does without, and further ones that it uses by gRPC alone.
NOT_FOR_OTHERS = ("shared-memory", "trace", "logging")
NOT_BY_HTTP = ("inference", "model-config", "model-repository")
POLL_SECONDS = 0.1
CALL_SECONDS = 5.0
EXIT_MARGIN_SECONDS = 2.0
UNLOAD_SECONDS = 5.0
KILLED_SECONDS = 5.0
UNLOADING = "All models are stopped, unloading models"
LOG_TAIL_LINES = 40
SHARED_MEMORY = Path("/dev/shm")

# gRPC's own backoff grows from 1 s: a Triton that has just got ready would be noticed late.
CHANNEL_OPTIONS = [(f"grpc.{name}_reconnect_backoff_ms", 100) for name in ("initial", "min", "max")]

# Linux gives outgoing connections ports from 32768 on; one from below stays free while the models load.
FREE_PORTS = range(20000, 32768)

# The kernel ends Triton when the thread that started it ends, even by SIGKILL; Triton then ends its models' processes.
# The wish survives exec, so a tiny interpreter can utter it: code between fork and exec (`preexec_fn`) may deadlock in
# a process with threads, and gRPC has threads. argv: the parent's id, then the command.
TIED_TO_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class TritonProcessError(Exception):
    """Triton cannot run or did not start; the message says why and shows the end of its log if it has one."""


class TritonProcess:
    """A Triton of its own with some models of a repository: an asynchronous context manager, to be entered once.

    Entering returns when all models answer; leaving stops Triton and removes what it has left behind. It listens on
    `host`, its metrics on `metrics_host` if that is another, and `address` is where this machine finds it. 0 as a port
    chooses a free one; the attributes `grpc_port`, `http_port` and `metrics_port` say which. `exit_seconds` is how long
    requests in flight may take when it is stopped. After `max_connection_age_seconds` callers have to connect again,
    when their calls are answered. The log goes to `log_path`, or away when Triton is stopped. `on_progress` gets a line
    for each model that is loaded. `executable` is another `tritonserver` than the wheel's, with backends of its own, as
    in NVIDIA's container.

    Triton ends with the thread that entered, so that nothing goes on when this process is killed.
    """

    def __init__(
        self,
        model_repository: Path,
        models: Sequence[str],
        *,
        host: str = LOOPBACK,
        grpc_port: int = 8001,
        http_port: int = 8000,
        metrics_host: str | None = None,
        metrics_port: int = 8002,
        start_seconds: float = 180.0,
        exit_seconds: int = 15,
        max_connection_age_seconds: float | None = None,
        executable: Path | None = None,
        log_path: Path | None = None,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        self._host = host
        self._metrics_host = host if metrics_host is None else metrics_host
        self.address = LOOPBACK if host in EVERYWHERE else host
        self.grpc_port, self.http_port, self.metrics_port = (
            _free_port(host) if port == 0 else port for port in (grpc_port, http_port, metrics_port)
        )
        self._model_repository = model_repository.resolve()
        self._models = tuple(models)
        self._start_seconds = start_seconds
        self._exit_seconds = exit_seconds
        self._max_connection_age_seconds = max_connection_age_seconds
        self._executable = executable
        self._log_path = log_path
        self._last_log = ""
        self._on_progress = log.info if on_progress is None else on_progress
        # Tells this Triton from another that answers on its port, and its files in shared memory from other files.
        self._id = f"sd-triton-{uuid.uuid4().hex}"
        self._cleanup = contextlib.ExitStack()
        self._process: asyncio.subprocess.Process | None = None
        # The end to read of a pipe whose other end every process of this Triton holds: it closes with the last of them.
        self._lifeline: TextIO | None = None

    @property
    def pid(self) -> int:
        """Process id of `tritonserver`; its models run in child processes of it."""
        return self._entered().pid

    async def __aenter__(self) -> Self:
        """Starts Triton. Raises TritonProcessError if it cannot run, ends, or is not ready after `start_seconds`."""
        try:
            self._process = await self._start()
            await self._until_ready(self._process)
        except BaseException:
            # Nobody has asked it anything yet, so nothing is lost.
            await self._stop(signal.SIGKILL)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop(signal.SIGTERM)

    async def wait(self) -> int:
        """Waits until Triton ends, by itself or stopped; its exit status, negative for a signal."""
        return await self._entered().wait()

    async def follow_log(self, say: Callable[[str], object]) -> None:
        """Says each line that Triton logs from now on, until it ends."""
        process, path = self._entered(), self._log_path
        assert path is not None
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            unfinished = b""
            while True:
                ended = process.returncode is not None
                *lines, unfinished = (unfinished + file.read()).split(b"\n")
                for line in lines:
                    say(line.decode(errors="replace"))
                if ended:
                    return
                await asyncio.sleep(POLL_SECONDS)

    def log_tail(self) -> str:
        """The last lines of Triton's log, without its tables; also when Triton has been stopped."""
        lines = self._log().splitlines()
        if lines:
            self._last_log = "\n".join([line for line in lines if line and line[0] not in "+|"][-LOG_TAIL_LINES:])
        return self._last_log

    def _log(self) -> str:
        if self._log_path is None or not self._log_path.exists():
            return ""
        return self._log_path.read_text(encoding="utf-8", errors="replace")

    def _entered(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise TritonProcessError("Triton has not been started: use `async with`")
        return self._process

    async def _start(self) -> asyncio.subprocess.Process:
        hosts = self._host, self._host, self._metrics_host
        for host, port in zip(hosts, (self.grpc_port, self.http_port, self.metrics_port), strict=True):
            if not _is_free(host, port):
                raise TritonProcessError(f"port {port} is in use: stop what listens there, or choose another (0: any)")
        folder = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="sd-triton-")))
        if self._log_path is None:
            self._log_path = folder / "triton.log"
        # A model's process takes the Python environment of the first `python3` on PATH.
        environment = os.environ | {"PATH": _joined(str(Path(sys.executable).parent), os.environ.get("PATH"))}
        if self._executable is None:
            command = [*self._wheel_command(folder, environment), *self._options()]
        else:
            command = [str(self._executable), *self._options()]
        lifeline, held = os.pipe()
        self._lifeline = self._cleanup.enter_context(os.fdopen(lifeline))
        try:
            with self._log_path.open("wb") as log_file:
                return await asyncio.create_subprocess_exec(
                    *(sys.executable, "-I", "-S", "-c", TIED_TO_PARENT, str(os.getpid()), *command),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log_file,
                    stderr=asyncio.subprocess.STDOUT,
                    pass_fds=(held,),
                    # Models import from the working directory, too: here is nothing that could shadow a module.
                    cwd=folder,
                    env=environment,
                    # A group of its own: Ctrl-C does not reach it, and no process of it is missed when it is killed.
                    start_new_session=True,
                )
        finally:
            os.close(held)

    def _wheel_command(self, folder: Path, environment: dict[str, str]) -> list[str]:
        """Lays out the wheel's Python backend in `folder` as Triton wants it, and names it and its libraries."""
        host = Host.this()
        reason = why_not(host)
        if reason is not None or host.wheel is None or host.stub is None or host.libpython is None:
            raise TritonProcessError(reason)
        backend = folder / "python"
        backend.mkdir()
        files = [*(host.wheel / "backends/python").glob("*.*"), host.stub, host.libpython]
        for file in files:
            (backend / file.name).symlink_to(file)
        libraries = str(host.wheel.parents[1] / "nvidia_pytriton.libs")
        environment["LD_LIBRARY_PATH"] = _joined(libraries, str(backend), os.environ.get("LD_LIBRARY_PATH"))
        return [str(host.wheel / "bin/tritonserver"), f"--backend-directory={folder}"]

    def _options(self) -> list[str]:
        options = {
            "id": self._id,
            "model-repository": self._model_repository,
            "model-control-mode": "explicit",
            "grpc-address": self._host,
            "grpc-port": self.grpc_port,
            "http-address": self._host,
            "http-port": self.http_port,
            "metrics-address": self._metrics_host,
            "metrics-port": self.metrics_port,
            "exit-timeout-secs": self._exit_seconds,
        }
        if self._max_connection_age_seconds is not None:
            options["grpc-max-connection-age"] = round(self._max_connection_age_seconds * 1000)
        if self._host != LOOPBACK:
            # Others of the network get what the server needs. The header that would open the rest is told to nobody.
            header = f"sd-triton={uuid.uuid4().hex}"
            options["grpc-restricted-protocol"] = f"{','.join(NOT_FOR_OTHERS)}:{header}"
            options["http-restricted-api"] = f"{','.join((*NOT_FOR_OTHERS, *NOT_BY_HTTP))}:{header}"
        python_backend = {
            "shm-region-prefix-name": self._id,
            # Bytes a model, for the tensors on their way; more is taken where a batch needs more.
            "shm-default-byte-size": 4 * 2**20,
            "shm-growth-byte-size": 4 * 2**20,
        }
        return [
            # To complete a configuration, Triton would start the model's process once more; ours are complete.
            "--disable-auto-complete-config",
            *(f"--{name}={value}" for name, value in options.items()),
            *(f"--backend-config=python,{name}={value}" for name, value in python_backend.items()),
            *(f"--load-model={model}" for model in self._models),
        ]

    async def _until_ready(self, process: asyncio.subprocess.Process) -> None:
        started = time.monotonic()
        loaded: dict[str, None] = {}
        self._on_progress(f"Triton loads {', '.join(self._models)}")
        client = InferenceServerClient(f"{self.address}:{self.grpc_port}", channel_args=CHANNEL_OPTIONS)
        try:
            while not await self._is_ready(client):
                if process.returncode is not None:
                    raise TritonProcessError(f"Triton did not start; the end of its log:\n{self.log_tail()}")
                if time.monotonic() - started > self._start_seconds:
                    late = f"Triton is not ready after {self._start_seconds:g} s"
                    raise TritonProcessError(f"{late}; the end of its log:\n{self.log_tail()}")
                for model in re.findall(r"successfully loaded '([^']+)'", self._log()):
                    if model not in loaded:
                        loaded[model] = None
                        self._on_progress(f"Triton has loaded {model}, {len(loaded)} of {len(self._models)}")
                await asyncio.sleep(POLL_SECONDS)
        finally:
            await client.close()
        self._on_progress(f"Triton is ready after {time.monotonic() - started:.1f} s on port {self.grpc_port}")

    async def _is_ready(self, client: InferenceServerClient) -> bool:
        try:
            metadata = await client.get_server_metadata(client_timeout=CALL_SECONDS)
            ready = metadata.name == self._id and await client.is_server_ready(client_timeout=CALL_SECONDS)
        except InferenceServerException:
            return False
        return bool(ready)

    async def _stop(self, how: signal.Signals) -> None:
        try:
            if self._process is not None:
                await self._end(self._process, how)
        finally:
            self.log_tail()
            self._remove_shared_memory()
            self._cleanup.close()

    def _remove_shared_memory(self) -> None:
        # A model's process that was killed leaves its region behind, and so may a killed Triton.
        for region in SHARED_MEMORY.glob(f"{self._id}*"):
            region.unlink(missing_ok=True)

    async def _end(self, process: asyncio.subprocess.Process, how: signal.Signals) -> None:
        try:
            if process.returncode is None:
                process.send_signal(how)
            # At exit_seconds Triton gives up by itself what is still in flight.
            deadline, unloading = time.monotonic() + self._exit_seconds + EXIT_MARGIN_SECONDS, False
            while process.returncode is None and time.monotonic() < deadline:
                if not unloading and UNLOADING in self._log():
                    # All requests are answered. A model whose process was killed would be waited for in vain.
                    deadline, unloading = min(deadline, time.monotonic() + UNLOAD_SECONDS), True
                await asyncio.sleep(POLL_SECONDS)
            if process.returncode is None:
                log.warning("Triton does not stop and is killed", pid=process.pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            # The kernel takes a killed process's memory and ports apart after the signal; Triton's models are not our
            # children, so that they cannot be waited for otherwise.
            if self._lifeline is not None and not self._lifeline.closed:
                await asyncio.to_thread(select.select, [self._lifeline], [], [], KILLED_SECONDS)


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As servers do: a port whose last connections have just been closed is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _free_port(host: str) -> int:
    return next(port for port in random.sample(FREE_PORTS, len(FREE_PORTS)) if _is_free(host, port))


def _joined(*folders: str | None) -> str:
    return ":".join(folder for folder in folders if folder)

"""Memory that this process and a Triton on the same host share, so that tensors do not travel through gRPC.

A block's name is taken away as soon as Triton has mapped it: whoever dies, and however, nothing stays in /dev/shm. What
a killed server leaves registered in a Triton that lives on, the next server takes out.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
from tritonclient.utils import InferenceServerException

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from tritonclient.grpc.aio import InferenceServerClient

log = structlog.get_logger()

T = TypeVar("T")

FOLDER = Path("/dev/shm")
PID_NAMESPACE = Path("/proc/self/ns/pid")
PREFIX = "sdserver"
LEAST_BYTES = 2**20
# Triton 24.09: before, a region that a call still used could be taken out, and Triton crashed.
LEAST_VERSION = (2, 50)
LOCAL = re.compile(r"^(localhost|127(\.\d+){3}|\[::1\])(:\d+)?$")
RETRY_SECONDS = 0.2
CLOSE_SECONDS = 5.0


@dataclass(slots=True, eq=False)
class Block:
    """A piece of shared memory that Triton knows under `region`."""

    region: str
    memory: mmap.mmap


class SharedMemory:
    """Blocks for the calls of one client of a Triton at `url`; none where Triton cannot see them."""

    def __init__(self, client: InferenceServerClient, url: str) -> None:
        self._client = client
        self._works: bool | None = None if LOCAL.match(url) and FOLDER.is_dir() else False
        self._starting = asyncio.Lock()
        self._owner = f"{PREFIX}-{_process(os.getpid())}"
        self._free: list[Block] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    async def take(self, size: int) -> Block | None:
        """A block of at least `size` bytes, for one call; None: there is no shared memory, or no more of it."""
        if self._works is None:
            async with self._starting:
                if self._works is None:
                    self._works = await asyncio.shield(self._start(self._begin()))
        while self._works:
            fitting = [block for block in self._free if len(block.memory) >= size]
            if fitting:
                block = min(fitting, key=lambda each: len(each.memory))
                self._free.remove(block)
                return block
            # Whoever is cancelled now leaves a block for others, and not one that nobody knows of.
            making = self._start(self._make(max(LEAST_BYTES, 1 << (size - 1).bit_length())))
            await asyncio.shield(making)
            if making.result() is None:
                break
        return None

    def give_back(self, block: Block) -> None:
        """The call was answered: Triton does not use the block any more."""
        self._free.append(block)

    def abandon(self, block: Block) -> None:
        """The call was cancelled: Triton may still use the block, and is asked until it does not."""
        self._start(self._reap(block))

    def forget(self) -> None:
        """Triton does not know the blocks any more, because it has started anew."""
        self._free.clear()

    async def close(self) -> None:
        """Takes all blocks out of Triton; waits a while for calls that still use one."""
        for block in self._free:
            self.abandon(block)
        self._free.clear()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=CLOSE_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _begin(self) -> bool | None:
        """Whether Triton can share memory; None: it did not answer."""
        try:
            metadata = await self._client.get_server_metadata()
            version = tuple(int(part) for part in metadata.version.split(".")[:2])
            if version < LEAST_VERSION:
                return False
            await self._take_out_leftovers()
        except InferenceServerException as error:
            return None if error.status() == "StatusCode.UNAVAILABLE" else False
        except ValueError:
            return False
        if await self._make(LEAST_BYTES) is None:
            log.info("Triton does not share memory with this server; tensors go through gRPC")
            return False
        return True

    async def _take_out_leftovers(self) -> None:
        status = await self._client.get_system_shared_memory_status()
        for region in status.regions:
            owner = re.match(rf"{PREFIX}-(\d+)-(\d+)-(\d+)-", region)
            if owner and _is_dead(*owner.groups()):
                # One that is still in use is refused, and taken out by the next server.
                with contextlib.suppress(InferenceServerException):
                    await self._client.unregister_system_shared_memory(region)

    async def _make(self, size: int) -> Block | None:
        """Adds a block to the free ones; None: there is no more memory, or Triton cannot see it."""
        region = f"{self._owner}-{secrets.token_hex(8)}"
        path = FOLDER / region
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        except OSError:
            return None
        try:
            # Reserved now: memory that turns out not to be there would be a bus error.
            os.posix_fallocate(file, 0, size)
            memory = mmap.mmap(file, size)
            await self._client.register_system_shared_memory(region, f"/{region}", size)
        except (OSError, InferenceServerException):
            return None
        finally:
            os.close(file)
            path.unlink(missing_ok=True)
        block = Block(region, memory)
        self._free.append(block)
        return block

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work, name="shared memory")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _reap(self, block: Block) -> None:
        while True:
            try:
                await self._client.unregister_system_shared_memory(block.region)
            except InferenceServerException as error:
                if "in use" in (error.message() or ""):
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
            return


def _process(pid: int) -> str:
    """What only one process of this machine is called, even after it has died."""
    return f"{PID_NAMESPACE.stat().st_ino}-{pid}-{_start_time(pid)}"


def _start_time(pid: int) -> str:
    # The 22nd field; the second one, the name in parentheses, may hold anything.
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]


def _is_dead(namespace: str, pid: str, start_time: str) -> bool:
    """False also for processes of other PID namespaces, which cannot be seen from here."""
    if namespace != str(PID_NAMESPACE.stat().st_ino):
        return False
    try:
        return _start_time(int(pid)) != start_time
    except FileNotFoundError:
        return True

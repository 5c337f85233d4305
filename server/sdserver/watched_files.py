"""What is made of files, made again when they change: keys and certificates are renewed without a restart."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Generic, TypeVar

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

T = TypeVar("T")

log = structlog.get_logger()


class FileError(Exception):
    """Files of the settings cannot be read or do not work; says what to change, and quotes nothing of them."""


class WatchedFiles(Generic[T]):
    """The value that `read` makes of some files. Any thread may ask for it."""

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        """Reads them. Raises FileError, as `read` may."""
        self._paths = tuple(paths)
        self._read = read
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._value = read()

    def current(self) -> T:
        """The value of the files as they are, or, while they do not work, of those before.

        An exchange of several files one after the other is so survived, and a secret that Kubernetes swaps is seen.
        """
        with self._lock:
            stamp = self._stamp()
            if stamp != self._seen:
                self._seen = stamp
                names = ", ".join(map(str, self._paths))
                try:
                    self._value = self._read()
                    log.info("files are read again", files=names)
                except FileError as error:
                    log.error("files have changed, and what was read before is kept", files=names, error=str(error))
            return self._value

    def _stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(map(_stamp, self._paths))


def read_file(path: Path) -> bytes:
    """The bytes of a file. Raises FileError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from error


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino

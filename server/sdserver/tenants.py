"""Who calls: the names of the API keys that an operator has given out."""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import TYPE_CHECKING

from sdserver.errors import Unauthenticated
from sdserver.observation import ANONYMOUS
from sdserver.watched_files import FileError, WatchedFiles, read_file

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

LEAST_KEY_CHARACTERS = 16
# Names go into logs and metrics.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(rf"[!-~]{{{LEAST_KEY_CHARACTERS},256}}")

# What metrics call those without a key, and those beyond the hundredth.
_RESERVED = {ANONYMOUS, "other"}

HOW_TO = "send `authorization: Bearer KEY` (SDK: api_key=, command line: SDCLIENT_API_KEY)"

Keys = tuple[tuple[str, bytes], ...]
"""Name and SHA-256 of each key."""


class Tenants:
    """Tells who calls. Without a file everybody may, as ANONYMOUS."""

    def __init__(self, api_keys: Path | None) -> None:
        """Reads the keys, and again whenever the file changes. Raises FileError."""
        self._keys = None if api_keys is None else WatchedFiles([api_keys], lambda: read_api_keys(api_keys))

    @property
    def known(self) -> bool:
        """Whether callers need a key."""
        return self._keys is not None

    def of(self, headers: Iterable[tuple[str, str | bytes]]) -> str:
        """The name of the key in a call's headers. Raises Unauthenticated."""
        if self._keys is None:
            return ANONYMOUS
        sent = [value for name, value in headers if name == "authorization"]
        if not sent:
            raise Unauthenticated(f"this server wants an API key: {HOW_TO}", "API_KEY_MISSING")
        scheme, _, key = str(sent[0]).partition(" ")
        if len(sent) > 1 or scheme.lower() != "bearer" or not key:
            raise Unauthenticated(f"the authorization header is not one `Bearer KEY`: {HOW_TO}", "API_KEY_MALFORMED")
        digest = _digest(key)
        # Each is compared, in time that does not depend on the key: how long it takes says nothing.
        names = [name for name, known in self._keys.current() if hmac.compare_digest(known, digest)]
        if not names:
            raise Unauthenticated(
                "the API key is not known here: it is misspelt, or has been revoked", "API_KEY_INVALID"
            )
        return names[0]


def read_api_keys(path: Path) -> Keys:
    """Reads a file of `name key` lines, in which empty lines and those that begin with # say nothing.

    A name may have several keys, so that one can be replaced by another. Raises FileError, which names the line and
    shows no key.
    """
    try:
        lines = read_file(path).decode().splitlines()
    except UnicodeDecodeError:
        raise FileError(f"{path} is not text in UTF-8: it has one `name key` a line") from None
    keys: dict[bytes, str] = {}
    for number, line in enumerate(lines, start=1):
        parts = line.split()
        if not parts or parts[0].startswith("#"):
            continue
        if len(parts) != 2 or not _NAME.fullmatch(parts[0]) or not _KEY.fullmatch(parts[1]):
            raise FileError(
                f"{path}, line {number}: not `name key`: a name has at most 64 letters, digits, `.`, `_` and `-`, a "
                f"key {LEAST_KEY_CHARACTERS} to 256 printable ASCII characters; `openssl rand -hex 32` makes one"
            )
        name, digest = parts[0], _digest(parts[1])
        if name in _RESERVED:
            raise FileError(f"{path}, line {number}: {name} is what metrics call others; choose another name")
        if digest in keys:
            raise FileError(f"{path}, line {number}: the key of {keys[digest]} once more; each name has its own keys")
        keys[digest] = name
    if not keys:
        raise FileError(f"{path} has no key, so nobody could call: add a line `name key`")
    return tuple((name, digest) for digest, name in keys.items())


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()

"""What can go wrong, named by what the caller does next.

    SDError                      .code .reason .request_id .metadata .violations .retry_after
    +-- InvalidRequestError      fix the request; .violations says where (also ValueError)
    |   +-- PromptSyntaxError    fix the text at .column
    +-- NotFoundError            ask for an engine of `engines()`
    +-- UnsupportedError         leave the option out, or use a newer server
    +-- ServerBusyError          come back in .retry_after seconds
    +-- UnavailableError         start the server, wait for it, or correct its address
    +-- DeadlineExceededError    allow more time or ask for less (also TimeoutError)
    +-- CancelledError           the call was cancelled; nothing to do
    +-- AuthenticationError      pass another api_key
    +-- ServerError              report it, with .request_id
    +-- BlockedImageError        look at image.blocked before image.save(); try another prompt or seed
    +-- MetadataError            take the file as the server sent it (also ValueError)

The gRPC error stays reachable as `__cause__`.
"""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from google.rpc.status_pb2 import Status


class SDError(Exception):
    """Base of everything that the SDK raises about a call."""

    def __init__(
        self,
        message: str,
        *,
        code: str = "UNKNOWN",
        reason: str | None = None,
        request_id: str | None = None,
        metadata: Mapping[str, str] | None = None,
        violations: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        """Name of the gRPC status code, such as `UNAVAILABLE`."""
        self.reason = reason
        """The server's word for the cause, such as `QUEUE_FULL`; None when the server did not answer itself."""
        self.request_id = request_id
        """The request's name in the server's log, if the server said it."""
        self.metadata = dict(metadata or {})
        """Further facts from the server."""
        self.violations = dict(violations or {})
        """Field path, such as `prompts[1].weight`, -> what is wrong with it."""
        self.retry_after = retry_after
        """Seconds after which the server expects to be able to answer, if it said so."""


class InvalidRequestError(SDError, ValueError):
    """The request is wrong; `violations` has all its problems at once."""


class PromptSyntaxError(InvalidRequestError):
    """A text is not in prompt syntax; the message shows the place."""

    def __init__(self, message: str, *, column: int = 1) -> None:
        super().__init__(message, code="INVALID_ARGUMENT")
        self.column = column
        """The character of the text at which it cannot go on, from 1."""


class NotFoundError(SDError):
    """The server has no such engine."""


class UnsupportedError(SDError):
    """The server cannot do this: it is older than the option, or another service altogether."""


class ServerBusyError(SDError):
    """The queue is full; `retry_after` says when to come back."""


class UnavailableError(SDError):
    """No server at this address, or its models are not loaded, or it is stopping."""


class DeadlineExceededError(SDError, TimeoutError):
    """The call's `timeout` passed, or the server's own time limit for one generation."""


class CancelledError(SDError):
    """The call was cancelled: its block was left, its client was closed, or the server stopped it."""


class AuthenticationError(SDError):
    """The server does not accept the `api_key`."""


class ServerError(SDError):
    """A fault of the server."""


class BlockedImageError(SDError):
    """The server's safety check has blocked this image: there is no picture to save, show or read."""


class MetadataError(SDError, ValueError):
    """A file does not say how it was made, or cannot be read."""


_ERRORS: dict[str, type[SDError]] = {
    "INVALID_ARGUMENT": InvalidRequestError,
    "OUT_OF_RANGE": InvalidRequestError,
    "NOT_FOUND": NotFoundError,
    "UNIMPLEMENTED": UnsupportedError,
    "RESOURCE_EXHAUSTED": ServerBusyError,
    "UNAVAILABLE": UnavailableError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "CANCELLED": CancelledError,
    "UNAUTHENTICATED": AuthenticationError,
    "PERMISSION_DENIED": AuthenticationError,
}
"""Status code -> error. Every other code is a ServerError."""

# What gRPC says about a connection -> what to do about it. The first that is found counts.
_UNAVAILABLE = [
    (
        r"CERTIFICATE_VERIFY_FAILED",
        "the TLS certificate of {target} is not trusted: pass tls='ca.pem' of its authority",
    ),
    (r"handshake", "the TLS handshake with {target} failed: leave tls out if that server does not speak TLS"),
    (r"resolv|DNS", "cannot find the host of {target}: give host:port, such as localhost:50051"),
    (
        r"failed to connect.*(closed|reset|SETTINGS)",
        "{target} answers, but not with gRPC: is the port right, and does it need tls=True, or a certificate of yours, "
        "tls=Tls(...)?",
    ),
    (r"failed to connect", "no server at {target}: start one with `sdserver up`, or give the address of another"),
]

for _error in (SDError, *SDError.__subclasses__(), PromptSyntaxError):
    # Tracebacks then show the name that callers catch.
    _error.__module__ = "sdclient"


@dataclass(frozen=True, slots=True)
class Deadline:
    """A timeout that runs from now."""

    seconds: float | None
    """None: it never passes."""
    start: float = field(default_factory=time.monotonic)

    @property
    def passed(self) -> bool:
        # The server runs the same timeout on its own clock, and its reset may be faster than our timer.
        return self.seconds is not None and time.monotonic() - self.start > self.seconds - 0.1


@contextmanager
def translated(target: str, deadline: Deadline) -> Iterator[None]:
    """Raise gRPC's errors, sync or aio, as this module's. `target` names the server in messages."""
    import grpc

    try:
        yield
    except grpc.RpcError as error:
        raise _translate(error, target, deadline) from error


def _translate(error: Any, target: str, deadline: Deadline) -> SDError:
    # RpcError itself has no attributes; what gRPC raises is also a Call (sync) or an AioRpcError, with these three.
    code, text = error.code().name, error.details() or ""
    status = _status_details(error.trailing_metadata() or ())
    if status is None or not status.details:
        return _transport_error(code, text, target, deadline)

    from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo

    info, bad_request, retry = ErrorInfo(), BadRequest(), RetryInfo()
    for detail in status.details:
        # Unpack does nothing where the type is another.
        for message in (info, bad_request, retry):
            detail.Unpack(message)
    violations: dict[str, str] = {}
    for violation in bad_request.field_violations:
        earlier = violations.get(violation.field)
        violations[violation.field] = f"{earlier}; {violation.description}" if earlier else violation.description
    return _ERRORS.get(code, ServerError)(
        text or code,
        code=code,
        reason=info.reason or None,
        request_id=info.metadata.get("request_id"),
        metadata=info.metadata,
        violations=violations,
        retry_after=retry.retry_delay.ToTimedelta().total_seconds() if retry.HasField("retry_delay") else None,
    )


def _status_details(trailing_metadata: Iterable[tuple[str, str | bytes]]) -> Status | None:
    from google.protobuf.message import DecodeError
    from google.rpc.status_pb2 import Status

    for key, value in trailing_metadata:
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            try:
                return Status.FromString(value)
            except DecodeError:
                return None
    return None


def _transport_error(code: str, text: str, target: str, deadline: Deadline) -> SDError:
    """A status without details is not the service's own: gRPC made it, here or there, or a proxy between."""
    if code == "DEADLINE_EXCEEDED" or (code in {"CANCELLED", "INTERNAL", "UNKNOWN"} and deadline.passed):
        seconds = "" if deadline.seconds is None else f" within {deadline.seconds:g} s"
        return DeadlineExceededError(
            f"{target} did not finish{seconds}; pass a greater timeout, or ask for less", code="DEADLINE_EXCEEDED"
        )
    detail = f" ({text})" if text else ""
    if code == "RESOURCE_EXHAUSTED" and "larger than max" in text:
        return InvalidRequestError(f"too much data for one message: use smaller images{detail}", code=code)
    sentence = text or code
    if code == "UNIMPLEMENTED":
        sentence = f"the gRPC server at {target} does not offer this call: is it an sdserver, and new enough?{detail}"
    elif code == "CANCELLED":
        sentence = f"the call was cancelled{detail}"
    elif code == "UNAVAILABLE":
        sentence = f"{_what_to_do(text).format(target=target)}{detail}"
    return _ERRORS.get(code, ServerError)(sentence, code=code)


def _what_to_do(text: str) -> str:
    for pattern, sentence in _UNAVAILABLE:
        if re.search(pattern, text, re.IGNORECASE):
            return sentence
    return "lost the connection to {target}: look at the server's log, then try again"

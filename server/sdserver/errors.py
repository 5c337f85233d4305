"""Everything that can go wrong with a request, and the gRPC status that says so.

    RequestError                    reason                    code
    +-- InvalidRequest              INVALID_REQUEST           INVALID_ARGUMENT   fix the named fields
    |   +-- PromptBlocked           PROMPT_BLOCKED            INVALID_ARGUMENT   say it in other words
    +-- Unauthenticated             (given)                   UNAUTHENTICATED    send another API key
    +-- UnknownEngine               UNKNOWN_ENGINE            NOT_FOUND          ask ListEngines
    +-- NotSupported                NOT_SUPPORTED             UNIMPLEMENTED      leave the field out
    +-- QueueFull                   QUEUE_FULL                RESOURCE_EXHAUSTED come back later
    +-- Unavailable                 (given)                   UNAVAILABLE        come back later
    +-- TimeLimit                   TIME_LIMIT                DEADLINE_EXCEEDED  ask for less
    +-- GenerationFailed            (given)                   INTERNAL           report it

A message says what to do next and shows nothing of the server's insides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

if TYPE_CHECKING:
    from collections.abc import Mapping

DOMAIN = "sdapi"

# Details travel in a trailer, which gRPC limits to 16 KiB: this many violations are told, and how many more there are.
MAX_VIOLATIONS = 30


class RequestError(Exception):
    """A request that fails with a status that the caller can act on."""

    code = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"

    def __init__(self, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = metadata

    @property
    def retry_after(self) -> float | None:
        """Seconds after which a retry makes sense; None: a retry does not help."""
        return None

    @property
    def violations(self) -> Mapping[str, str]:
        """Field path -> what is wrong with it and what would be right."""
        return {}


class InvalidRequest(RequestError):
    """The request is wrong. Names every bad field at once."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"

    def __init__(self, violations: Mapping[str, str]) -> None:
        told = dict(list(violations.items())[:MAX_VIOLATIONS])
        more = len(violations) - len(told)
        problems = [f"{field}: {problem}" for field, problem in told.items()] + [f"and {more} more"] * (more > 0)
        super().__init__("; ".join(problems))
        self._violations = told

    @property
    def violations(self) -> Mapping[str, str]:
        return self._violations


class PromptBlocked(InvalidRequest):
    """A prompt is on the operator's block list, and perhaps more is wrong.

    `found` is field path -> line of the list; it is for the log alone, since nobody is told what the list holds.
    """

    reason = "PROMPT_BLOCKED"

    def __init__(self, violations: Mapping[str, str], found: Mapping[str, int]) -> None:
        super().__init__(violations)
        self.found = found


class Unauthenticated(RequestError):
    """The call has no API key (`API_KEY_MISSING`), no readable one (`API_KEY_MALFORMED`) or an unknown one
    (`API_KEY_INVALID`)."""

    code = grpc.StatusCode.UNAUTHENTICATED

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class UnknownEngine(RequestError):
    """No engine has this id."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "UNKNOWN_ENGINE"


class NotSupported(RequestError):
    """The field is part of the contract, but this server cannot do it yet."""

    code = grpc.StatusCode.UNIMPLEMENTED
    reason = "NOT_SUPPORTED"


class QueueFull(RequestError):
    """As many requests as the server accepts are waiting already."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self._retry_after = retry_after

    @property
    def retry_after(self) -> float | None:
        return self._retry_after


class Unavailable(RequestError):
    """The models cannot be reached or are loading (`TRITON_UNAVAILABLE`, `ENGINE_NOT_READY`), or the server is
    stopping (`SERVER_STOPPING`)."""

    code = grpc.StatusCode.UNAVAILABLE

    def __init__(self, message: str, reason: str, **metadata: str) -> None:
        super().__init__(message, **metadata)
        self.reason = reason

    @property
    def retry_after(self) -> float | None:
        return 1.0


class TimeLimit(RequestError):
    """The generation took longer than the server allows one to take."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "TIME_LIMIT"


class GenerationFailed(RequestError):
    """A fault of the server or of its models (`MODEL_ERROR`, `NOT_FINITE`, `INTERNAL`)."""

    def __init__(self, message: str, reason: str, **metadata: str) -> None:
        super().__init__(message, **metadata)
        self.reason = reason


def to_status(error: RequestError, request_id: str) -> Status:
    """The error as `google.rpc.Status`: ErrorInfo always, BadRequest and RetryInfo where they say something."""
    details: list[Any] = []

    def attach(detail: ErrorInfo | BadRequest | RetryInfo) -> None:
        packed = Any()
        packed.Pack(detail)
        details.append(packed)

    metadata = {**error.metadata, **({"request_id": request_id} if request_id else {})}
    attach(ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))
    if error.violations:
        attach(
            BadRequest(
                field_violations=[
                    BadRequest.FieldViolation(field=field, description=problem)
                    for field, problem in error.violations.items()
                ]
            )
        )
    if error.retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        attach(RetryInfo(retry_delay=delay))
    return Status(code=error.code.value[0], message=error.message, details=details)

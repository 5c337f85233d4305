"""Every status becomes the error that says what to do next, with everything that the server told."""

from __future__ import annotations

import pickle
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import sdclient
from fake_service import BlockingTwin, Call, Responses, serving
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode
from sdclient import (
    AuthenticationError,
    CancelledError,
    Client,
    DeadlineExceededError,
    InvalidRequestError,
    NotFoundError,
    SDError,
    ServerBusyError,
    ServerError,
    UnavailableError,
    UnsupportedError,
)
from sdclient._errors import Deadline, translated

if TYPE_CHECKING:
    from collections.abc import Callable

    from fake_service import AnyClient
    from google.protobuf.message import Message
    from sdapi.v1.generation_pb2 import GenerateRequest

INFO = ErrorInfo(reason="SOME_REASON", domain="sdapi", metadata={"request_id": "r1", "engine": "tiny-landscape"})

ERRORS = [
    (StatusCode.INVALID_ARGUMENT, InvalidRequestError),
    (StatusCode.OUT_OF_RANGE, InvalidRequestError),
    (StatusCode.NOT_FOUND, NotFoundError),
    (StatusCode.UNIMPLEMENTED, UnsupportedError),
    (StatusCode.RESOURCE_EXHAUSTED, ServerBusyError),
    (StatusCode.UNAVAILABLE, UnavailableError),
    (StatusCode.DEADLINE_EXCEEDED, DeadlineExceededError),
    (StatusCode.CANCELLED, CancelledError),
    (StatusCode.UNAUTHENTICATED, AuthenticationError),
    (StatusCode.PERMISSION_DENIED, AuthenticationError),
    (StatusCode.INTERNAL, ServerError),
    (StatusCode.UNKNOWN, ServerError),
    (StatusCode.ABORTED, ServerError),
    (StatusCode.ALREADY_EXISTS, ServerError),
    (StatusCode.DATA_LOSS, ServerError),
    (StatusCode.FAILED_PRECONDITION, ServerError),
]


@pytest.fixture(params=[Client, BlockingTwin], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Callable[..., AnyClient]:
    kind: Callable[..., AnyClient] = request.param
    return kind


def failure(connect: Callable[..., AnyClient], code: StatusCode, message: str, *details: Message) -> SDError:
    """The error of a call that the server ends with this status at once."""

    def answer(request: GenerateRequest, call: Call) -> Responses:
        call.fail(code, message, *details, pushback_ms=-1)

    with serving(answer) as service, connect(service.target) as client, pytest.raises(SDError) as caught:
        client.generate("a lake")
    return caught.value


class GrpcError(grpc.RpcError):
    """A status as gRPC itself raises it."""

    def __init__(self, code: StatusCode, details: str | None, trailing_metadata: Any = ()) -> None:
        self._status = code, details, trailing_metadata

    def code(self) -> StatusCode:
        return self._status[0]

    def details(self) -> str | None:
        return self._status[1]

    def trailing_metadata(self) -> Any:
        return self._status[2]


def translation(error: GrpcError, deadline: Deadline | None = None) -> SDError:
    with pytest.raises(SDError) as caught, translated("host:50051", deadline or Deadline(None)):
        raise error
    assert caught.value.__cause__ is error
    return caught.value


@pytest.mark.parametrize(("code", "kind"), ERRORS)
def test_each_status_has_its_error(connect: Callable[..., AnyClient], code: StatusCode, kind: type[SDError]) -> None:
    error = failure(connect, code, "what went wrong", INFO)
    assert type(error) is kind
    assert str(error) == "what went wrong"
    assert error.code == code.name
    assert error.reason == "SOME_REASON"
    assert error.request_id == "r1"
    assert error.metadata == {"request_id": "r1", "engine": "tiny-landscape"}
    assert error.violations == {}
    assert error.retry_after is None
    assert isinstance(error.__cause__, grpc.RpcError)


def test_the_table_has_every_status_but_ok() -> None:
    assert {code for code, _ in ERRORS} == set(StatusCode) - {StatusCode.OK}


def test_an_invalid_request_has_all_its_violations(connect: Callable[..., AnyClient]) -> None:
    fields = [("width", "too small"), ("prompts[1].weight", "not finite"), ("width", "not for this engine")]
    bad = BadRequest(
        field_violations=[BadRequest.FieldViolation(field=name, description=text) for name, text in fields]
    )
    error = failure(connect, StatusCode.INVALID_ARGUMENT, "2 fields", INFO, bad)
    assert error.violations == {"width": "too small; not for this engine", "prompts[1].weight": "not finite"}
    assert isinstance(error, ValueError)


@pytest.mark.parametrize("code", [StatusCode.RESOURCE_EXHAUSTED, StatusCode.UNAVAILABLE])
def test_a_server_says_when_it_expects_to_have_time(connect: Callable[..., AnyClient], code: StatusCode) -> None:
    error = failure(connect, code, "full", RetryInfo(retry_delay=Duration(seconds=2, nanos=500_000_000)), INFO)
    assert error.retry_after == 2.5


def test_a_retry_delay_of_zero_is_one(connect: Callable[..., AnyClient]) -> None:
    assert failure(connect, StatusCode.UNAVAILABLE, "now", RetryInfo(retry_delay=Duration())).retry_after == 0.0


def test_without_a_server_every_call_says_how_to_get_one(connect: Callable[..., AnyClient]) -> None:
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{occupied.getsockname()[1]}"
        with connect(target) as client:
            for call in (client.engines, lambda: client.generate("a lake")):
                with pytest.raises(UnavailableError, match=f"^no server at {target}: start one with `sdserver up`"):
                    call()


def test_a_server_without_tls_is_named_as_the_cause_of_a_failed_handshake(connect: Callable[..., AnyClient]) -> None:
    with serving() as service, connect(service.target, tls=True) as client, pytest.raises(UnavailableError) as caught:
        client.engines()
    assert f"the TLS handshake with {service.target} failed: leave tls out" in str(caught.value)


def test_a_server_of_something_else_is_told_apart(connect: Callable[..., AnyClient]) -> None:
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with connect(f"127.0.0.1:{port}") as client, pytest.raises(UnsupportedError, match="is it an sdserver"):
            client.engines()
        server.stop(0).wait()


@pytest.mark.parametrize(
    ("details", "sentence"),
    [
        ("Ssl handshake failed: CERTIFICATE_VERIFY_FAILED: self signed certificate", "pass tls='ca.pem'"),
        ("errors resolving http://host:1: Misformatted domain name", "give host:port"),
        ("DNS resolution failed for host:50051", "cannot find the host of host:50051"),
        ("failed to connect to all addresses; last error: Socket closed", "does it need tls=True"),
        ("failed to connect to all addresses; last error: Connection refused", "no server at host:50051"),
        ("recvmsg:Connection reset by peer", "lost the connection to host:50051"),
        ("", "lost the connection to host:50051"),
    ],
)
def test_a_broken_connection_says_what_to_do(details: str, sentence: str) -> None:
    error = translation(GrpcError(StatusCode.UNAVAILABLE, details))
    assert isinstance(error, UnavailableError)
    assert sentence in str(error)
    assert details in str(error)


@pytest.mark.parametrize("code", [StatusCode.CANCELLED, StatusCode.INTERNAL, StatusCode.UNKNOWN])
def test_a_reset_after_the_callers_own_deadline_is_that_deadline(code: StatusCode) -> None:
    reset = GrpcError(code, "Received RST_STREAM with error code 8")
    error = translation(reset, Deadline(5.0, start=time.monotonic() - 6.0))
    assert isinstance(error, DeadlineExceededError)
    assert isinstance(error, TimeoutError)
    assert error.code == "DEADLINE_EXCEEDED"
    assert "within 5 s" in str(error)
    # The server's clock may be the faster one.
    assert isinstance(translation(reset, Deadline(5.0, start=time.monotonic() - 4.95)), DeadlineExceededError)
    assert not isinstance(translation(reset, Deadline(5.0)), DeadlineExceededError)
    assert not isinstance(translation(reset, Deadline(None)), DeadlineExceededError)


def test_what_the_server_says_itself_stands_after_the_deadline_too() -> None:
    past = Deadline(5.0, start=time.monotonic() - 6.0)
    status = Status(code=StatusCode.INTERNAL.value[0], message="not finite")
    status.details.add().Pack(INFO)
    trailers = (("grpc-status-details-bin", status.SerializeToString()),)
    error = translation(GrpcError(StatusCode.INTERNAL, "not finite", trailers), past)
    assert isinstance(error, ServerError)
    assert str(error) == "not finite"


def test_a_message_too_large_for_grpc_is_no_busy_server() -> None:
    error = translation(GrpcError(StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (70 vs. 64)"))
    assert isinstance(error, InvalidRequestError)
    assert "smaller images" in str(error)


@pytest.mark.parametrize("trailers", [None, (), (("grpc-status-details-bin", b"\xff\xff"),), (("other", "x"),)])
def test_details_that_are_missing_or_broken_leave_the_status(trailers: Any) -> None:
    error = translation(GrpcError(StatusCode.NOT_FOUND, None, trailers))
    assert isinstance(error, NotFoundError)
    assert str(error) == "NOT_FOUND"
    assert (error.reason, error.request_id, error.metadata) == (None, None, {})


def test_other_exceptions_pass_unchanged() -> None:
    with pytest.raises(KeyError), translated("host:50051", Deadline(None)):
        raise KeyError


@pytest.mark.parametrize("kind", [SDError, *SDError.__subclasses__()])
def test_an_error_is_public_and_can_be_pickled(kind: type[SDError]) -> None:
    assert getattr(sdclient, kind.__name__) is kind
    assert f"{kind.__module__}.{kind.__name__}" == f"sdclient.{kind.__name__}"
    error = kind("what", code="ABORTED", reason="R", request_id="r1", violations={"width": "x"}, retry_after=0.0)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (kind, "what", vars(error))

"""The SDK against servers that do not keep the contract, played by `grpc_testing` through `Client(channel=...)`."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
import grpc_testing
import pytest
from fake_service import accepted, finished, image, progress
from sdapi.v1 import generation_pb2
from sdclient import Client, Finished, Image, Progress, ServerError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdclient import Event

SERVICE = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]


def unknown() -> generation_pb2.GenerateResponse:
    """An event of a later version: field 15, a string."""
    return generation_pb2.GenerateResponse.FromString(b"\x7a\x03new")


def outcome(*responses: generation_pb2.GenerateResponse, code: grpc.StatusCode = grpc.StatusCode.OK) -> list[Event]:
    """What a client gets from a server that sends these responses and then this status."""
    with calling() as (channel, result):
        _, _, call = channel.take_unary_stream(SERVICE.methods_by_name["Generate"])
        call.send_initial_metadata(())
        for response in responses:
            call.send_response(response)
        call.terminate((), code, "" if code is grpc.StatusCode.OK else "broken")
        return result.result(10)


@contextmanager
def calling() -> Iterator[tuple[Any, Future[list[Event]]]]:
    channel = grpc_testing.channel([SERVICE], grpc_testing.strict_real_time())

    def call() -> list[Event]:
        with Client(channel=channel) as client, client.stream("a lake") as events:
            return list(events)

    with ThreadPoolExecutor(1) as pool:
        yield channel, pool.submit(call)


def test_a_stream_without_accepted_is_read() -> None:
    assert [type(event) for event in outcome(progress(1, 1), image(), finished())] == [Progress, Image, Finished]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_event_of_a_later_version_is_skipped(place: int) -> None:
    responses = [image(), finished()]
    responses.insert(place, unknown())
    assert [type(event) for event in outcome(*responses)] == [Image, Finished]


def test_a_response_without_an_event_is_skipped() -> None:
    assert [type(event) for event in outcome(generation_pb2.GenerateResponse(), finished())] == [Finished]


@pytest.mark.parametrize("responses", [(), (accepted(),), (accepted(), image())], ids=["empty", "accepted", "image"])
def test_a_stream_that_ends_without_finished_is_an_error(
    responses: tuple[generation_pb2.GenerateResponse, ...],
) -> None:
    with pytest.raises(ServerError, match="ended the stream early: images may be missing"):
        outcome(*responses)


def test_a_status_after_finished_is_still_an_error() -> None:
    with pytest.raises(ServerError, match="broken"):
        outcome(image(), finished(), code=grpc.StatusCode.INTERNAL)


def test_a_status_that_this_version_does_not_expect_is_a_server_error() -> None:
    with pytest.raises(ServerError) as caught:
        outcome(code=grpc.StatusCode.DATA_LOSS)
    assert caught.value.code == "DATA_LOSS"

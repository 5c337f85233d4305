"""What the tests of the wire have in common: requests, streams read to their end, error details."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from PIL import Image
from sdapi.v1 import generation_pb2

if TYPE_CHECKING:
    from sdapi.v1.generation_pb2_grpc import GenerationServiceAsyncStub

TEXT = "a lake at dusk"


def a_request(**fields: Any) -> generation_pb2.GenerateRequest:
    fields.setdefault("prompts", [generation_pb2.Prompt(text=TEXT)])
    fields.setdefault("steps", 4)
    fields.setdefault("width", 64)
    fields.setdefault("height", 64)
    # Files that say how they were made differ wherever their requests do, even if their pixels are the same.
    fields.setdefault("output", generation_pb2.Output(metadata=False))
    return generation_pb2.GenerateRequest(**fields)


async def events_of(
    stub: GenerationServiceAsyncStub, request: generation_pb2.GenerateRequest
) -> list[generation_pb2.GenerateResponse]:
    return [event async for event in stub.Generate(request)]


def images_of(events: list[generation_pb2.GenerateResponse]) -> list[generation_pb2.Image]:
    """In the order of their indices: they come as they are finished."""
    return sorted((event.image for event in events if event.HasField("image")), key=lambda image: image.index)


async def image_of(stub: GenerationServiceAsyncStub, request: generation_pb2.GenerateRequest) -> Image.Image:
    [image] = images_of(await events_of(stub, request))
    return Image.open(io.BytesIO(image.data))


async def failure_of(stub: GenerationServiceAsyncStub, request: generation_pb2.GenerateRequest) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await events_of(stub, request)
    return caught.value


def details_of(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    [data] = [value for key, value in error.trailing_metadata() or () if key == "grpc-status-details-bin"]
    status = Status.FromString(data)
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    for detail in status.details:
        if detail.Is(kind.DESCRIPTOR):
            message = kind()
            detail.Unpack(message)
            return message
    return None


def violations_of(error: grpc.aio.AioRpcError) -> dict[str, str]:
    bad = details_of(error, error_details_pb2.BadRequest)
    return {violation.field: violation.description for violation in bad.field_violations}

"""The client of several Tritons behind one name."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import grpc
from sdserver.backends.triton import TritonBackend
from tritonclient.grpc import service_pb2, service_pb2_grpc

if TYPE_CHECKING:
    from sdserver.engines import Catalog

if TYPE_CHECKING:
    from sdserver.engines import Catalog


class ReadyTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Says that every model is ready, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802 (gRPC's name)
        self.asked += 1
        return service_pb2.ModelReadyResponse(ready=True)


async def test_several_tritons_behind_one_name_take_turns_and_a_stopped_one_is_passed_over(catalog: Catalog) -> None:
    engine = catalog.default
    async with AsyncExitStack() as stack:
        tritons, servers, addresses = [ReadyTriton() for _ in range(3)], [], []
        for triton in tritons:
            server = grpc.aio.server()
            service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, server)
            addresses.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
            await server.start()
            stack.push_async_callback(server.stop, None)
            servers.append(server)
        backend = TritonBackend(f"ipv4:{','.join(addresses)}")
        stack.push_async_callback(backend.close)

        for _ in range(8):
            assert await backend.is_ready(engine)
        counts = [triton.asked for triton in tritons]
        assert sum(counts) == 8 * len(engine.models)
        assert all(counts)

        await servers[0].stop(None)
        before = tritons[0].asked
        for _ in range(8):
            assert await backend.is_ready(engine)
        assert tritons[0].asked == before

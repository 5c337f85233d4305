"""The servicer of `sdapi.v1.GenerationService`, and the door through which every failure leaves as a status."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import grpc
import structlog
from google.protobuf.message import DecodeError
from sdapi.v1 import generation_pb2
from sdapi.v1.generation_pb2_grpc import GenerationServiceServicer

from sdserver import wire
from sdserver.errors import (
    GenerationFailed,
    InvalidRequest,
    PromptBlocked,
    RequestError,
    TimeLimit,
    Unavailable,
    to_status,
)
from sdserver.observation import CURRENT_CALL, Call, Observer
from sdserver.request import Event, Finished
from sdserver.tenants import Tenants

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sdserver.block_list import BlockList
    from sdserver.engines import Catalog, Engine
    from sdserver.pipeline import Pipeline
    from sdserver.request import GenerationRequest
    from sdserver.safety import SafetyMode

log = structlog.get_logger()

SERVICE = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name

# Headers by which callers say of which trace a call is a part. The others are nobody's business, API keys above all.
PROPAGATED = {"traceparent", "tracestate", "baggage"}

# A request of so many bytes without a picture is read in a millisecond or two.
QUICK_BYTES = 16 * 2**10

Context = grpc.aio.ServicerContext[Any, Any]


class Readiness(Protocol):
    """What the service asks and tells about engines."""

    def is_ready(self, engine: Engine) -> bool:
        """Whether the engine's models answer, as far as is known."""
        ...

    def doubt(self, engine: Engine) -> None:
        """The engine's models did not answer just now."""
        ...


class GenerationService(GenerationServiceServicer):
    """Generates images and lists engines."""

    def __init__(
        self,
        catalog: Catalog,
        pipeline: Pipeline,
        readiness: Readiness,
        send_timeout_seconds: float,
        safety_mode: SafetyMode | None = None,
        block_list: BlockList | None = None,
    ) -> None:
        self._catalog = catalog
        self._pipeline = pipeline
        self._readiness = readiness
        self._send_timeout_seconds = send_timeout_seconds
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._safety_mode = safety_mode
        self._block_list = block_list

    async def Generate(self, message: generation_pb2.GenerateRequest, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        call = CURRENT_CALL.get()
        call.request_id = wire.request_id(message)
        structlog.contextvars.bind_contextvars(request_id=call.request_id)
        request = replace(await self._read(message, call.request_id), tenant=call.tenant)
        call.engine = request.engine.id
        call.facts = _facts(request)
        if not self._readiness.is_ready(request.engine):
            raise Unavailable(
                f"engine {request.engine.id} is not ready: Triton cannot be reached or its models are loading; "
                "retry later",
                "ENGINE_NOT_READY",
                engine=request.engine.id,
            )
        try:
            async with aclosing(self._pipeline.generate(request)) as events:
                async for event in events:
                    await self._send(event, context)
        except Unavailable as error:
            if error.reason != "SERVER_STOPPING":
                self._readiness.doubt(request.engine)
            raise

    async def _read(self, message: generation_pb2.GenerateRequest, request_id: str) -> GenerationRequest:
        pictures = message.HasField("init_image") or message.HasField("depth_map")
        if not pictures and message.ByteSize() <= QUICK_BYTES:
            return wire.to_request(message, request_id, self._catalog, self._block_list)
        # Decoding a picture or searching long prompts takes time and memory: off the event loop, and one at a time.
        return await asyncio.get_running_loop().run_in_executor(
            self._reader, wire.to_request, message, request_id, self._catalog, self._block_list
        )

    async def ListEngines(  # noqa: N802
        self, message: generation_pb2.ListEnginesRequest, context: Context
    ) -> generation_pb2.ListEnginesResponse:
        return generation_pb2.ListEnginesResponse(
            engines=[
                wire.from_engine(engine, self._readiness.is_ready(engine), self._safety_mode)
                for engine in self._catalog
            ]
        )

    async def _send(self, event: Event, context: Context) -> None:
        if isinstance(event, Finished):
            log.info("generated", **asdict(event.usage), **_rounded(asdict(event.timings)))
        try:
            # A reader that has stopped reading must not hold its place for ever.
            async with asyncio.timeout(self._send_timeout_seconds):
                await context.write(wire.from_event(event))
        except TimeoutError as error:
            raise TimeLimit(
                f"the caller has not read its events for {self._send_timeout_seconds:g} s; read them as they come"
            ) from error


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Makes every failure of this service a status with details, and none of its insides visible.

    It also asks who calls, and parses the messages: gRPC's own answer to bytes that are no message is UNKNOWN with a
    Python class name. Other services, health and reflection, are for everybody.
    """

    def __init__(self, tenants: Tenants | None = None, observer: Observer | None = None) -> None:
        self._tenants = tenants or Tenants(None)
        self._observer = observer or Observer()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        method: str = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None or not method.startswith(f"/{SERVICE}/"):
            return handler
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._guarded(method, handler.unary_stream, handler.request_deserializer),
                response_serializer=handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._guarded(method, handler.unary_unary, handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _guarded(self, method: str, behavior: Any, parse: Any) -> Any:
        async def guarded(data: bytes, context: Context) -> Any:
            structlog.contextvars.clear_contextvars()
            headers = tuple(context.invocation_metadata() or ())
            call = Call(method, {name: str(value) for name, value in headers if name in PROPAGATED})
            CURRENT_CALL.set(call)
            with self._observer.call(call):
                try:
                    call.tenant = self._tenants.of(headers)
                    if self._tenants.known:
                        structlog.contextvars.bind_contextvars(tenant=call.tenant)
                    return await behavior(_parsed(parse, data), context)
                except RequestError as error:
                    _log(error)
                    await _abort(error, call, context)
                except grpc.aio.AbortError:
                    raise
                except asyncio.CancelledError:
                    # gRPC cancels the call of a caller that has gone as well as one that is out of time.
                    left = context.time_remaining()
                    call.outcome = "cancelled" if left is None or left > 0 else "deadline_exceeded"
                    raise
                except Exception:
                    log.exception("failed", reason="INTERNAL")
                    hidden = GenerationFailed("an internal error of the server; its log has the details", "INTERNAL")
                    await _abort(hidden, call, context)

        return guarded


def _parsed(parse: Any, data: bytes) -> Any:
    try:
        return parse(data)
    except DecodeError:
        raise InvalidRequest({"request": "the bytes are not a message of this method; check the schema"}) from None


def _log(error: RequestError) -> None:
    if error.code is grpc.StatusCode.INTERNAL:
        log.error("failed", reason=error.reason, message=error.message, exc_info=error.__cause__)
    else:
        found = {"block_list_lines": error.found} if isinstance(error, PromptBlocked) else {}
        log.info("refused", reason=error.reason, message=error.message, **found)


async def _abort(error: RequestError, call: Call, context: Context) -> NoReturn:
    call.outcome, call.reason = error.code.name.lower(), error.reason
    trailers: list[tuple[str, str | bytes]] = [
        ("grpc-status-details-bin", to_status(error, call.request_id).SerializeToString())
    ]
    if error.retry_after is not None:
        # Tells gRPC's own retries, which the SDK turns on, when to come back (gRFC A6).
        trailers.append(("grpc-retry-pushback-ms", str(int(error.retry_after * 1000))))
    await context.abort(error.code, error.message, tuple(trailers))


def _facts(request: GenerationRequest) -> dict[str, str | int | float]:
    """What of a request says how much work it is; nothing of what its prompts say."""
    return {
        "width": request.width,
        "height": request.height,
        "steps": request.steps,
        "image_count": request.image_count,
        "sampler": request.sampler,
    }


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {f"{name}_seconds": round(value, 4) for name, value in seconds.items()}

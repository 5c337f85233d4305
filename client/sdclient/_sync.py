"""The blocking client. `_async` is its twin: what one gains, the other gains."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from . import _wire
from ._errors import Deadline, ServerError, translated
from ._events import Finished, Image

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator
    from types import TracebackType
    from typing import Self, Unpack

    import grpc
    from sdapi.v1.generation_pb2 import GenerateResponse

    from ._events import Event
    from ._types import Engine, GenerateOptions, Prompts, Tls


class Client:
    """A connection to a server, for any number of calls from any threads.

        with Client("localhost:50051") as client:
            [image] = client.generate("a lake at dusk", width=384, height=128, seed=7)
            image.save("lake.png")

    Every method raises SDError (see its subclasses). A call that finds no server or a busy one is repeated a few times,
    as long as nothing of its answer has arrived, and within its timeout.

    Where the caller's program uses OpenTelemetry, a call is a part of the trace that is active then.
    """

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        timeout: float | None = 600.0,
        api_key: str | None = None,
        tls: bool | str | os.PathLike[str] | Tls = False,
        channel: grpc.Channel | None = None,
    ) -> None:
        """Connects at the first call.

        Args:
            target: The server as `host:port`, or any other target of gRPC, such as `unix:///run/sd.sock`.
            timeout: Seconds that a generation may take, waiting included. None: no limit.
            api_key: Sent with every call; readable on the way unless `tls` is on.
            tls: True trusts the public authorities, a path the authorities in that PEM file; a `Tls` can show a
                certificate of this client, too.
            channel: A channel of your own, with its own credentials and options, instead of one to `target`. Closing
                it is up to you.
        """
        import grpc
        from sdapi.v1.generation_pb2_grpc import GenerationServiceStub

        self._target = target if channel is None else "the server"
        self._timeout = timeout
        self._api_key = api_key
        self._own_channel: grpc.Channel | None = None
        if channel is None:
            credentials = _wire.credentials(tls)
            if credentials is None:
                channel = grpc.insecure_channel(target, _wire.CHANNEL_OPTIONS)
            else:
                channel = grpc.secure_channel(target, credentials, _wire.CHANNEL_OPTIONS)
            self._own_channel = channel
        self._stub = GenerationServiceStub(channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel the calls that are under way and close the connection."""
        if self._own_channel is not None:
            self._own_channel.close()

    def generate(self, prompts: Prompts, **options: Unpack[GenerateOptions]) -> list[Image]:
        """Generate images and wait for them.

        Returns the images in the order of their index, `seed`, `seed + 1` and so on.
        """
        with self.stream(prompts, **options) as events:
            images = [event for event in events if isinstance(event, Image)]
        return sorted(images, key=lambda image: image.index)

    @contextmanager
    def stream(self, prompts: Prompts, **options: Unpack[GenerateOptions]) -> Iterator[Iterator[Event]]:
        """Generate images and see it happen: `Accepted`, then `Progress` and `Preview`, each `Image`, and `Finished`.

            with client.stream("a lake at dusk", steps=30) as events:
                for event in events:
                    match event:
                        case Progress(step, steps):
                            print(f"{step}/{steps}")
                        case Image():
                            event.save(f"lake-{event.index}.png")

        Leaving the block, by whatever way, cancels what the server has not finished.
        """
        request = _wire.to_request(prompts, options)
        deadline = Deadline(options.get("timeout", self._timeout))
        call = self._stub.Generate(request, timeout=deadline.seconds, metadata=_wire.call_metadata(self._api_key))
        try:
            yield _Events(call, self._target, deadline)
        finally:
            call.cancel()

    def engines(self, *, timeout: float | None = 10.0) -> list[Engine]:
        """The engines of the server with their limits, defaults and licences, the default engine first."""
        deadline = Deadline(timeout)
        with translated(self._target, deadline):
            response = self._stub.ListEngines(
                _wire.engines_request(), timeout=deadline.seconds, metadata=_wire.call_metadata(self._api_key)
            )
        return _wire.to_engines(response)


class _Events:
    """The events of one call, as they come."""

    def __init__(self, responses: Iterable[GenerateResponse], target: str, deadline: Deadline) -> None:
        self._responses = responses
        self._target = target
        self._deadline = deadline
        self._finished = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        with translated(self._target, self._deadline):
            for response in self._responses:
                event = _wire.to_event(response)
                if event is not None:
                    self._finished = isinstance(event, Finished)
                    return event
        if not self._finished:
            raise ServerError(f"{self._target} ended the stream early: images may be missing", code="INTERNAL")
        raise StopIteration

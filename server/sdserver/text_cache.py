"""Text states that were computed before: a repeated prompt costs no call of the text encoder."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdserver.observation import Observer

if TYPE_CHECKING:
    from sdserver.backends import Backend, EncodedText
    from sdserver.engines import Engine
    from sdserver.request import Emphasis, Lora

    Key = tuple[str, str, tuple[Emphasis, ...], tuple[tuple[str, float], ...]]


@dataclass(slots=True, eq=False)
class _Call:
    """A call of the text encoder, and how many callers wait for it."""

    task: asyncio.Task[EncodedText]
    waiting: int = 0


class TextCache:
    """Text states by engine digest, text, emphasis and LoRAs; the least recently used go first.

    The prompts' weights are not part of them.

    Holds at most `max_bytes` of states. Callers that ask for the same text at the same time share one call.
    """

    def __init__(self, backend: Backend, max_bytes: int, observer: Observer | None = None) -> None:
        self._backend = backend
        self._observer = observer or Observer()
        self._max_bytes = max_bytes
        self._bytes = 0
        self._known: OrderedDict[Key, EncodedText] = OrderedDict()
        self._running: dict[Key, _Call] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of the states that are held now."""
        return self._bytes

    async def encode_text(
        self, engine: Engine, text: str, emphasis: tuple[Emphasis, ...], loras: tuple[Lora, ...] = ()
    ) -> EncodedText:
        """What the backend's `encode_text` gives, with its errors; errors are not remembered.

        When the last caller that waits for a call is cancelled, so is the call.
        """
        # Only those count that change them.
        loras = tuple(lora for lora in loras if lora.weight != 0 and lora.info.text_encoder_modules)
        key = (engine.digest, text, emphasis, tuple((lora.info.sha256, lora.weight) for lora in loras))
        known = self._known.get(key)
        call = self._running.get(key)
        self._observer.text_asked(known=known is not None or call is not None)
        if known is not None:
            self._known.move_to_end(key)
            return known
        if call is None:
            call = _Call(asyncio.create_task(self._encode(key, engine, loras), name="encode text"))
            self._running[key] = call
        call.waiting += 1
        try:
            return await asyncio.shield(call.task)
        finally:
            call.waiting -= 1
            if call.waiting == 0:
                del self._running[key]
                call.task.cancel()

    async def close(self) -> None:
        """Cancels the calls that run; whoever waits for one is cancelled, too."""
        tasks = [call.task for call in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _encode(self, key: Key, engine: Engine, loras: tuple[Lora, ...]) -> EncodedText:
        _, text, emphasis, _ = key
        encoded = await self._backend.encode_text(engine, text, emphasis, loras)
        # Callers share the arrays.
        encoded.states.flags.writeable = False
        if encoded.features is not None:
            encoded.features.flags.writeable = False
        self._known[key] = encoded
        self._bytes += encoded.states.nbytes
        while self._bytes > self._max_bytes:
            _, oldest = self._known.popitem(last=False)
            self._bytes -= oldest.states.nbytes
        return encoded

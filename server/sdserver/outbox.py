"""Events on their way from a generation's work to its caller."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from sdserver.request import Preview, Progress

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from sdserver.request import Event

# Turns of the event loop from an event of a step to the model's next call being on its way.
TURNS = 4


class Outbox:
    """A queue in which a new progress, or an image's new preview, replaces an unread one."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._changed = asyncio.Event()
        self._closed = False

    def put(self, event: Event) -> None:
        stale = next((other for other in self._events if _replaces(event, other)), None)
        if stale is not None:
            self._events.remove(stale)
        self._events.append(event)
        self._changed.set()

    def close(self) -> None:
        self._closed = True
        self._changed.set()

    async def events(self) -> AsyncGenerator[Event, None]:
        while True:
            while self._events:
                yield self._events.popleft()
            if self._closed:
                return
            self._changed.clear()
            await self._changed.wait()
            # Sending takes time, which is free while the model works: its next call goes first.
            for _ in range(TURNS):
                await asyncio.sleep(0)


def _replaces(event: Event, unread: Event) -> bool:
    match event, unread:
        case Progress(), Progress():
            return True
        case Preview(), Preview():
            return event.index == unread.index
    return False

"""Whose rows go next: fair shares between tenants, and between the shapes of one.

Start-time fair queueing (Goyal, Vin and Cheng 1996, SIGCOMM): each tenant has a virtual time, which grows by the work
that it is given, and whose is least goes next. A tenant that comes, or comes back, starts at the virtual time of the
one that was served last, so that nobody saves up what he did not use. Shares then differ by no more than one batch, as
with deficit round robin, without its rounds, which newcomers would have to wait for.

Work is pixel-steps. The shapes of one tenant share by the same rule, with weights that fall with their pixels to the
power of 2: of two images, one of four times the pixels of the other, the large one gets a seventeenth of the work,
because small ones suffer more from waiting for large ones than these from them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable


# Beside three shapes of 2 to 4 times its pixels, an image then takes 1.4 times as long as alone, and at most twice, 99
# times of 100; with 1.5, 1.7 and 2.2 times (`benchmarks.scheduling`).
SMALL_FIRST = 2.0


class Ask(Protocol):
    """Rows of one shape that one tenant wants computed."""

    @property
    def tenant(self) -> str: ...

    @property
    def shape(self) -> Hashable:
        """What has to agree in a batch."""
        ...

    @property
    def row_work(self) -> int:
        """Work of each row, above 0; the same for all of a shape."""
        ...

    @property
    def waiting(self) -> int:
        """Rows that no batch has taken yet."""
        ...


A = TypeVar("A", bound=Ask)


@dataclass(slots=True, eq=False)
class _Flow(Generic[A]):
    """What waits of one tenant and shape, in order of arrival."""

    time: float
    asks: deque[A] = field(default_factory=deque)


@dataclass(slots=True, eq=False)
class _Tenant(Generic[A]):
    time: float
    flows: dict[Hashable, _Flow[A]] = field(default_factory=dict)
    served: float = 0.0
    """Virtual time of the flow that was served last."""

    def waits(self, shape: Hashable) -> bool:
        return shape in self.flows and bool(self.flows[shape].asks)

    def next_flow(self) -> tuple[Hashable, _Flow[A]] | None:
        waiting = [(shape, flow) for shape, flow in self.flows.items() if flow.asks]
        return min(waiting, key=lambda item: item[1].time) if waiting else None


@dataclass(frozen=True, slots=True)
class Turn(Generic[A]):
    """What a batch would begin with: the tenant and the shape whose turn it is."""

    shape: Hashable
    tenant: str
    time: tuple[float, float]
    """Virtual times of the tenant and of its shape."""
    first: A


class FairQueue(Generic[A]):
    """Asks that wait, by tenant and shape."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant[A]] = {}
        self._served = 0.0

    @property
    def rows(self) -> int:
        """Rows that wait."""
        return sum(
            ask.waiting for tenant in self._tenants.values() for flow in tenant.flows.values() for ask in flow.asks
        )

    def put(self, ask: A) -> None:
        """Adds an ask behind those of its tenant and shape."""
        tenant = self._tenants.setdefault(ask.tenant, _Tenant(self._served))
        if not any(flow.asks for flow in tenant.flows.values()):
            tenant.time = max(tenant.time, self._served)
        flow = tenant.flows.setdefault(ask.shape, _Flow(tenant.served))
        if not flow.asks:
            flow.time = max(flow.time, tenant.served)
        flow.asks.append(ask)

    def remove(self, ask: A) -> None:
        """Takes an ask out, if it still waits."""
        tenant = self._tenants.get(ask.tenant)
        flow = tenant.flows.get(ask.shape) if tenant else None
        if flow is not None and ask in flow.asks:
            flow.asks.remove(ask)

    def turn(self) -> Turn[A] | None:
        """Whose turn it is; None: nobody waits."""
        best: Turn[A] | None = None
        for name, tenant in self._tenants.items():
            if (best is None or tenant.time < best.time[0]) and (found := tenant.next_flow()):
                shape, flow = found
                best = Turn(shape, name, (tenant.time, flow.time), flow.asks[0])
        return best

    def waiting(self, shape: Hashable, most: int) -> int:
        """Rows of a shape that wait, over all tenants, as far as `most`."""
        rows = 0
        for tenant in self._tenants.values():
            if shape in tenant.flows:
                for ask in tenant.flows[shape].asks:
                    rows += ask.waiting
                    if rows >= most:
                        return most
        return rows

    def time_of(self, tenant: str, shape: Hashable) -> tuple[float, float]:
        """Virtual times of a tenant and its shape, as far as they have come."""
        known = self._tenants.get(tenant)
        flow = known.flows.get(shape) if known else None
        return (known.time, flow.time if flow else known.served) if known else (self._served, 0.0)

    def take(self, turn: Turn[A], room: int, took: Callable[[A, int], None]) -> None:
        """Gives `room` rows of the turn's shape, its tenant's first, then those of whose turn comes next.

        `took(ask, rows)` says how many rows of an ask are taken and must take them off `ask.waiting`. They count as
        served.
        """
        name, batch_work = turn.tenant, room * turn.first.row_work
        head = self._tenants[name]
        self._served, head.served = head.time, turn.time[1]
        while room > 0:
            tenant = self._tenants[name]
            flow = tenant.flows[turn.shape]
            ask = flow.asks[0]
            rows = min(ask.waiting, room)
            work, less = rows * ask.row_work, ask.row_work**SMALL_FIRST
            if tenant is head:
                tenant.time += work
                flow.time += work * less
            else:
                # Who rides along in room that is left owes no more for it than one batch.
                tenant.time = max(tenant.time, min(tenant.time + work, self._served + batch_work))
                flow.time = max(flow.time, min(flow.time + work * less, tenant.served + batch_work * less))
            took(ask, rows)
            room -= rows
            if ask.waiting == 0:
                flow.asks.popleft()
            others = [other for other, known in self._tenants.items() if known.waits(turn.shape)]
            if not others:
                break
            name = min(others, key=lambda other: self._tenants[other].time)
        self._forget()

    def reset(self) -> None:
        """Forgets who was served; for when nobody waits, nor is being served and will come back."""
        self._tenants.clear()
        self._served = 0.0

    def _forget(self) -> None:
        """Drops what would start anew at the same virtual time."""
        for tenant in self._tenants.values():
            for shape in [s for s, flow in tenant.flows.items() if not flow.asks and flow.time <= tenant.served]:
                del tenant.flows[shape]
        for name in [n for n, t in self._tenants.items() if not t.flows and t.time <= self._served]:
            del self._tenants[name]

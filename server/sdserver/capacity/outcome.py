"""What a simulation is given beside its requests, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdserver.cost_model import CostModel, StageCosts
    from sdserver.engines import Engine


@dataclass(frozen=True, slots=True)
class Pool:
    """GPUs, each with a Triton, and the servers whose calls they take in turn."""

    gpus: int = 1
    servers: int = 1
    max_active: int = 8
    """Generations of a server that run at a time."""
    max_queued: int = 64
    """Generations of a server that may wait."""
    parallel_calls: int = 1
    """Calls of a model that a server takes to be answered at a time; one more waits behind them."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What everything takes, in seconds."""

    engine: Engine
    unet: CostModel
    stages: StageCosts
    server_step: float = 0.0
    """Of a server's event loop, for each step of an image."""
    batched_by: CostModel | None = None
    """What the servers take the UNet's costs for when they bound batches; None: what they are."""


@dataclass(slots=True)
class Outcome:
    """What was seen; of requests, of those that count."""

    images: int = 0
    refused: int = 0
    latencies: list[float] = field(default_factory=list)
    """Seconds from arrival to end."""
    waits: list[float] = field(default_factory=list)
    """Seconds from arrival to a place."""
    ends: list[float] = field(default_factory=list)
    """When requests ended, ascending; those that do not count, too."""
    began: float = 0.0
    """When the first one arrived."""
    rows: int = 0
    """Of all UNet calls."""
    room: int = 0
    """The most rows that these calls could have had."""
    busy: float = 0.0
    """Seconds of all GPUs together."""
    gpus: int = 1

    @property
    def requests(self) -> int:
        """Those that were not refused."""
        return len(self.latencies)

    @property
    def seconds(self) -> float:
        """From the first arrival that counts to the last end."""
        return self.ends[-1] - self.began

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    @property
    def refused_share(self) -> float:
        return self.refused / (self.refused + self.requests)

    @property
    def busy_share(self) -> float:
        """Of the GPUs' time."""
        return self.busy / (self.gpus * self.ends[-1])

    @property
    def fill(self) -> float:
        """Rows of UNet calls over the most that they could have."""
        return self.rows / self.room

    def quantile(self, share: float) -> float:
        """The latency that so many requests stay below."""
        return quantile(self.latencies, share)

    def wait_quantile(self, share: float) -> float:
        """The wait for a place that so many requests stay below."""
        return quantile(self.waits, share)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share of them lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

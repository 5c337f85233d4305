"""What `/metrics` says of a stretch of time: two scrapes, and the difference between them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Series = tuple[str, frozenset[tuple[str, str]]]


@dataclass(frozen=True)
class Scrape:
    """The figures of one server at a time, in seconds of a monotonic clock."""

    time: float
    values: Mapping[Series, float]

    @classmethod
    def of(cls, text: str, time: float) -> Scrape:
        """Reads the text format. Raises ValueError where it is none."""
        families = list(text_string_to_metric_families(text))
        if not any(family.name.startswith("sdserver_") for family in families):
            raise ValueError("no figures of an sdserver are there")
        return cls(
            time,
            {
                (sample.name, frozenset(sample.labels.items())): sample.value
                for family in families
                for sample in family.samples
            },
        )


class Figures:
    """Several servers from one scrape of each to the next, taken together. Names are without `sdserver_`."""

    def __init__(self, scrapes: Sequence[tuple[Scrape, Scrape]]) -> None:
        self._scrapes = tuple(scrapes)

    @property
    def servers(self) -> int:
        return len(self._scrapes)

    @property
    def seconds(self) -> float:
        """The mean time between two scrapes of a server."""
        times = [after.time - before.time for before, after in self._scrapes]
        return sum(times) / len(times) if times else 0.0

    def now(self, name: str, **labels: str) -> list[float]:
        """A gauge as each server has it."""
        return [value for _, after in self._scrapes for _, value in _matching(after, name, labels)]

    def rise(self, name: str, **labels: str) -> float:
        """How much a counter has grown, over all series with these labels, and all servers."""
        total = 0.0
        for before, after in self._scrapes:
            for series, value in _matching(after, name, labels):
                earlier = before.values.get(series, 0.0)
                # A server that has been restarted counts from 0.
                total += value - earlier if value >= earlier else value
        return total

    def rate(self, name: str, **labels: str) -> float:
        """The same a second."""
        return self.rise(name, **labels) / self.seconds if self.seconds else 0.0

    def mean(self, name: str, **labels: str) -> float:
        """The mean of a histogram or summary; NaN where there was nothing."""
        count = self.rise(f"{name}_count", **labels)
        return self.rise(f"{name}_sum", **labels) / count if count else math.nan

    def quantile(self, share: float, name: str, **labels: str) -> float:
        """The value below which this share of a histogram's observations is; NaN where there was nothing.

        Taken to lie evenly within their bucket, as Prometheus does; what is above all buckets counts as the last bound.
        """
        bounds = sorted(self.labels(f"{name}_bucket", "le", **labels), key=float)
        rises = [self.rise(f"{name}_bucket", le=bound, **labels) for bound in bounds]
        if not rises or rises[-1] == 0:
            return math.nan
        rank = share * rises[-1]
        for (low, below), (high, upto) in pairwise(zip([0.0, *map(float, bounds)], [0.0, *rises], strict=True)):
            if upto >= rank and upto > below:
                return low if math.isinf(high) else low + (high - low) * (rank - below) / (upto - below)
        return math.nan

    def labels(self, name: str, label: str, **labels: str) -> list[str]:
        """The values of a label, in order."""
        series = (series for _, after in self._scrapes for series, _ in _matching(after, name, labels))
        return sorted({value for _, found in series for key, value in found if key == label})


def _matching(scrape: Scrape, name: str, labels: Mapping[str, str]) -> Iterator[tuple[Series, float]]:
    wanted = frozenset(labels.items())
    for series, value in scrape.values.items():
        if series[0] == f"sdserver_{name}" and wanted <= series[1]:
            yield series, value

"""What benchmarks through the real Triton share."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sdserver import cost_model
from sdserver.backends.triton import TritonBackend
from sdserver.calibrate import measure, measure_stages
from sdserver.engines import load_catalog
from sdserver.observation import Observer, StepObserver
from sdserver.settings import ServeSettings
from sdserver.triton_process import TritonProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from sdserver.observation import StepModel


@dataclass(frozen=True, slots=True)
class Call:
    """One UNet call that has ended."""

    ended: float
    rows: int
    useful: int
    bound: int
    seconds: float


@dataclass
class Calls(Observer):
    """Keeps the UNet calls of a server."""

    calls: list[Call] = field(default_factory=list)

    def steps(self, engine: str, model: StepModel) -> StepObserver:
        if model != "unet":
            return StepObserver()
        calls = self.calls

        class Keeps(StepObserver):
            def called(self, rows: int, useful: int, bound: int, seconds: float, padded: int = 0) -> None:
                calls.append(Call(time.perf_counter(), rows, useful, bound, seconds))

        return Keeps()

    def useful_rows(self, since: float, until: float) -> int:
        """Rows of calls that ended between two times of `time.perf_counter`."""
        return sum(call.useful for call in self.calls if since <= call.ended < until)

    def fill(self, since: float, until: float) -> float:
        """Rows over the bound, of calls that ended between two times of `time.perf_counter`."""
        calls = [call for call in self.calls if since <= call.ended < until]
        return sum(call.rows for call in calls) / max(1, sum(call.bound for call in calls))


@asynccontextmanager
async def triton() -> AsyncIterator[ServeSettings]:
    """Settings of a server on a free port for the shipped engine, which a Triton of its own serves."""
    settings = ServeSettings(port=0)
    models = load_catalog(settings.model_repository).default.models
    async with TritonProcess(settings.model_repository, models, grpc_port=0, http_port=0, metrics_port=0) as process:
        yield settings.model_copy(update={"triton_url": f"127.0.0.1:{process.grpc_port}"})


@asynccontextmanager
async def calibrated(settings: ServeSettings) -> AsyncIterator[ServeSettings]:
    """The settings with cost models of what was just measured, as `sdserver calibrate` would."""
    engine = load_catalog(settings.model_repository).default
    backend = TritonBackend(settings.triton_url)
    try:
        measurements = await measure(engine, backend, seconds=20)
        stages = await measure_stages(engine, backend)
    finally:
        await backend.close()
    with tempfile.TemporaryDirectory() as folder:
        cost_model.write(Path(folder), engine, cost_model.fit(measurements), measurements, stages)
        yield settings.model_copy(update={"cost_models": Path(folder)})


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share of them lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def spread(values: Sequence[float], unit: str = "", digits: int = 2) -> str:
    """Median and range, as a person reads them."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


def machine() -> str:
    """What the figures were taken on."""
    return f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}"

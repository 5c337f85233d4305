"""What a call of a UNet costs, and how many rows are worth putting into one.

    seconds(rows, places) = call + rows * (place * places + square * places^2)

`places` is the latents' height times width: convolutions grow with it, attention with its square. `sdserver calibrate`
measures calls and fits the three numbers. What is done once an image is measured beside them, for `sdserver plan`.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import structlog

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sdserver.engines import Engine

log = structlog.get_logger()

# A batch is full when more rows would save no more than this share of a row's time.
WORTH_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Measurement:
    """Seconds, by their median, of a call of so many rows of so many places."""

    rows: int
    places: int
    seconds: float


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of a call, of a row's place, and of a pair of places of a row."""

    call: float
    place: float
    square: float

    def seconds(self, rows: int, places: int) -> float:
        """Expected seconds of a call."""
        return self.call + rows * self.row(places)

    def worthwhile_rows(self, places: int) -> int:
        """Rows from which on a call's own cost is at most WORTH_SHARE of theirs; even, as guidance asks in twos."""
        rows = math.ceil(self.call / (WORTH_SHARE * self.row(places)))
        return max(2, rows + rows % 2)

    def row(self, places: int) -> float:
        """Expected seconds that a row adds to a call."""
        return self.place * places + self.square * places**2


@dataclass(frozen=True, slots=True)
class StageCosts:
    """Seconds of what is done outside of the steps: of encoding a text, and for each place of an image's latents, of
    decoding it and of writing its PNG file."""

    encode: float
    decode_place: float
    write_place: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """What `sdserver calibrate` keeps of an engine. Files of older versions have no stages."""

    engine_digest: str
    cost_model: CostModel
    stages: StageCosts | None


def fit(measurements: Sequence[Measurement]) -> CostModel:
    """The cost model nearest to measurements of at least two shapes and two numbers of rows, by relative errors.

    None of its numbers is below 0. Raises ValueError if the measurements cannot tell them apart.
    """
    if len({m.rows for m in measurements}) < 2 or len({m.places for m in measurements}) < 2:
        raise ValueError("the measurements need at least two numbers of rows and two shapes")
    terms = np.array([[1.0, m.rows * m.places, m.rows * m.places**2] for m in measurements])
    seconds = np.array([m.seconds for m in measurements])
    # Each measurement counts by its relative error.
    terms /= seconds[:, None]
    # A number that comes out below 0 is 0; of the ways to leave some out, the one of the least error.
    best, least = np.zeros(3), np.inf
    for used in ([0, 1, 2], [0, 1], [1, 2], [0, 2], [1]):
        numbers = np.zeros(3)
        numbers[used] = np.linalg.lstsq(terms[:, used], np.ones(len(terms)), rcond=None)[0]
        error = float(np.square(terms @ numbers - 1).sum())
        if (numbers >= 0).all() and error < least:
            best, least = numbers, error
    call, place, square = map(float, best)
    return CostModel(call, place, square)


def read(folder: Path, engine: Engine) -> CostModel | None:
    """The cost model that `write` left for an engine; None if there is none, or only one of other weights."""
    path = folder / f"{engine.id}.json"
    if not path.exists():
        return None
    try:
        calibration = load(path)
    except CostModelError as error:
        log.warning("cost model cannot be read; run sdserver calibrate", path=str(path), error=str(error))
        return None
    if calibration.engine_digest != engine.digest:
        log.warning("cost model is of another version of the engine; run sdserver calibrate", engine=engine.id)
        return None
    return calibration.cost_model


class CostModelError(Exception):
    """A file is not one that `write` wrote; says why."""


def load(path: Path) -> Calibration:
    """What a file keeps. Raises CostModelError."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        stages = said.get("stages")
        return Calibration(
            said["engine_digest"], CostModel(**said["cost_model"]), None if stages is None else StageCosts(**stages)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CostModelError(f"{type(error).__name__}: {error}") from error


def write(
    folder: Path,
    engine: Engine,
    model: CostModel,
    measurements: Sequence[Measurement],
    stages: StageCosts | None = None,
) -> Path:
    """Keeps a cost model and what it was fitted to; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{engine.id}.json"
    said = {
        "engine_digest": engine.digest,
        "cost_model": asdict(model),
        "stages": None if stages is None else asdict(stages),
        "measurements": [asdict(measurement) for measurement in measurements],
    }
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)
    return path

"""What is fitted to measured calls, what is kept of it, and how it bounds batches."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pytest
from fakes import FakeBackend
from hypothesis import given
from hypothesis import strategies as st
from sdserver import cost_model
from sdserver.calibrate import chart, measure, measure_stages, numbers_of_rows, shapes
from sdserver.cost_model import Calibration, CostModel, Measurement, StageCosts
from sdserver.engine_schedulers import most_rows, unet_rows

if TYPE_CHECKING:
    from pathlib import Path

    from sdserver.engines import Catalog

TRUE = CostModel(call=0.006, place=1e-4, square=2e-8)


def measurements_of(model: CostModel, noise: float = 0.0) -> list[Measurement]:
    generator = np.random.default_rng(0)
    return [
        Measurement(rows, places, model.seconds(rows, places) * (1 + noise * generator.standard_normal()))
        for rows, places in product((1, 2, 4, 8, 16), (128, 256, 1024))
    ]


def test_a_fit_finds_what_the_measurements_follow() -> None:
    fitted = cost_model.fit(measurements_of(TRUE, noise=0.02))
    for rows, places in ((1, 256), (8, 512), (16, 1024)):
        assert fitted.seconds(rows, places) == pytest.approx(TRUE.seconds(rows, places), rel=0.05)


@given(st.floats(0, 0.1), st.floats(1e-6, 1e-3), st.floats(0, 1e-6))
def test_no_number_of_a_fit_is_below_zero_and_exact_measurements_are_met(
    call: float, place: float, square: float
) -> None:
    model = CostModel(call, place, square)
    fitted = cost_model.fit(measurements_of(model))
    assert min(fitted.call, fitted.place, fitted.square) >= 0
    assert fitted.seconds(4, 256) == pytest.approx(model.seconds(4, 256), rel=1e-3)


def test_a_fit_needs_shapes_and_numbers_of_rows() -> None:
    with pytest.raises(ValueError, match="two numbers of rows and two shapes"):
        cost_model.fit([Measurement(1, 256, 0.1), Measurement(2, 256, 0.2)])


@pytest.mark.parametrize(("call", "rows"), [(0.0, 2), (0.001, 2), (0.003, 4), (0.010, 10), (1.0, 1000)])
def test_a_batch_is_full_when_the_cost_of_the_call_is_a_twentieth_of_its_rows(call: float, rows: int) -> None:
    assert CostModel(call, place=0.02 / 256, square=0.0).worthwhile_rows(256) == rows


def test_larger_shapes_have_smaller_batches_and_none_is_above_that_of_the_engine(catalog: Catalog) -> None:
    engine = catalog.default
    costs = CostModel(call=0.05, place=1e-4, square=0.0)
    rows = [unet_rows(engine, costs, places) for places in (64, 256, 1024, 4096, 10**6)]
    assert rows == sorted(rows, reverse=True)
    assert rows[0] == engine.max_batch_rows
    assert rows[-1] == 1
    assert most_rows(engine, 16, 10**6) == 1


def test_what_was_measured_is_kept_until_the_engine_changes(catalog: Catalog, tmp_path: Path) -> None:
    engine = catalog.default
    assert cost_model.read(tmp_path / "none", engine) is None
    cost_model.write(tmp_path / "folder", engine, TRUE, measurements_of(TRUE))
    assert cost_model.read(tmp_path / "folder", engine) == TRUE
    assert cost_model.read(tmp_path / "folder", engine.model_copy(update={"digest": "sha256:other"})) is None
    for damaged in ("{", "[]", "{}"):
        (tmp_path / "folder" / f"{engine.id}.json").write_text(damaged)
        assert cost_model.read(tmp_path / "folder", engine) is None


def test_what_is_done_once_an_image_is_kept_beside_it(catalog: Catalog, tmp_path: Path) -> None:
    engine, stages = catalog.default, StageCosts(0.001, 2e-5, 3e-6)
    path = cost_model.write(tmp_path, engine, TRUE, measurements_of(TRUE), stages)
    assert cost_model.load(path) == Calibration(engine.digest, TRUE, stages)
    cost_model.write(tmp_path, engine, TRUE, measurements_of(TRUE))
    assert cost_model.load(path) == Calibration(engine.digest, TRUE, None)


async def test_calibrating_measures_what_is_done_once_an_image(catalog: Catalog) -> None:
    engine, backend = catalog.default, FakeBackend(encode_delay=0.002)
    stages = await measure_stages(engine, backend)
    assert stages.encode >= 0.002
    assert min(stages.decode_place, stages.write_place) > 0
    assert len(set(backend.texts)) == len(backend.texts) == backend.decoded


async def test_calibrating_measures_each_shape_with_one_row_and_with_the_most(catalog: Catalog) -> None:
    engine = catalog.default
    measured = await measure(engine, FakeBackend(delay=0.001), seconds=0.1)
    for height, width in shapes(engine):
        rows = {m.rows for m in measured if m.places == height * width}
        assert {1, most_rows(engine, engine.max_batch_rows, height * width)} <= rows
    assert all(m.seconds >= 0.001 for m in measured)
    assert chart(engine, cost_model.fit(measured), measured).row_count == len(measured)


@pytest.mark.parametrize(("most", "numbers"), [(1, [1]), (2, [1, 2]), (10, [1, 2, 4, 8, 10]), (16, [1, 2, 4, 8, 16])])
def test_numbers_of_rows_double_up_to_the_most(most: int, numbers: list[int]) -> None:
    assert numbers_of_rows(most) == numbers

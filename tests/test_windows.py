"""Windows cover everything, share what they should, and their weights make one whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sdserver.windows import Cover, Grid, cover

if TYPE_CHECKING:
    from numpy.typing import NDArray

sizes = st.integers(1, 24).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size - 1)))
lengths = st.integers(1, 60)


@st.composite
def covers(draw: st.DrawFn) -> Cover:
    return cover(draw(lengths), *draw(sizes), ring=draw(st.booleans()))


def seen(windows: Cover) -> NDArray[np.intp]:
    """[length] in how many windows each place lies."""
    return np.bincount(windows.places().ravel(), minlength=windows.length)


@given(covers())
def test_every_place_is_covered_and_no_window_holds_a_place_twice(windows: Cover) -> None:
    assert seen(windows).min() >= 1
    assert all(len(set(places)) == windows.size for places in windows.places())


@given(covers())
def test_the_weights_of_a_place_are_positive_and_sum_to_one(windows: Cover) -> None:
    weights = windows.weights()
    assert weights.min() > 0
    sums = np.zeros(windows.length)
    np.add.at(sums, windows.places(), weights)
    np.testing.assert_allclose(sums, 1, atol=1e-6)


@given(lengths, sizes)
def test_neighbours_share_the_overlap_and_one_window_fewer_could_not(length: int, size: tuple[int, int]) -> None:
    windows = cover(length, *size)
    wide, overlap = size
    gaps = np.diff(windows.starts)
    assert windows.starts[0] == 0
    assert windows.starts[-1] == length - windows.size
    assert all(gaps <= wide - overlap)
    count = len(windows.starts)
    assert count == 1 or length > wide + (count - 2) * (wide - overlap)


@given(lengths.filter(lambda length: length > 1), sizes)
def test_on_a_ring_every_border_of_a_window_is_inside_of_another(length: int, size: tuple[int, int]) -> None:
    windows = cover(length, *size, ring=True)
    wide, overlap = size
    count = len(windows.starts)
    gaps = np.diff([*windows.starts, windows.starts[0] + length])
    assert count >= 2
    assert all(gaps <= wide - overlap) or windows.size == length
    assert count == 2 or length > (count - 1) * (wide - overlap)
    if overlap:
        assert all(gaps < windows.size)


@given(lengths, sizes, st.booleans())
def test_windows_are_spread_evenly_from_both_ends(length: int, size: tuple[int, int], ring: bool) -> None:
    windows = cover(length, *size, ring=ring)
    gaps = np.diff([*windows.starts, windows.starts[0] + length] if ring else windows.starts)
    if len(gaps):
        assert gaps.max() - gaps.min() <= 1
    if not ring:
        mirrored = [windows.length - windows.size - start for start in reversed(windows.starts)]
        assert np.abs(np.subtract(windows.starts, mirrored)).max() <= 1


@settings(max_examples=30)
@given(covers(), covers(), st.integers(1, 3))
def test_what_is_split_and_joined_is_what_it_was(rows: Cover, columns: Cover, factor: int) -> None:
    grid = Grid(rows, columns).scaled(factor)
    whole = np.random.default_rng(0).standard_normal((2, rows.length * factor, columns.length * factor))
    parts = list(grid.split(whole))
    assert len(parts) == len(grid)
    np.testing.assert_allclose(grid.join(parts), whole, atol=1e-5)


@settings(max_examples=30)
@given(covers(), covers())
def test_gradients_go_back_through_splitting_and_joining(rows: Cover, columns: Cover) -> None:
    grid, random = Grid(rows, columns), np.random.default_rng(0)
    whole, parts = (
        random.standard_normal((2, rows.length, columns.length)),
        random.standard_normal((len(grid), rows.size, columns.size)),
    )
    # <split(a), b> = <a, sum(b)>, and <join(a), b> = <a, weighted(split(b))>.
    assert np.isclose(
        sum(np.vdot(a, b) for a, b in zip(grid.split(whole[0]), parts, strict=True)),
        np.vdot(whole[0], grid.sum(parts)),
        rtol=1e-3,
        atol=1e-3,
    )
    back = grid.weighted(grid.split(whole[1]))
    assert np.isclose(
        np.vdot(grid.join(parts), whole[1]),
        sum(np.vdot(a, b) for a, b in zip(parts, back, strict=True)),
        rtol=1e-3,
        atol=1e-3,
    )


@given(lengths, st.integers(0, 9))
def test_one_window_is_joined_exactly(length: int, more: int) -> None:
    grid = Grid(cover(length, length + more, 0), cover(7, 7, 3))
    whole = np.random.default_rng(1).standard_normal((length, 7)).astype(np.float32)
    assert len(grid) == 1
    assert grid.join(grid.split(whole)).tobytes() == whole.tobytes()


def test_the_weights_change_smoothly() -> None:
    for windows in (cover(100, 40, 20), cover(100, 40, 20, ring=True), cover(32, 32, 8, ring=True)):
        for weights in windows.weights():
            assert np.abs(np.diff(weights)).max() < 0.13


@pytest.mark.parametrize(("length", "size", "overlap"), [(10, 4, 4), (10, 4, -1), (0, 4, 1), (10, 0, 0)])
def test_windows_that_cannot_be_are_refused(length: int, size: int, overlap: int) -> None:
    with pytest.raises(ValueError, match="overlap"):
        cover(length, size, overlap)

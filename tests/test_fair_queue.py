"""Shares of the fair queue, by simulation: whoever is served comes back at once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sdserver.fair_queue import FairQueue


@dataclass(eq=False)
class An:
    """Rows that wait, for a shape named by its work."""

    tenant: str
    row_work: int
    waiting: int = 2

    @property
    def shape(self) -> int:
        return self.row_work


def serve(queue: FairQueue[An], room: int) -> list[tuple[An, int]]:
    turn = queue.turn()
    assert turn is not None
    taken: list[tuple[An, int]] = []

    def took(ask: An, rows: int) -> None:
        ask.waiting -= rows
        taken.append((ask, rows))

    queue.take(turn, room, took)
    return taken


def work_by_tenant(asks: list[An], room: int, turns: int, *, queue: FairQueue[An] | None = None) -> Counter[An]:
    """Work that each ask got, who comes back with as many rows as soon as it has none left."""
    queue = FairQueue() if queue is None else queue
    size = {ask: ask.waiting for ask in asks}
    for ask in asks:
        queue.put(ask)
    work: Counter[An] = Counter()
    for _ in range(turns):
        done = serve(queue, max(1, room))
        for ask, rows in done:
            work[ask] += rows * ask.row_work
        for ask in dict(done):
            if ask.waiting == 0:
                ask.waiting = size[ask]
                queue.put(ask)
    return work


def test_tenants_of_one_shape_get_the_same_however_many_images_they_have() -> None:
    busy, modest = [An("busy", 256) for _ in range(9)], An("modest", 256, 6)
    work = work_by_tenant([*busy, modest], room=6, turns=400)
    assert sum(work[ask] for ask in busy) == pytest.approx(work[modest], rel=0.02)


def test_tenants_get_the_same_work_whatever_the_shapes_and_however_many() -> None:
    many_shapes, large = [An("a", work) for work in (256, 512, 1024, 2048)], An("b", 4096)
    work = work_by_tenant([*many_shapes, large], room=2, turns=1000)
    assert sum(work[ask] for ask in many_shapes) == pytest.approx(work[large], rel=0.02)


def test_of_two_shapes_of_a_tenant_the_one_of_four_times_the_pixels_gets_a_sixteenth_of_the_others_work() -> None:
    small, large = An("a", 256), An("a", 1024)
    work = work_by_tenant([small, large], room=2, turns=6000)
    assert work[small] == pytest.approx(16 * work[large], rel=0.03)


def test_asks_of_one_tenant_and_shape_take_turns() -> None:
    asks = [An("a", 256) for _ in range(5)]
    work = work_by_tenant(asks, room=4, turns=250)
    assert max(work.values()) - min(work.values()) <= 2 * 256


def test_room_that_a_tenant_leaves_is_used_by_others_and_is_not_held_against_them() -> None:
    queue: FairQueue[An] = FairQueue()
    light, heavy = An("light", 256, 1), An("heavy", 256, 5)
    served = work_by_tenant([light, heavy], room=6, turns=100, queue=queue)
    assert served[heavy] == 5 * served[light]
    newcomer = An("newcomer", 256, 5)
    queue.put(newcomer)
    shares: Counter[str] = Counter()
    for _ in range(30):
        for ask, rows in serve(queue, 6):
            shares[ask.tenant] += rows
            if ask.waiting == 0:
                ask.waiting = 1 if ask is light else 5
                queue.put(ask)
    assert shares["heavy"] == pytest.approx(shares["newcomer"], abs=12)


def test_a_newcomer_is_served_next_but_has_saved_up_nothing() -> None:
    queue: FairQueue[An] = FairQueue()
    work_by_tenant([An("old", 256)], room=2, turns=1000, queue=queue)
    newcomer = An("new", 256, 100)
    queue.put(newcomer)
    order = []
    for _ in range(6):
        [(ask, _)] = serve(queue, 2)
        order.append(ask.tenant)
        if ask.waiting == 0:
            ask.waiting = 2
            queue.put(ask)
    assert order.count("new") in (3, 4)


def test_what_was_taken_out_is_not_served() -> None:
    queue: FairQueue[An] = FairQueue()
    gone, stays = An("a", 256), An("b", 256)
    queue.put(gone)
    queue.put(stays)
    queue.remove(gone)
    queue.remove(gone)
    assert queue.rows == 2
    assert [ask for ask, _ in serve(queue, 8)] == [stays]
    assert queue.turn() is None


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([64, 256, 576]), st.integers(1, 9)), max_size=20),
    st.integers(1, 8),
)
def test_every_row_is_served_once_and_batches_are_of_one_shape_and_no_larger_than_their_room(
    asked: list[tuple[str, int, int]], room: int
) -> None:
    queue: FairQueue[An] = FairQueue()
    asks = [An(*values) for values in asked]
    for ask in asks:
        queue.put(ask)
    rows: Counter[An] = Counter()
    while queue.turn() is not None:
        batch = serve(queue, room)
        assert len({ask.shape for ask, _ in batch}) == 1
        assert 0 < sum(count for _, count in batch) <= room
        for ask, count in batch:
            rows[ask] += count
    assert [rows[ask] for ask in asks] == [count for _, _, count in asked]
    assert queue.rows == 0

"""Who starts next, and who is told how long that takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sdserver.admission import Admission, Place
from sdserver.errors import QueueFull


def started(place: Place) -> bool:
    return place._started.is_set()


def leave(place: Place) -> None:
    place.__exit__(None, None, None)


def test_one_tenant_is_served_in_the_order_of_arrival() -> None:
    admission = Admission(1, 10)
    places = [admission.enter("a") for _ in range(4)]
    assert [place.position for place in places] == [0, 1, 2, 3]
    for number, place in enumerate(places):
        assert [started(each) for each in places] == [index <= number for index in range(4)]
        leave(place)


def test_a_long_line_of_one_tenant_does_not_hold_up_another() -> None:
    admission = Admission(2, 100)
    busy = [admission.enter("busy") for _ in range(20)]
    modest = admission.enter("modest")
    assert modest.position == 1
    assert not started(modest)
    leave(busy[0])
    assert started(modest)
    # Now both have one: the next place goes to who has come first.
    assert not started(busy[2])
    leave(busy[1])
    assert started(busy[2])


def test_the_line_has_an_end_for_all_together() -> None:
    admission = Admission(1, 2)
    for tenant in "abc":
        admission.enter(tenant)
    with pytest.raises(QueueFull, match="2 requests are waiting already"):
        admission.enter("d")
    assert (admission.active, admission.queued) == (1, 2)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.integers(1, 3))
def test_who_enters_last_waits_for_as_many_as_it_was_told(tenants: list[str], max_active: int) -> None:
    admission = Admission(max_active, 20)
    places = [admission.enter(tenant) for tenant in tenants]
    last = places[-1]
    # A place becomes free, and nobody's count of running ones falls: what the position is told by.
    before = 0
    while not started(last):
        admission._max_active += 1
        admission._fill()
        before += 1
    assert before == last.position


async def test_leaving_the_line_leaves_nothing_behind() -> None:
    admission = Admission(1, 10)
    places = [admission.enter(tenant) for tenant in "aabbc"]
    for place in places[1:]:
        leave(place)
    assert (admission.active, admission.queued) == (1, 0)
    leave(places[0])
    await admission.drain()

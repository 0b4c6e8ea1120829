"""Which connection a read takes, and when what is long rests."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from natsfs.store.lanes import LONG, QUICK_READ, QUICK_ROOM, REST, Courtesy, Long, is_quick


def test_what_is_quick() -> None:
    assert is_quick(4096, 0)
    assert is_quick(QUICK_READ, 0)
    assert is_quick(QUICK_READ, QUICK_ROOM - QUICK_READ)
    assert not is_quick(QUICK_READ + 1, 0)
    assert not is_quick(QUICK_READ, QUICK_ROOM - QUICK_READ + 1)


@given(st.lists(st.integers(0, 4 * QUICK_READ)))
def test_what_is_on_its_way_beside_the_metadata_is_bounded(reads: list[int]) -> None:
    outstanding = 0
    for expected in reads:
        if is_quick(expected, outstanding):
            assert expected <= QUICK_READ
            outstanding += expected
        assert outstanding <= QUICK_ROOM


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 2 * LONG))))
def test_what_is_long_rests_once_whenever_something_short_was_asked_for(
    parts: list[tuple[int, float]],
) -> None:
    courtesy, now = Courtesy(), 5.0
    courtesy.asked()
    long, other = Long(courtesy, now), Long(courtesy, now)
    for number, taken in parts:
        for _ in range(number):
            courtesy.asked()
        now += taken
        for one in (long, other):
            assert one.rest(now) == (REST if number and now - 5.0 > LONG else 0.0)
            assert one.rest(now) == 0.0

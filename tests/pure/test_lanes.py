"""Which connection a read takes, and when what is long rests."""

from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from natsfs.store.lanes import LONG, MIB, QUICK_READ, QUICK_ROOM, RECENT, REST, Courtesy, Long, is_quick


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


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 2 * LONG), st.integers(1, 4 * MIB))))
def test_what_is_long_rests_where_something_short_was_asked_for_a_moment_ago(
    parts: list[tuple[bool, float, int]],
) -> None:
    courtesy = Courtesy()
    courtesy.asked()
    long = Long(courtesy)
    now, began, last, asked, owed = 5.0, 5.0, -inf, -inf, 0
    for is_asked, taken, size in parts:
        now += taken
        if is_asked:
            courtesy.asked()
            asked = now
        if now - last > LONG:
            began = now
        last = now
        owed = owed + size if now - began > LONG and now - asked < RECENT else 0
        assert long.rest(now, size) == (REST * owed / MIB if owed >= MIB else 0.0)
        owed = 0 if owed >= MIB else owed

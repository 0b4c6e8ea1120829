"""Which connection a read takes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from natsfs.store.lanes import QUICK_READ, QUICK_ROOM, is_quick


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

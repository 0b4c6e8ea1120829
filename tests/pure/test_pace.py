"""How often a file that stays open is committed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natsfs.files.pace import EARLY, FACTOR, IDLE, PATIENCE, PIECE, RATE, SMALL, STEADY, Pace


@pytest.mark.semantics("commit-price")
@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.floats(0, 100)), max_size=60), st.booleans())
def test_all_uploads_stay_within_a_small_factor_of_the_size(
    steps: list[tuple[int, float]], growth: bool
) -> None:
    """Whatever a growing file is written like: closes of duplicates and its long life do not add up."""
    pace, size, uploaded, now = Pace(0.0), 0, 0, 0.0
    for more, pause in steps:
        size += more
        pace.wrote(now)
        now += pause
        if (pace.due(size, now) if growth else pace.affordable(size)) and size:
            pace.committed(size, now)
            uploaded += size
        assert uploaded <= FACTOR * size + SMALL * len(steps)
    small = [step for step in steps if step[0] > SMALL]
    if small and len(small) == len(steps):
        assert uploaded <= FACTOR * size


def test_a_file_at_rest_is_committed() -> None:
    pace = Pace(0.0)
    pace.wrote(1.0)
    assert not pace.due(100_000, 1.0 + IDLE - 0.1)
    assert pace.due(100_000, 1.0 + IDLE)


def test_a_copy_is_not_committed_in_the_middle_and_a_log_is() -> None:
    pace = Pace(0.0)
    for second in range(int(STEADY) * 4):
        pace.wrote(float(second))
        assert not pace.due(second * 10 * RATE, float(second)), "a copy"
        assert pace.due(second * 1000, float(second)) == (second >= STEADY), "a log"


def test_large_pieces_go_out_at_once_and_small_ones_in_a_go() -> None:
    pace = Pace(0.0)
    pace.wrote(0.01)
    assert pace.goes_out(EARLY, PIECE)
    assert not pace.goes_out(EARLY - 1, PIECE)
    assert not pace.goes_out(40 * EARLY, PIECE - 1)
    pace.wrote(PATIENCE)
    assert pace.goes_out(EARLY, PIECE - 1)
    assert not pace.goes_out(EARLY - 1, PIECE - 1)
    pace.published(PATIENCE)
    assert not pace.goes_out(EARLY, PIECE - 1)


def test_what_rests_goes_out() -> None:
    pace = Pace(0.0)
    pace.wrote(1.0)
    assert not pace.rests(EARLY, 1.0 + PATIENCE / 2)
    assert pace.rests(EARLY, 1.0 + PATIENCE)
    assert not pace.rests(EARLY - 1, 1.0 + PATIENCE)

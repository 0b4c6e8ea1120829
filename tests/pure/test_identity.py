"""Whether a listed store is the one that was known, by the sequences that it acknowledged."""

from __future__ import annotations

from natsfs.catalog.bucket import Identity
from natsfs.volume import Mounted

HERE = Identity("b", "2026-01-01T00:00:00Z")


def test_what_was_acknowledged_before_the_connection_has_to_be_there() -> None:
    mounted = Mounted("b", None)
    mounted.acknowledged(10, 1)
    assert mounted.identify(HERE, 10, 2) == HERE
    assert mounted.identify(HERE, 9, 3).epoch == 1


def test_what_was_acknowledged_since_says_nothing() -> None:
    """Two connections are lost one after the other, and the first one's listing is looked at only then."""
    mounted = Mounted("b", None)
    mounted.acknowledged(10, 1)
    mounted.acknowledged(12, 2)  # behind the listing of this generation
    mounted.acknowledged(14, 3)
    assert mounted.identify(HERE, 11, 2) == HERE
    assert mounted.highest == 14
    assert mounted.identify(HERE, 14, 3) == HERE
    assert mounted.identify(HERE, 13, 4).epoch == 1


def test_after_a_store_was_set_back_its_own_sequences_count() -> None:
    mounted = Mounted("b", None)
    mounted.acknowledged(10, 1)
    assert mounted.identify(HERE, 5, 2).epoch == 1
    assert mounted.identify(HERE, 5, 3).epoch == 1
    mounted.acknowledged(6, 3)
    assert mounted.identify(HERE, 5, 4).epoch == 2

"""Which files are fetched ahead: those behind one that is opened after another, in either order."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from natsfs.catalog.attributes import Defaults
from natsfs.catalog.bucket import Bucket, Identity
from natsfs.catalog.inodes import InodeTable, Node
from natsfs.catalog.metadata import Metadata
from natsfs.files.ahead import LAST_WINDOW, MOST_ENTRIES, Ahead

SMALL, MOST = 1000, 5000  # bytes


def directory(names: list[bytes], size: int = 0) -> Node:
    bucket = Bucket(Identity("b", ""), InodeTable(), Defaults(0, 0, 0o644, 0o755), None)
    for name in names:
        node = bucket.add_node(bucket.root, name, directory=False)
        node.meta = Metadata(name=name.decode(), bucket="b", nuid=name.decode(), size=size)
    return bucket.root


def child(parent: Node, name: bytes) -> Node:
    assert parent.children is not None
    return parent.children[name]


@given(st.integers(3, 300), st.booleans(), st.integers(1, 4), st.randoms(use_true_random=False))
def test_whoever_goes_through_a_directory_finds_the_rest_fetched(
    count: int, by_name: bool, step: int, rng: random.Random
) -> None:
    names = [b"%03d" % number for number in range(count)]
    rng.shuffle(names)
    root = directory(names)
    order = sorted(names) if by_name else names
    ahead, fetched = Ahead(SMALL, MOST), set[bytes]()
    for place, name in enumerate(order[::step]):
        assert place < 2 or name in fetched, "nobody has fetched what was to be expected"
        found = [node.name for node in ahead.opened(child(root, name))]
        assert len(found) == len(set(found)) <= 2 * LAST_WINDOW
        fetched |= set(found)


@given(st.integers(1, SMALL), st.integers(1, 4))
def test_only_so_many_bytes_are_on_their_way(size: int, step: int) -> None:
    names = [b"%03d" % number for number in range(300)]
    root = directory(names, size)
    ahead, fetched = Ahead(SMALL, MOST), set[bytes]()
    for place in range(0, len(names), step):
        assert place < 2 * step or names[place] in fetched
        fetched |= {node.name for node in ahead.opened(child(root, names[place]))}
        assert sum(size for name in fetched if name > names[place]) < MOST + SMALL


def test_large_files_are_none_of_those_bytes() -> None:
    names = [b"%03d" % number for number in range(300)]
    root = directory(names, SMALL + 1)
    ahead = Ahead(SMALL, MOST)
    assert sum(len(ahead.opened(child(root, name))) for name in names[:2]) == 8


@given(st.lists(st.integers(0, 499), max_size=60, unique=True))
def test_at_random_little_is_fetched_for_nothing(places: list[int]) -> None:
    root = directory([b"%03d" % number for number in range(500)])
    ahead = Ahead(SMALL, MOST)
    fetched = sum(len(ahead.opened(child(root, b"%03d" % place))) for place in places)
    near = sum(0 < there - here <= 8 for here, there in pairwise(places))
    assert fetched <= near * LAST_WINDOW


def test_changes_of_the_directory_are_followed() -> None:
    root = directory([b"a", b"b", b"c"])
    ahead = Ahead(SMALL, MOST)
    ahead.opened(child(root, b"a"))
    root.bucket.add_node(root, b"d", directory=False)  # type: ignore[union-attr]
    assert [node.name for node in ahead.opened(child(root, b"b"))] == [b"c", b"d"]


def test_a_huge_directory_costs_nothing() -> None:
    root = directory([b"%d" % number for number in range(MOST_ENTRIES + 1)])
    ahead = Ahead(SMALL, MOST)
    assert ahead.opened(child(root, b"0")) == []
    assert ahead.opened(child(root, b"1")) == []

"""The chunks in memory: the limit in bytes, and what a scan leaves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natsfs.files.chunkcache import ENTRY, ChunkCache, Key

LIMIT = 100_000
CHUNK = 2_000


def key(index: int, nuid: str = "n") -> Key:
    return ("bucket", nuid, index)


def content(name: Key, size: int) -> bytes:
    return f"{name}".encode().ljust(size, b".")[:size]


def read(cache: ChunkCache, name: Key, size: int = CHUNK, step: int = CHUNK) -> bool:
    """Read a chunk once from start to end, in pieces, as the reader does. Whether it was there."""
    there = name in cache
    if not there:
        cache.put(name, content(name, size))
    for start in range(0, size, step):
        found = cache.get(name, start, min(start + step, size))
        assert found is None or found == content(name, size)
    return there


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 30_000), st.integers(0, 30_000), st.booleans()),
        max_size=150,
    )
)
def test_the_limit_holds_and_what_is_found_is_what_was_put(
    steps: list[tuple[int, int, int, bool]],
) -> None:
    cache = ChunkCache(LIMIT)
    sizes: dict[Key, int] = {}
    for index, size, start, puts in steps:
        name = key(index)
        if puts:
            size = sizes.setdefault(name, size)
            cache.put(name, content(name, size))
            assert (name in cache) == (size + ENTRY <= LIMIT // 4)
        else:
            found = cache.get(name, start, start + 1000)
            assert (found is not None) == (name in cache), "a hit takes nothing away from what was hit"
            assert found is None or found == content(name, sizes[name])
        assert cache.used <= LIMIT
        held = [name for name in sizes if name in cache]
        assert cache.used == sum(sizes[name] + ENTRY for name in held), "weights are bytes"


@settings(max_examples=20)
@given(
    st.integers(1, int(LIMIT * 0.7) // (CHUNK + ENTRY)),
    st.sampled_from([100, 700, CHUNK, 5 * CHUNK]),
    st.integers(1, 3),
)
def test_what_was_read_twice_survives_a_scan(working: int, step: int, scans: int) -> None:
    """However small the pieces are in which the scan reads its chunks."""
    cache = ChunkCache(LIMIT)
    for _ in range(2):
        for index in range(working):
            read(cache, key(index))
    for scan in range(scans):
        for index in range(10 * LIMIT // CHUNK):
            assert not read(cache, key(index, f"scan{scan}"), step=step)
    assert all(key(index) in cache for index in range(working))


@pytest.mark.parametrize("step", [500, CHUNK])
def test_without_a_working_set_a_scan_has_the_whole_cache(step: int) -> None:
    """So chunks that were fetched ahead are there when their reader comes."""
    cache = ChunkCache(LIMIT)
    fit = LIMIT // (CHUNK + ENTRY)
    for index in range(5 * fit):
        read(cache, key(index), step=step)
    assert all(key(index) in cache for index in range(4 * fit, 5 * fit))


def test_what_nobody_reads_any_more_gives_way() -> None:
    """A new working set takes the place of an old one, by being read twice."""
    cache = ChunkCache(LIMIT)
    size = int(LIMIT * 0.7) // (CHUNK + ENTRY)
    for nuid in ("old", "new"):
        for _ in range(2):
            for index in range(0, size, 5):
                for _ in range(2):  # a few at a time: they have to be read twice while they are on probation
                    for near in range(index, min(index + 5, size)):
                        read(cache, key(near, nuid))
    assert all(key(index, "new") in cache for index in range(size))
    assert sum(key(index, "old") in cache for index in range(size)) < size


def test_a_chunk_of_more_than_a_quarter_is_not_kept() -> None:
    cache = ChunkCache(LIMIT)
    cache.put(key(0), bytes(LIMIT // 4))
    assert key(0) not in cache
    assert cache.used == 0


def test_what_was_read() -> None:
    """Not what was only put there, and not what is not there any more."""
    cache = ChunkCache(LIMIT)
    assert not cache.was_read(key(0))
    cache.put(key(0), content(key(0), CHUNK))
    assert not cache.was_read(key(0))
    cache.get(key(0), 0, 1)
    assert cache.was_read(key(0))
    cache.get(key(0), 0, CHUNK)
    assert cache.was_read(key(0)), "protected"
    for index in range(1, LIMIT // CHUNK + 1):
        read(cache, key(index))
        read(cache, key(index))
    assert cache.was_read(key(0)) == (key(0) in cache)

"""The disk cache by itself: what it finds again, and what it never gives out."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natsfs.catalog.metadata import Metadata
from natsfs.errors import MountError
from natsfs.files.diskcache import NAME, QUEUE, DiskCache, Names, pack_layout, unpack_layout
from natsfs.files.diskindex import LEAST
from natsfs.store.layout import Layout
from tests.support import noise, until

META = Metadata(name="o", bucket="b", nuid="n", size=10, chunks=2, digest="SHA-256=x")
LIMIT = 1 << 20

Caches = Callable[..., DiskCache]


def name(number: int) -> bytes:
    return number.to_bytes(NAME, "big")


@pytest.fixture
def caches(tmp_path: Path) -> Caches:
    def make(source: str = "nats://h/b", limit: int = LIMIT) -> DiskCache:
        cache = DiskCache(str(tmp_path / "cache"), limit, source)
        cache.open()
        until(lambda: cache._complete, 10)
        return cache

    return make


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]


def test_what_was_put_is_found_by_the_next_one(caches: Caches, tmp_path: Path) -> None:
    cache = caches()
    contents = {name(n): noise(n * 7000, n) for n in range(10)}
    for key, data in contents.items():
        cache.put(key, data)
    cache.close()
    cache = caches()
    assert cache.read(contents) == list(contents.values())
    assert cache.read([name(99)]) == [None]
    assert not cache.has(name(99))
    cache.forget([name(3)])
    until(lambda: not cache.has(name(3)))
    cache.close()
    for path in (tmp_path / "cache").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.semantics("disk-cache-checked")
def test_no_damage_is_given_out(caches: Caches, tmp_path: Path) -> None:
    """Bits flipped anywhere, ends cut off or added, and whole files under each other's names."""
    cache = caches()
    for number in range(4):
        cache.put(name(number), noise(5000, number))
    cache.close()
    files = sorted(entries(tmp_path))
    good = [path.read_bytes() for path in files]
    damaged = [good[0][:at] + bytes([good[0][at] ^ 1]) + good[0][at + 1 :] for at in range(0, 5020, 97)]
    damaged += [good[0][:at] + bytes([good[0][at] ^ 128]) + good[0][at + 1 :] for at in range(5000, 5020)]
    damaged += [good[0][:size] for size in (0, 1, 19, 20, 21, 4999, 5000, 5019)]
    damaged += [good[0] + b"x", good[0] * 2, good[1], bytes(5020), b"\xff" * 5020]
    cache = caches()
    number = int.from_bytes(bytes.fromhex(files[0].parent.name + files[0].name), "big")
    for bad in damaged:
        files[0].write_bytes(bad)
        assert cache.read([name(number)]) == [None]
        assert not files[0].exists(), "it is removed"
        assert not cache.has(name(number))
    cache.put(name(number), noise(5000, number))
    until(lambda: cache.read([name(number)]) == [noise(5000, number)], what="and can come again")
    cache.close()


def room_taken(folder: Path) -> int:
    """Bytes on the disk, while files come and go."""
    total = 0
    for path in entries(folder):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


@pytest.mark.semantics("disk-cache-bounded")
def test_the_limit_holds_and_the_least_recently_used_goes(caches: Caches, tmp_path: Path) -> None:
    cache = caches()
    fit = LIMIT // (40 * 1024)
    for number in range(fit):
        cache.put(name(number), noise(40_000 - 40, number))
    until(lambda: cache.has(name(fit - 1)))
    assert cache.read([name(0)]) != [None]
    cache.put(name(100), noise(39_000))
    until(lambda: cache.has(name(100)))
    assert cache.has(name(0))
    assert not cache.has(name(1))
    for number in range(200, 260):
        cache.put(name(number), noise(100, number))
        assert room_taken(tmp_path) <= LIMIT
    cache.close()
    assert len(entries(tmp_path)) <= LIMIT // LEAST
    smaller = caches(limit=LIMIT // 4)
    until(lambda: len(entries(tmp_path)) <= LIMIT // LEAST // 4, what="also when it is made smaller")
    assert smaller.has(name(259))
    smaller.close()


def test_a_part_for_each_mount_and_the_same_one_again(caches: Caches, tmp_path: Path) -> None:
    one, two, again = caches("one"), caches("two"), caches("one")
    assert len({one._folder, two._folder, again._folder}) == 3
    folder = two._folder
    for cache in (one, two, again):
        cache.close()
    two = caches("two")
    assert two._folder == folder
    others = [caches("three"), caches("four")]
    assert {cache._folder.name for cache in [two, *others]} == {"0", "1", "2"}, "parts are used again"
    for cache in [two, *others]:
        cache.close()


def test_what_others_left_in_the_folder_stays(caches: Caches, tmp_path: Path) -> None:
    part = tmp_path / "cache" / "0"
    (part / "ab").mkdir(parents=True, mode=0o700)
    part.chmod(0o700)
    for path in (part / "notes", part / "ab" / "x", part / "ab" / "00"):
        path.write_bytes(b"theirs")
    cache = caches()
    assert cache._folder == part
    cache.close()
    assert len(entries(tmp_path)) == 3


def test_a_folder_that_others_can_write_to_is_not_used(caches: Caches, tmp_path: Path) -> None:
    (tmp_path / "cache" / "0").mkdir(parents=True)
    (tmp_path / "cache" / "0").chmod(0o777)
    cache = caches()
    assert cache._folder.name == "1"
    cache.close()


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MountError, match="disk_cache=DIR"):
        DiskCache(str(tmp_path / "file"), LIMIT, "s").open()


def test_the_queue_is_bounded(caches: Caches) -> None:
    cache = caches(limit=1 << 40)
    block = noise(1 << 20)
    for number in range(200):
        cache.put(name(number), block)
        assert cache._waiting <= QUEUE
    cache.close()


def test_names_differ_wherever_the_content_may() -> None:
    metas = [
        META,
        replace(META, bucket="c"),
        replace(META, nuid="m"),
        replace(META, size=11),
        replace(META, chunks=3),
        replace(META, digest=None),
    ]
    versions = [Names(meta, created) for meta in metas for created in ("then", "now")]
    found = {n for v in versions for n in (v.layout, *(v.chunk(index) for index in range(100)))}
    assert len(found) == len(versions) * 101
    assert Names(replace(META, name="other", seq=5), "now").chunk(1) == Names(META, "now").chunk(1)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30))
def test_layouts_come_back(lengths: list[int]) -> None:
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    meta = replace(META, size=sum(lengths))
    layout = Layout(meta.size, len(lengths), 0, starts=starts, first=7)
    found = unpack_layout(pack_layout(layout), meta)
    assert found is not None
    assert found.cuts_like(layout)
    assert unpack_layout(pack_layout(layout), replace(meta, size=meta.size + 1)) is None
    uniform = Layout(meta.size, -(-meta.size // lengths[0]), lengths[0], first=1)
    found = unpack_layout(pack_layout(uniform), meta)
    assert found is not None
    assert found.cuts_like(uniform)
    if len(set(lengths)) > 1 and len(lengths) != uniform.count:
        assert not layout.cuts_like(uniform)


@given(
    st.binary(max_size=50) | st.recursive(st.integers() | st.none(), st.lists).map(lambda x: repr(x).encode())
)
def test_rubbish_is_no_layout(data: bytes) -> None:
    found = unpack_layout(data, META)
    if found is not None:
        assert found.size == META.size
        assert [found.length(index) > 0 for index in range(found.count)] == [True] * found.count
        assert found.start(found.count) == META.size

"""Chunks that are kept on the local disk: for the next daemon, and for the time without a server."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import CHUNK, Client, Mount, Mounter, Server, noise, opened, raises, run, until

SIZE = 2 * 1024 * 1024 + 123  # less than waits to be written at most, so that nothing of it is passed over


def entries(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file() and path.name not in ("lock", "new")]


class Cached:
    """A server of its own, a bucket, and mounts with one disk cache, one after the other."""

    def __init__(self, server: Server, mount: Mounter, folder: Path) -> None:
        self.server = server
        self.client: Client = server.client
        self.cache = folder / "cache"
        self._folder = folder
        self._mount = mount
        self.client.create_bucket("b")

    def mounted(self, *options: str) -> Mount:
        given = (f"disk_cache={self.cache}", *options)
        return self._mount("/b", *given, server=self.server, folder=self._folder)

    def warm(self, *names: str) -> None:
        """Read these through a mount that ends then."""
        mounted = self.mounted()
        for name in names:
            (mounted.path / name).read_bytes()
        assert mounted.finish() == []


@pytest.fixture
def cached(fresh_server: Server, mount: Mounter, tmp_path: Path) -> Cached:
    return Cached(fresh_server, mount, tmp_path)


@pytest.mark.semantics("disk-cache", "disk-cache-bounded")
def test_the_next_daemon_reads_from_the_disk(cached: Cached) -> None:
    """Files of every layout, without one request for content."""
    contents = {
        "large": noise(SIZE),
        "small": noise(3000, 1),
        "two": noise(2 * CHUNK, 2),
        "odd": noise(50_000, 3),
    }
    pieces = [contents["odd"][start : start + 4321] for start in range(0, 50_000, 4321)]
    for name, data in contents.items():
        cached.client.put("b", name, pieces if name == "odd" else data)
    cached.warm(*contents)
    for path in cached.cache.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600)
    mounted = cached.mounted()
    before = cached.server.chunk_requests()
    for name, data in contents.items():
        assert (mounted.path / name).read_bytes() == data
    assert cached.server.chunk_requests() == before


@pytest.mark.semantics("disk-cache")
def test_what_is_missing_comes_from_the_server(cached: Cached) -> None:
    """Some chunks of the disk, some of the server, in one file."""
    data = noise(SIZE)
    cached.client.put("b", "f", data)
    cached.warm("f")
    dice = random.Random(1)
    for path in dice.sample(sorted(entries(cached.cache)), 7):
        path.unlink()
    mounted = cached.mounted()
    with opened(mounted.path / "f", os.O_RDONLY) as fd:
        for _ in range(50):
            start = dice.randrange(SIZE)
            assert os.pread(fd, 300_000, start) == data[start : start + 300_000]
    assert (mounted.path / "f").read_bytes() == data


@pytest.mark.semantics("disk-cache-checked")
def test_damaged_entries_are_replaced(cached: Cached) -> None:
    """Each of them: the content is right, the log tells of it, and the third daemon needs no server again."""
    data = noise(SIZE)
    cached.client.put("b", "f", data)
    cached.warm("f")
    files = entries(cached.cache)
    for number, path in enumerate(files):
        if number % 3 == 0:  # bits flip
            bad = bytearray(path.read_bytes())
            bad[len(bad) // 3] ^= 4
            path.write_bytes(bad)
        elif number % 3 == 1:  # torn
            os.truncate(path, path.stat().st_size // 2)
        else:  # another entry's bytes, whole
            path.write_bytes(files[0].read_bytes())
    mounted = cached.mounted()
    mounted.allow("an entry of the disk cache was damaged")
    assert (mounted.path / "f").read_bytes() == data
    assert "an entry of the disk cache was damaged" in mounted.log.read_text()
    assert mounted.finish() == []
    mounted = cached.mounted()
    before = cached.server.chunk_requests()
    assert (mounted.path / "f").read_bytes() == data
    assert cached.server.chunk_requests() == before


@pytest.mark.semantics("disk-cache", "server-away")
def test_reading_while_the_server_is_away(cached: Cached) -> None:
    """A new daemon that has read nothing itself: what is on the disk is read, the rest fails in time."""
    contents = {"large": noise(SIZE), "small": noise(3000, 1)}
    for name in ("large", "small", "unread", "unread too"):
        cached.client.put("b", name, contents.get(name, noise(SIZE, 5)))
    cached.warm(*contents)
    mounted = cached.mounted("timeout=2")
    mounted.allow("NATS")
    cached.server.stop()
    began = time.monotonic()
    for name, data in contents.items():
        assert (mounted.path / name).read_bytes() == data
    with raises(errno.ETIMEDOUT):
        (mounted.path / "unread").read_bytes()
    assert time.monotonic() - began < 30
    cached.server.start()
    until(lambda: (mounted.path / "unread too").read_bytes() == noise(SIZE, 5), 20)


@pytest.mark.semantics("disk-cache-bounded")
def test_the_limit_holds(cached: Cached) -> None:
    """While a daemon reads several times as much, and the mount shows the right bytes."""
    for number in range(4):
        cached.client.put("b", f"f{number}", noise(SIZE, number))
    mounted = cached.mounted("disk_cache_size=3M")

    def taken() -> int:
        total = 0
        for path in cached.cache.rglob("*"):
            try:
                total += path.stat().st_blocks * 512 if path.is_file() and path.name != "lock" else 0
            except FileNotFoundError:
                continue
        return total

    for number in range(4):
        assert (mounted.path / f"f{number}").read_bytes() == noise(SIZE, number)
        assert taken() <= 3 << 20
    assert mounted.finish() == []
    assert 2 << 20 < taken() <= 3 << 20


def test_a_version_that_was_replaced_is_not_mistaken_for_the_new_one(cached: Cached) -> None:
    """Neither by its name, nor by a nuid that another bucket of the name has used before."""
    cached.client.put("b", "f", noise(SIZE, 1))
    cached.client.put("b", "g", noise(SIZE, 2), nuid="same")
    cached.warm("f", "g")
    cached.client.put("b", "f", noise(SIZE, 3))
    cached.warm("f")
    cached.client.delete_bucket("b")
    cached.client.create_bucket("b")
    cached.client.put("b", "f", noise(SIZE, 3))
    cached.client.put("b", "g", noise(SIZE, 4), nuid="same")
    mounted = cached.mounted()
    assert (mounted.path / "f").read_bytes() == noise(SIZE, 3)
    assert (mounted.path / "g").read_bytes() == noise(SIZE, 4)


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    run("mount", "-t", "tmpfs", "-o", "size=2M,mode=700", "tmpfs", folder)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.semantics("disk-cache-checked")
def test_a_full_disk(tiny: Path, cached: Cached) -> None:
    """Reads go on, the cache uses the room that there is, and the log says so once."""
    for number in range(3):
        cached.client.put("b", f"f{number}", noise(SIZE, number))
    mounted = cached.mounted()
    mounted.allow("disk cache .* No space left")
    for number in range(3):
        assert (mounted.path / f"f{number}").read_bytes() == noise(SIZE, number)
    assert mounted.finish() == []
    assert mounted.log.read_text().count("No space left") == 1
    assert sum(path.stat().st_size for path in entries(tiny)) > 1 << 20


@pytest.mark.semantics("disk-cache-checked")
def test_a_folder_that_goes_away(cached: Cached) -> None:
    """Somebody empties it under the daemon: what is not there is fetched."""
    cached.client.put("b", "f", noise(SIZE))
    cached.warm("f")
    mounted = cached.mounted()
    run("rm", "-r", cached.cache)
    mounted.allow("disk cache .* cannot be used")
    assert (mounted.path / "f").read_bytes() == noise(SIZE)


def test_content_that_was_wrong_in_the_store_is_not_kept(cached: Cached) -> None:
    """The digest tells at the end; the next daemon asks the server again."""
    data = noise(SIZE)
    meta = cached.client.put("b", "f", data[:-1] + b"x", {"digest": "SHA-256=" + "A" * 43 + "="})
    mounted = cached.mounted()
    mounted.allow("does not match its digest")
    with raises(errno.EIO):
        (mounted.path / "f").read_bytes()
    assert mounted.finish() == []
    assert meta["size"] == SIZE
    assert len(entries(cached.cache)) <= 1

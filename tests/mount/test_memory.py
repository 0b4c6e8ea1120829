"""The daemon's memory under many readers and writers, and what it checks all the same."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import CHUNK, Client, Mounter, Server, noise, opened, raises

MEGABYTE = 1 << 20
SIZE = 4 * MEGABYTE
CACHE = 16 * MEGABYTE
# What docs/configuration.md says is on its way, the disk cache included, beside one MiB for each file in use here.
ON_ITS_WAY = 4 * 16 * MEGABYTE
FILES = 200
# Of what Python's allocator and the C library keep for themselves when it was in use once.
SLACK = 1.2


def content(number: int) -> bytes:
    """The same noise from another place on: cheap to make, and no two files are alike."""
    return _NOISE[number * 1000 :] + _NOISE[: number * 1000]


_NOISE = noise(SIZE)


@pytest.fixture(scope="module")
def many(nats_server: Server) -> Iterator[str]:
    """A bucket with every second one of the files."""
    client = nats_server.client
    client.create_bucket("many")
    for number in range(0, FILES, 2):
        client.put("many", f"f{number}", content(number))
    yield "many"
    client.delete_bucket("many")


@pytest.mark.semantics("memory-bounded")
def test_a_hundred_readers_and_a_hundred_writers(
    many: str, mount: Mounter, client: Client, tmp_path: Path
) -> None:
    """A hundred of each, all at once, in all eight hundred MB, of which every byte is right."""
    mounted = mount(f"/{many}", f"cache_size={CACHE}", f"disk_cache={tmp_path / 'cache'}")
    before = mounted.memory()
    together = threading.Barrier(FILES)

    def work(number: int) -> None:
        together.wait()
        path = mounted.path / f"f{number}"
        if number % 2 == 0:
            assert path.read_bytes() == content(number)
            return
        with path.open("wb", buffering=0) as file:
            for start in range(0, SIZE, MEGABYTE):
                file.write(content(number)[start : start + MEGABYTE])

    with ThreadPoolExecutor(FILES) as threads:
        list(threads.map(work, range(FILES)))
    assert mounted.memory() - before < (CACHE + ON_ITS_WAY + FILES * MEGABYTE) * SLACK
    for number in range(1, FILES, 30):
        assert client.read(many, f"f{number}") == content(number)


@pytest.mark.semantics("memory-bounded")
def test_many_files_that_are_read_from_the_middle_on(many: str, mount: Mounter) -> None:
    """Nothing of them is kept for a digest that cannot be completed, however long they stay open."""
    mounted = mount(f"/{many}", f"cache_size={CACHE}")
    before = mounted.memory()
    opened_files = [os.open(mounted.path / f"f{number}", os.O_RDONLY) for number in range(0, FILES, 2)]
    try:
        for number, fd in enumerate(opened_files):
            for start in range(CHUNK, SIZE, MEGABYTE):
                data = os.pread(fd, MEGABYTE, start)
                assert data == content(2 * number)[start : start + MEGABYTE]
    finally:
        for fd in opened_files:
            os.close(fd)
    assert mounted.memory() - before < (CACHE + ON_ITS_WAY) * SLACK


@pytest.mark.semantics("scans")
def test_what_was_read_twice_is_still_there_after_a_scan(fresh_server: Server, mount: Mounter) -> None:
    """The kernel forgets its pages each time, so that the daemon is asked for all of them."""
    client = fresh_server.client
    client.create_bucket("b")
    for name, size in (("work", 8), ("scan", 48)):
        client.put("b", name, noise(size * MEGABYTE))
    root = mount("/b", f"cache_size={CACHE}", server=fresh_server).path

    def read(name: str) -> None:
        with opened(root / name, os.O_RDONLY) as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            while os.read(fd, MEGABYTE):
                pass

    for name in ("work", "work", "work", "scan"):
        read(name)
    before = fresh_server.chunk_requests()
    read("work")
    assert fresh_server.chunk_requests() == before


@pytest.mark.semantics("digest-checked")
def test_the_digest_is_checked_of_what_was_read_in_another_order_before(
    bucket: str, mount: Mounter, client: Client
) -> None:
    """By a second handle, from what the daemon has in memory."""
    data = noise(3 * MEGABYTE)
    client.put(bucket, "f", data, {"digest": "SHA-256=" + "A" * 43 + "="})
    mounted = mount(f"/{bucket}")
    mounted.allow("does not match its digest")
    with opened(mounted.path / "f", os.O_RDONLY) as fd:
        for start in (2 * MEGABYTE, MEGABYTE):
            assert os.pread(fd, MEGABYTE, start) == data[start : start + MEGABYTE]
    with opened(mounted.path / "f", os.O_RDONLY) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with raises(errno.EIO):
            for start in range(0, len(data), MEGABYTE):
                os.pread(fd, MEGABYTE, start)

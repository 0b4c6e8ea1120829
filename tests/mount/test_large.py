"""A file of 2 GiB with a daemon that stays small."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import Client, Mount, Server, noise, opened, run, until

SIZE = 2 << 30
BLOCK = 1 << 20
MEMORY_LIMIT = 300 << 20


class Large:
    """The source, and the mount with its copy. Each block is the same noise behind its own number."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.client: Client = server.client
        self.client.create_bucket("large")
        self._noise = noise(BLOCK - 16)
        self.source = folder / "source"
        with self.source.open("wb") as file:
            for number in range(SIZE // BLOCK):
                file.write(self.block(number))
        self._server = server
        self._folder = folder
        self.mount = self._mounted()
        self.copy = self.mount.path / "copy"
        run("cp", self.source, self.copy)

    def _mounted(self) -> Mount:
        return Mount.make(self._server, self._folder, "/large", "purge_grace=0")

    def remount(self) -> None:
        """The kernel's cache of what was written or read is gone then."""
        problems = self.mount.finish()
        self.mount = self._mounted()
        assert problems == []

    def block(self, number: int) -> bytes:
        # The number is in both halves and moves along, so that no two chunks of the file are equal.
        mark = number.to_bytes(8, "big")
        return mark + self._noise[number % 7000 :] + mark + self._noise[: number % 7000]

    def expected(self, start: int, end: int) -> bytes:
        first = start // BLOCK
        blocks = b"".join(self.block(number) for number in range(first, -(-end // BLOCK)))
        return blocks[start - first * BLOCK : end - first * BLOCK]


@pytest.fixture(scope="module")
def large(nats_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Large]:
    made = Large(nats_server, tmp_path_factory.mktemp("large"))
    yield made
    problems = made.mount.finish()
    made.client.delete_bucket("large")
    made.source.unlink(missing_ok=True)
    assert problems == []


def test_large_file_in(large: Large) -> None:
    """After `cp` size, count of chunks and memory are right, and nothing stays in the spool."""
    assert large.copy.stat().st_size == SIZE
    meta = large.client.stored("large", "copy")
    assert (meta["size"], meta["chunks"]) == (SIZE, SIZE // (128 * 1024))
    assert large.mount.memory() < MEMORY_LIMIT
    assert large.mount.check() == []


def test_large_file_read_at_random(large: Large) -> None:
    """Ranges all over the file, short and long, are those of the source."""
    large.remount()
    generator = random.Random(5)
    with opened(large.copy, os.O_RDONLY) as fd:
        for _ in range(300):
            start = generator.randrange(SIZE)
            size = generator.choice((1, 4096, 131072, 700_000))
            assert os.pread(fd, size, start) == large.expected(start, min(start + size, SIZE))
    assert large.mount.memory() < MEMORY_LIMIT


def test_large_file_out(large: Large, tmp_path: Path) -> None:
    """`cp` out of the mount gives the source again, through a daemon and a kernel with nothing of it in a cache."""
    large.remount()
    run("cp", large.copy, tmp_path / "out")
    try:
        run("cmp", large.source, tmp_path / "out")
    finally:
        (tmp_path / "out").unlink()
    assert large.mount.memory() < MEMORY_LIMIT


def test_large_file_changed_in_the_middle(large: Large) -> None:
    """One block of 2 GiB changes, the rest is carried over, with bounded memory."""
    at = SIZE // 2 + 12345
    with opened(large.copy, os.O_RDWR) as fd:
        os.pwrite(fd, b"changed", at)
    assert large.client.stored("large", "copy")["size"] == SIZE
    assert large.mount.memory() < MEMORY_LIMIT
    large.remount()
    with opened(large.copy, os.O_RDONLY) as fd:
        for start in (0, at - 1000, SIZE - 5000):
            expected = bytearray(large.expected(start, start + 5000))
            if start == at - 1000:
                expected[1000:1007] = b"changed"
            assert os.pread(fd, 5000, start) == bytes(expected)


def test_large_file_removed(large: Large) -> None:
    """The room in the bucket is free again."""
    large.copy.unlink()
    until(lambda: large.client.info("large")["state"]["bytes"] < 1_000_000, 30)

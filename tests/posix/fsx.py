"""Random calls on one file, and a model of the file in memory that must agree after each of them.

As fsx, the file system exerciser, does it: reads, writes, truncations, mappings, copies and reopening in any order.
"""

from __future__ import annotations

import mmap
import os
import random
from collections import deque
from pathlib import Path

from tests.posix import libc

LIMIT = 256 * 1024
RARE_LIMIT = 3 * 1024 * 1024  # over several chunks, and over the size that is published early
HISTORY = 30


class Mismatch(AssertionError):
    """The file is not what the model says; the last calls are in the text."""


class Exerciser:
    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.seed = seed
        self.random = random.Random(seed)
        self.model = bytearray()
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self.append = os.open(path, os.O_WRONLY | os.O_APPEND)
        self.limit = LIMIT
        self.large_until = 0
        self.done = 0
        self.history: deque[str] = deque(maxlen=HISTORY)
        # What costs a commit is rare: each uploads the whole file.
        weights = {
            self.read: 300,
            self.write: 250,
            self.load: 120,
            self.store: 80,
            self.write_at_end: 40,
            self.cut: 40,
            self.extend: 30,
            self.copy: 50,
            self.forget_pages: 10,
            self.look: 50,
            self.read_all: 3,
            self.sync: 5,
            self.reopen: 5,
            self.truncate_by_name: 10,
            self.empty: 0.3,
            self.grow: 0.3,
            self.rename: 0.5,
        }
        self.calls, self.weights = list(weights), list(weights.values())

    # --- choosing -------------------------------------------------------------------------------------------------

    def offset(self, end: int) -> int:
        """Any, or one beside a boundary of pages or chunks, where mistakes are."""
        if self.random.random() < 0.3:
            near = self.random.choice((4096, 131_072)) * self.random.randrange(end // 4096 + 1)
            return max(0, min(end, near + self.random.randint(-2, 2)))
        return self.random.randint(0, end)

    def length(self, most: int) -> int:
        scale = self.random.choice((16, 600, 5000, 5000, 70_000))
        return max(0, min(most, self.random.randint(0, scale)))

    def range(self, end: int) -> tuple[int, int]:
        start = self.offset(end)
        return start, self.length(end - start)

    def data(self, size: int) -> bytes:
        return self.random.randbytes(size)

    # --- running --------------------------------------------------------------------------------------------------

    def run(self, count: int) -> None:
        try:
            for call in self.random.choices(self.calls, self.weights, k=count):
                call()
                self.done += 1
                if self.limit == RARE_LIMIT and self.done > self.large_until:
                    self.shrink()
            self.reopen()
            self.read_all()
        except (AssertionError, OSError) as error:
            raise Mismatch(f"{error}\n{self.story()}") from error
        finally:
            os.close(self.fd)
            os.close(self.append)

    def story(self) -> str:
        lines = "\n".join(f"    {line}" for line in self.history)
        return f"seed {self.seed}, call {self.done}, size {len(self.model)}; the last calls:\n{lines}"

    def note(self, text: str) -> None:
        self.history.append(f"{self.done}: {text}")

    def compare(self, found: bytes, start: int, what: str) -> None:
        expected = bytes(self.model[start : start + len(found)])
        if found == expected:
            return
        first = next(
            (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(expected)
        )
        wrong = sum(a != b for a, b in zip(found, expected, strict=False))
        raise AssertionError(
            f"{what}: {wrong} of {len(found)} bytes differ, the first at {start + first}: "
            f"{found[first : first + 16].hex()} instead of {expected[first : first + 16].hex()}"
        )

    def put(self, start: int, data: bytes) -> None:
        if data and start > len(self.model):
            self.model.extend(bytes(start - len(self.model)))
        self.model[start : start + len(data)] = data

    def resize(self, size: int) -> None:
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    # --- calls ----------------------------------------------------------------------------------------------------

    def read(self) -> None:
        start, size = self.range(len(self.model))
        self.note(f"read {start} +{size}")
        found = os.pread(self.fd, size, start)
        assert len(found) == size, f"read {len(found)} bytes instead of {size}"
        self.compare(found, start, "read")

    def write(self) -> None:
        start = self.offset(len(self.model) if self.random.random() < 0.9 else self.limit)
        data = self.data(self.length(self.limit - start))
        self.note(f"write {start} +{len(data)}")
        assert os.pwrite(self.fd, data, start) == len(data)
        self.put(start, data)

    def write_at_end(self) -> None:
        data = self.data(self.length(self.limit - len(self.model)))
        self.note(f"append +{len(data)} at {len(self.model)}")
        assert os.write(self.append, data) == len(data)
        self.put(len(self.model), data)

    def load(self) -> None:
        start, size = self.range(len(self.model))
        self.note(f"load {start} +{size}")
        if size:
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            with libc.Mapping(self.fd, start + size - page, page) as mapping:
                self.compare(mapping.load(start - page, size), start, "load")

    def store(self) -> None:
        start, size = self.range(len(self.model))
        data, flush = self.data(size), self.random.random() < 0.3
        self.note(f"store {start} +{size}{', msync' if flush else ''}")
        if size:
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            with libc.Mapping(self.fd, start + size - page, page, writable=True) as mapping:
                mapping.store(start - page, data)
                if flush:
                    mapping.sync()
            self.put(start, data)

    def cut(self) -> None:
        self._truncate(self.offset(len(self.model)))

    def extend(self) -> None:
        most = self.limit if self.random.random() < 0.1 else min(self.limit, len(self.model) + 10_000)
        self._truncate(self.random.randint(min(len(self.model), most), most))

    def empty(self) -> None:
        self._truncate(0)

    def _truncate(self, size: int) -> None:
        self.note(f"ftruncate {len(self.model)} to {size}")
        os.ftruncate(self.fd, size)
        self.resize(size)

    def truncate_by_name(self) -> None:
        size = max(0, min(self.limit, len(self.model) + self.random.randint(-3000, 3000)))
        self.note(f"truncate {len(self.model)} to {size}")
        os.truncate(self.path, size)
        self.resize(size)

    def copy(self) -> None:
        start, size = self.range(len(self.model))
        to = self.offset(max(0, self.limit - size))
        if abs(to - start) < size:
            return  # overlapping is EINVAL
        self.note(f"copy_file_range {start} +{size} to {to}")
        done = 0
        while done < size:
            count = os.copy_file_range(self.fd, self.fd, size - done, start + done, to + done)
            assert count > 0, f"copy_file_range copied {done} of {size}"
            done += count
        self.put(to, bytes(self.model[start : start + size]))

    def look(self) -> None:
        self.note("stat")
        for size in (
            os.fstat(self.fd).st_size,
            os.stat(self.path).st_size,
            os.lseek(self.fd, 0, os.SEEK_END),
        ):
            assert size == len(self.model), f"the size is {size} instead of {len(self.model)}"

    def forget_pages(self) -> None:
        self.note("the kernel drops its pages")
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def read_all(self) -> None:
        self.note("read all through a new handle")
        found = self.path.read_bytes()
        assert len(found) == len(self.model), f"{len(found)} bytes instead of {len(self.model)}"
        self.compare(found, 0, "the whole")

    def sync(self) -> None:
        self.note("fsync")
        os.fsync(self.fd)

    def reopen(self) -> None:
        # Never both at a time in a quarter of all cases: then the file is never quite closed.
        which = self.random.randrange(4)
        self.note(f"reopen {('writer', 'appender', 'both', 'both, pages dropped')[which]}")
        if which != 1:
            os.close(self.fd)
        if which != 0:
            os.close(self.append)
            self.append = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        if which != 1:
            self.fd = os.open(self.path, os.O_RDWR)
        if which == 3:
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def grow(self) -> None:
        """For some calls the file may be a large one."""
        self.limit, self.large_until = RARE_LIMIT, self.done + 300
        data = self.data(self.random.randint(0, RARE_LIMIT - len(self.model)))
        self.note(f"append +{len(data)} at {len(self.model)}")
        assert os.write(self.append, data) == len(data)
        self.put(len(self.model), data)

    def shrink(self) -> None:
        self.limit = LIMIT
        self._truncate(min(len(self.model), self.random.randint(0, LIMIT)))

    def rename(self) -> None:
        other = self.path.with_name("b" if self.path.name == "a" else "a")
        self.note(f"rename to {other.name}")
        os.rename(self.path, other)
        self.path = other

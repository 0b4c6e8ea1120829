"""Random sequences of calls on the mount and on a local directory side by side, compared after each step."""

from __future__ import annotations

import itertools
import os
import shutil
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.posix import libc
from tests.posix.both import run_machine, told

_numbers = itertools.count(1)

NAMES = ("a", "b", "c")
PATHS = tuple(
    "/".join(parts) for depth in (1, 2, 3) for parts in itertools.product(NAMES[: 4 - depth], repeat=depth)
)
paths = st.sampled_from(PATHS)
sizes = st.one_of(st.integers(0, 20), st.sampled_from([4095, 4096, 131_072, 131_073, 300_000]))
data = st.one_of(
    st.binary(min_size=0, max_size=20),
    st.builds(lambda byte, size: bytes([byte]) * size, st.integers(1, 255), sizes),
)
ACCESS = (os.O_RDONLY, os.O_WRONLY, os.O_RDWR)
MORE = (
    0,
    os.O_CREAT,
    os.O_CREAT | os.O_EXCL,
    os.O_TRUNC,
    os.O_APPEND,
    os.O_CREAT | os.O_TRUNC,
    os.O_CREAT | os.O_APPEND,
)
flags = st.builds(lambda access, more: access | more, st.sampled_from(ACCESS), st.sampled_from(MORE))
modes = st.sampled_from([0o600, 0o644, 0o755, 0o4711, 0o1777, 0o000])
handles = st.integers(0, 4)


class Side:
    """The calls on one of the two directories. Handles are numbered alike on both."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.fds: dict[int, int] = {}

    def path(self, name: str) -> str:
        return f"{self.top}/{name}"

    def open(self, number: int, name: str, how: int, mode: int) -> Any:
        fd = os.open(self.path(name), how, mode)
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            os.close(fd)
            return "a directory"
        self.fds[number] = fd
        return "opened"

    def dup(self, number: int, new: int) -> None:
        self.fds[new] = os.dup(self.fds[number])

    def close(self, number: int) -> None:
        os.close(self.fds.pop(number))

    def rename(self, old: str, new: str, how: int) -> Any:
        return libc.renameat2(self.path(old), self.path(new), how)

    def make_directories(self, name: str) -> None:
        os.makedirs(self.path(name))

    def end(self) -> None:
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()

    def status(self, status: os.stat_result, ages: set[int]) -> tuple[Any, ...]:
        is_dir = stat.S_ISDIR(status.st_mode)
        return (
            oct(status.st_mode),
            None if is_dir else status.st_size,
            status.st_nlink,
            status.st_mtime_ns if status.st_mtime_ns in ages else None,
        )

    def tree(self, ages: set[int]) -> dict[str, tuple[Any, ...]]:
        """All that is below, in one walk; times only where they were set."""
        found: dict[str, tuple[Any, ...]] = {}
        for folder, directories, files in os.walk(self.top):
            for name in directories + files:
                path = os.path.join(folder, name)
                content: Any = None
                if os.path.islink(path):
                    content = os.readlink(path)
                elif os.path.isfile(path):
                    content = Path(path).read_bytes()
                found[os.path.relpath(path, self.top)] = (*self.status(os.lstat(path), ages), content)
        return found

    def open_files(self, ages: set[int]) -> dict[int, tuple[Any, ...]]:
        return {
            number: (*self.status(os.fstat(fd), ages), os.lseek(fd, 0, os.SEEK_CUR))
            for number, fd in self.fds.items()
        }


class Comparison(RuleBasedStateMachine):
    """One bucket's directory and one local directory, which must stay the same."""

    mounted_top: Path
    local_top: Path

    def __init__(self) -> None:
        super().__init__()
        number = next(_numbers)
        self.local, self.mounted = (Side(top / f"run{number}") for top in (self.local_top, self.mounted_top))
        for side in (self.local, self.mounted):
            side.top.mkdir()
        self.ages: set[int] = set()
        for name in ("a/a", "b"):  # or most calls would find nothing
            self.same(partial(Side.make_directories, name=name))
        for name in ("a/b", "c"):
            self.write_file(name, b"content")

    def same(self, call: Callable[[Side], Any]) -> Any:
        expected, found = told(call, self.local), told(call, self.mounted)
        assert found == expected, f"local {expected!r:.200}, mount {found!r:.200}"
        return found

    def teardown(self) -> None:
        try:
            for number in list(self.local.fds):
                self.same(partial(Side.close, number=number))
            self.trees_are_the_same()
        finally:
            for side in (self.local, self.mounted):
                side.end()
                shutil.rmtree(side.top)

    @invariant()
    def trees_are_the_same(self) -> None:
        expected, found = self.local.tree(self.ages), self.mounted.tree(self.ages)
        assert found == expected, (
            f"local {[(k, v) for k, v in expected.items() if found.get(k) != v]!r:.900}, "
            f"mount {[(k, v) for k, v in found.items() if expected.get(k) != v]!r:.900}"
        )
        assert self.mounted.open_files(self.ages) == self.local.open_files(self.ages)

    # --- names ----------------------------------------------------------------------------------------------------

    @rule(name=paths, mode=modes)
    def mkdir(self, name: str, mode: int) -> None:
        self.same(lambda side: os.mkdir(side.path(name), mode))

    @rule(name=paths)
    def rmdir(self, name: str) -> None:
        self.same(lambda side: os.rmdir(side.path(name)))

    @rule(name=paths)
    def unlink(self, name: str) -> None:
        self.same(lambda side: os.unlink(side.path(name)))

    @rule(old=paths, new=paths, how=st.sampled_from([0, 0, libc.RENAME_NOREPLACE]))
    def rename(self, old: str, new: str, how: int) -> None:
        self.same(lambda side: side.rename(old, new, how))

    @rule(name=paths, text=st.sampled_from(["a", "../a", "b/b", "nowhere", "."]))
    def symlink(self, name: str, text: str) -> None:
        self.same(lambda side: os.symlink(text, side.path(name)))

    @rule(name=paths)
    def readlink(self, name: str) -> None:
        self.same(lambda side: os.readlink(side.path(name)))

    @rule(name=paths)
    def listdir(self, name: str) -> None:
        self.same(lambda side: sorted(os.listdir(side.path(name))))

    @rule(name=paths)
    def stat(self, name: str) -> None:
        self.same(lambda side: side.status(os.stat(side.path(name)), self.ages))

    @rule(name=paths, mode=modes)
    def chmod(self, name: str, mode: int) -> None:
        self.same(lambda side: os.chmod(side.path(name), mode))

    @rule(name=paths, age=st.integers(1, 2_000_000_000_000_000_000))
    def utime(self, name: str, age: int) -> None:
        self.ages.add(age)
        self.same(lambda side: os.utime(side.path(name), ns=(age, age)))

    @rule(name=paths, size=sizes)
    def truncate(self, name: str, size: int) -> None:
        self.same(lambda side: os.truncate(side.path(name), size))

    @rule(name=paths, content=data)
    def write_file(self, name: str, content: bytes) -> None:
        self.same(lambda side: Path(side.path(name)).write_bytes(content))

    # --- open files -----------------------------------------------------------------------------------------------

    @rule(number=handles, name=paths, how=flags, mode=modes)
    def open(self, number: int, name: str, how: int, mode: int) -> None:
        if number not in self.local.fds:
            self.same(lambda side: side.open(number, name, how, mode))

    def chosen(self, number: int) -> int:
        """One of the handles that are open."""
        numbers = sorted(self.local.fds)
        return numbers[number % len(numbers)]

    def any_open(self) -> bool:
        return bool(self.local.fds)

    @precondition(any_open)
    @rule(number=handles, new=handles)
    def dup(self, number: int, new: int) -> None:
        if new not in self.local.fds:
            chosen = self.chosen(number)
            self.same(lambda side: side.dup(chosen, new))

    @precondition(any_open)
    @rule(number=handles)
    def close(self, number: int) -> None:
        chosen = self.chosen(number)
        self.same(lambda side: side.close(chosen))

    @precondition(any_open)
    @rule(number=handles, size=sizes)
    def read(self, number: int, size: int) -> None:
        self.same(lambda side: os.read(side.fds[self.chosen(number)], size))

    @precondition(any_open)
    @rule(number=handles, size=sizes, offset=sizes)
    def pread(self, number: int, size: int, offset: int) -> None:
        self.same(lambda side: os.pread(side.fds[self.chosen(number)], size, offset))

    @precondition(any_open)
    @rule(number=handles, content=data)
    def write(self, number: int, content: bytes) -> None:
        self.same(lambda side: os.write(side.fds[self.chosen(number)], content))

    @precondition(any_open)
    @rule(number=handles, content=data, offset=sizes)
    def pwrite(self, number: int, content: bytes, offset: int) -> None:
        self.same(lambda side: os.pwrite(side.fds[self.chosen(number)], content, offset))

    @precondition(any_open)
    @rule(number=handles, offset=sizes, whence=st.sampled_from([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END]))
    def seek(self, number: int, offset: int, whence: int) -> None:
        self.same(lambda side: os.lseek(side.fds[self.chosen(number)], offset, whence))

    @precondition(any_open)
    @rule(number=handles, size=sizes)
    def ftruncate(self, number: int, size: int) -> None:
        self.same(lambda side: os.ftruncate(side.fds[self.chosen(number)], size))

    @precondition(any_open)
    @rule(number=handles)
    def fsync(self, number: int) -> None:
        self.same(lambda side: os.fsync(side.fds[self.chosen(number)]))

    @precondition(any_open)
    @rule(number=handles, mode=modes)
    def fchmod(self, number: int, mode: int) -> None:
        self.same(lambda side: os.fchmod(side.fds[self.chosen(number)], mode))

    @precondition(any_open)
    @rule(number=handles)
    def forget_pages(self, number: int) -> None:
        self.same(lambda side: os.posix_fadvise(side.fds[self.chosen(number)], 0, 0, os.POSIX_FADV_DONTNEED))


@pytest.mark.semantics("as-a-local-file-system")
def test_random_calls(folder: Path, tmp_path: Path) -> None:
    """Results, errors, contents and attributes are those of a local directory, whatever is called in which order."""
    Comparison.local_top, Comparison.mounted_top = tmp_path, folder
    run_machine(Comparison, 60)

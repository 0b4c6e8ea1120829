"""Which call changes which time, and what of all attributes a remount keeps."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.posix import libc
from tests.posix.both import Both, report, told
from tests.support import Mounter, opened

OLD = 1_000_000_000_123_456_789
TICK = 0.012  # more than the kernel's coarse clock, which local file systems use


def with_handle(flags: int, call: Callable[[int], Any]) -> Callable[[Path], None]:
    def change(top: Path) -> None:
        with opened(top / "d/f", flags) as fd:
            call(fd)

    return change


def store(fd: int) -> None:
    with libc.Mapping(fd, 4, writable=True) as mapping:
        mapping.store(0, b"map")
        mapping.sync()


def date(fd: int) -> None:
    os.utime(fd, ns=(7, 8))


def write_and_date(fd: int) -> None:
    os.write(fd, b"x")
    date(fd)


def load(fd: int) -> None:
    with libc.Mapping(fd, 4) as mapping:
        assert mapping.load(0, 3)


def copy(top: Path) -> None:
    with opened(top / "d/g", os.O_RDONLY) as source, opened(top / "d/f", os.O_WRONLY) as target:
        os.copy_file_range(source, target, 2)


def refused(number: int, call: Callable[..., Any], *arguments: Any) -> None:
    assert told(call, *arguments) == errno.errorcode[number]


# What is done to d/f ("file"), d/g ("other"), d/e/ (an empty directory), d/l (a link) and c/ (another directory).
CHANGES: dict[str, Callable[[Path], Any]] = {
    "read": lambda top: (top / "d/f").read_bytes(),
    "list": lambda top: os.listdir(top / "d"),
    "open for writing and close": with_handle(os.O_RDWR, lambda fd: None),
    "write": with_handle(os.O_WRONLY, lambda fd: os.write(fd, b"x")),
    "write of nothing": with_handle(os.O_WRONLY, lambda fd: os.write(fd, b"")),
    "append": with_handle(os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, b"x")),
    "fsync": with_handle(os.O_RDWR, os.fsync),
    "store through a mapping": with_handle(os.O_RDWR, store),
    "load through a mapping": with_handle(os.O_RDWR, load),
    "copy_file_range": copy,
    "ftruncate shorter": with_handle(os.O_RDWR, lambda fd: os.ftruncate(fd, 2)),
    "ftruncate longer": with_handle(os.O_RDWR, lambda fd: os.ftruncate(fd, 20)),
    "ftruncate to the same size": with_handle(os.O_RDWR, lambda fd: os.ftruncate(fd, 4)),
    "truncate shorter": lambda top: os.truncate(top / "d/f", 2),
    "truncate longer": lambda top: os.truncate(top / "d/f", 20),
    "truncate to nothing": lambda top: os.truncate(top / "d/f", 0),
    "truncate to the same size": lambda top: os.truncate(top / "d/f", 4),
    "truncate an empty file to nothing": lambda top: os.truncate(top / "d/empty", 0),
    "O_TRUNC": with_handle(os.O_WRONLY | os.O_TRUNC, lambda fd: None),
    "O_TRUNC and write": with_handle(os.O_WRONLY | os.O_TRUNC, lambda fd: os.write(fd, b"x")),
    "O_TRUNC of an empty file": lambda top: os.close(os.open(top / "d/empty", os.O_WRONLY | os.O_TRUNC)),
    "O_CREAT of an existing file": with_handle(os.O_WRONLY | os.O_CREAT, lambda fd: None),
    "create": lambda top: (top / "d/new").touch(),
    "create and write": lambda top: (top / "d/new").write_bytes(b"x"),
    "mkdir": lambda top: os.mkdir(top / "d/new"),
    "symlink": lambda top: os.symlink("x", top / "d/new"),
    "mkfifo": lambda top: os.mkfifo(top / "d/new"),
    "unlink": lambda top: os.unlink(top / "d/g"),
    "rmdir": lambda top: os.rmdir(top / "d/e"),
    "chmod": lambda top: os.chmod(top / "d/f", 0o600),
    "chmod to the same mode": lambda top: os.chmod(top / "d/f", 0o644),
    "fchmod": with_handle(os.O_RDONLY, lambda fd: os.fchmod(fd, 0o600)),
    "fchmod while writing": with_handle(os.O_WRONLY, lambda fd: os.fchmod(fd, 0o600)),
    "chmod of a directory": lambda top: os.chmod(top / "d/e", 0o700),
    "chown to the same owner": lambda top: os.chown(top / "d/f", os.getuid(), os.getgid()),
    "chown of a link": lambda top: os.lchown(top / "d/l", os.getuid(), os.getgid()),
    "rename": lambda top: os.rename(top / "d/f", top / "d/h"),
    "rename to another directory": lambda top: os.rename(top / "d/f", top / "c/f"),
    "rename over": lambda top: os.rename(top / "d/f", top / "d/g"),
    "rename onto itself": lambda top: os.rename(top / "d/f", top / "d/f"),
    "rename of a directory": lambda top: os.rename(top / "d/e", top / "d/new"),
    "rename of a directory to another": lambda top: os.rename(top / "d/e", top / "c/e"),
    "rename of a directory with entries": lambda top: os.rename(top / "d", top / "c/d"),
    "rename of a link": lambda top: os.rename(top / "d/l", top / "d/m"),
    "a rename that fails": lambda top: refused(errno.ENOENT, os.rename, top / "d/none", top / "d/f"),
    "an mkdir that fails": lambda top: refused(errno.EEXIST, os.mkdir, top / "d/e"),
    "an rmdir that fails": lambda top: refused(errno.ENOTEMPTY, os.rmdir, top / "d"),
    "utimensat": lambda top: os.utime(top / "d/f", ns=(5, 1_999_999_999_999_999_999)),
    "utimensat to now": lambda top: os.utime(top / "d/f"),
    "utimensat of a directory": lambda top: os.utime(top / "d/e", ns=(7, 8)),
    "utimensat of a link": lambda top: os.utime(top / "d/l", ns=(7, 8), follow_symlinks=False),
    "futimens": with_handle(os.O_RDONLY, date),
    "write, then futimens": with_handle(os.O_WRONLY, write_and_date),
    "UTIME_OMIT": lambda top: libc.utimensat(top / "d/f", ((0, libc.UTIME_OMIT), (0, libc.UTIME_OMIT))),
    "only atime": lambda top: libc.utimensat(top / "d/f", ((3, 4), (0, libc.UTIME_OMIT))),
    "only mtime": lambda top: libc.utimensat(top / "d/f", ((0, libc.UTIME_OMIT), (3, 4))),
    "atime now": lambda top: libc.utimensat(top / "d/f", ((0, libc.UTIME_NOW), (0, libc.UTIME_OMIT))),
    "mtime now": lambda top: libc.utimensat(top / "d/f", ((0, libc.UTIME_OMIT), (0, libc.UTIME_NOW))),
    "a time before 1970": lambda top: os.utime(top / "d/f", ns=(-5_000_000_001, -1)),
}
if os.getuid() == 0:
    CHANGES["chown"] = lambda top: os.chown(top / "d/f", 1, 2)
    CHANGES["chown to nobody new"] = lambda top: os.chown(top / "d/f", -1, -1)
    CHANGES["chgrp"] = lambda top: os.chown(top / "d/f", -1, 2)
    CHANGES["chown of a directory"] = lambda top: os.chown(top / "d/e", 1, 2)
TIMES_BY_READING = {"read", "list", "load through a mapping", "copy_file_range", "store through a mapping"}


def paths(top: Path) -> list[Path]:
    return sorted([top, *top.rglob("*")], key=str)


def furnish(top: Path) -> None:
    (top / "d/e").mkdir(parents=True)
    (top / "c").mkdir()
    (top / "d/f").write_bytes(b"file")
    (top / "d/g").write_bytes(b"other")
    (top / "d/empty").touch()
    (top / "d/l").symlink_to("f")
    for path in paths(top):
        os.utime(path, ns=(OLD, OLD), follow_symlinks=False)


def states(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """All below, each looked at before its listing can change its atime."""
    status = path.lstat()
    yield path, status
    if stat.S_ISDIR(status.st_mode):
        for name in sorted(os.listdir(path)):
            yield from states(path / name)


def changed(top: Path, change: Callable[[Path], Any]) -> dict[str, list[Any]]:
    """For each inode, by its name afterwards, the times that the change has changed; set ones with their value."""
    list(states(top))
    before = {status.st_ino: status for _, status in states(top)}
    time.sleep(TICK)
    started = time.time_ns()
    change(top)
    found = {}
    for path, after in states(top):
        was = before.get(after.st_ino)
        differs: list[Any] = []
        for field in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
            value = getattr(after, field)
            if was is None or value != getattr(was, field):
                differs.append((field, "now" if value > started - TICK * 1e9 else value))
        if was is None:
            differs.append("new")
        if differs:
            found[str(path.relative_to(top))] = differs
    return found


@pytest.mark.semantics("times")
@pytest.mark.parametrize("name", CHANGES)
def test_which_times_a_call_changes(both: Both, name: str) -> None:
    """atime, mtime and ctime of the file, its directory, its siblings: those that a local file system changes."""
    results = []
    for top in (both.local, both.mounted):
        furnish(top)
        results.append(changed(top, CHANGES[name]))
    expected, found = results
    if name in TIMES_BY_READING:  # a local file system may note a reading, natsfs never does
        assert not any("st_atime_ns" in [f for f, *_ in differs] for differs in found.values())
        expected = {
            path: kept
            for path, differs in expected.items()
            if (kept := [d for d in differs if d[0] != "st_atime_ns"])
        }
    report(
        f"{path}: local {expected.get(path)}, mount {found.get(path)}"
        for path in sorted(expected.keys() | found.keys())
        if expected.get(path) != found.get(path)
    )


@pytest.mark.semantics("times")
def test_the_time_of_a_write_is_seen_at_once(both: Both) -> None:
    """stat(2) tells the new mtime and size before the file is closed, and closing changes them no more."""

    def steps(top: Path) -> list[Any]:
        (top / "f").write_bytes(b"x")
        os.utime(top / "f", ns=(OLD, OLD))
        with opened(top / "f", os.O_WRONLY | os.O_APPEND) as fd:
            os.write(fd, b"more")
            written = os.stat(top / "f")
            time.sleep(TICK)
        closed = os.stat(top / "f")
        return [
            written.st_size,
            written.st_mtime_ns > OLD,
            (closed.st_mtime_ns, closed.st_ctime_ns) == (written.st_mtime_ns, written.st_ctime_ns),
        ]

    both.same(steps)


@pytest.mark.semantics("times")
def test_a_directory_from_the_future(both: Both) -> None:
    """A new entry sets its directory's mtime to the present, also where it was set to a time still to come."""

    def steps(top: Path) -> list[Any]:
        future = time.time_ns() + 10**18
        answers = []
        for call in (Path.mkdir, Path.rmdir):
            os.utime(top, ns=(future, future))
            call(top / "d")
            answers.append(top.stat().st_mtime_ns < future)
        return answers

    assert both.same(steps) == [True] * 2


@pytest.mark.semantics("times")
def test_times_of_all_ages(folder: Path) -> None:
    """Every nanosecond from year 1 to year 9999 that the kernel passes on comes back."""
    (folder / "f").touch()
    for value in (
        0,
        1,
        -1,
        999_999_999,
        -999_999_999,
        OLD,
        4_102_444_800_000_000_001,
        -2_208_988_800_000_000_007,
    ):
        os.utime(folder / "f", ns=(value, value + 1))
        status = (folder / "f").stat()
        assert (status.st_atime_ns, status.st_mtime_ns) == (value, value + 1)


@pytest.mark.semantics("attributes-stay")
def test_attributes_that_the_kernel_forgets(folder: Path) -> None:
    """What the kernel asks for again, after its caches were dropped, is what it was."""
    make_tree(folder)
    rename_file(folder)
    remove_entry(folder)
    before = attributes(folder)
    with contextlib.suppress(PermissionError), open("/proc/sys/vm/drop_caches", "w") as control:
        control.write("2")
    assert attributes(folder) == before


# --- after a remount ----------------------------------------------------------------------------------------------


def attributes(top: Path) -> dict[str, tuple[Any, ...]]:
    found = {}
    for path in paths(top):
        if path != top:  # the bucket's own directory has no place in the store
            s = path.lstat()
            found[str(path.relative_to(top))] = (
                *(oct(s.st_mode), s.st_uid, s.st_gid, s.st_nlink, s.st_size, s.st_blocks, s.st_rdev),
                *(s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns, s.st_ino),
            )
    return found


def make_tree(top: Path) -> None:
    """All that keeps its attributes without more being known of it than its own last change."""
    for name in ("a/b/c", "a/empty", "set"):
        (top / name).mkdir(parents=True)
    for number, name in enumerate(("f", "a/f", "a/b/f", "a/b/c/f")):
        (top / name).write_bytes(noisy(number))
    (top / "a/l").symlink_to("f")
    (top / "dangling").symlink_to("nowhere")
    os.mkfifo(top / "a/fifo")
    os.chmod(top / "a/b/f", 0o4710)
    (top / "set/f").touch()
    os.utime(top / "set/f", ns=(OLD, OLD + 1))
    os.utime(top / "set", ns=(OLD + 2, OLD + 3))


def noisy(number: int) -> bytes:
    return bytes([number]) * (number * 70_000)


def rename_file(top: Path) -> None:
    os.rename(top / "a/f", top / "a/g")


def rename_directory(top: Path) -> None:
    os.rename(top / "a/b", top / "a/d")


def chmod_entry(top: Path) -> None:
    time.sleep(TICK)
    os.chmod(top / "a/b/c/f", 0o600)


def write_entry(top: Path) -> None:
    time.sleep(TICK)
    (top / "a/b/c/f").write_bytes(b"changed")


def remove_entry(top: Path) -> None:
    os.unlink(top / "a/b/f")


def remove_directory(top: Path) -> None:
    os.rmdir(top / "a/empty")


def nothing(top: Path) -> None:
    """Only the tree as it was made."""


FIELDS = ("mode", "uid", "gid", "nlink", "size", "blocks", "rdev", "atime", "mtime", "ctime", "ino")


def after_a_remount(
    bucket: str,
    mount: Mounter,
    folder: Path,
    change: Callable[[Path], None],
) -> list[str]:
    first = mount(f"/{bucket}", folder=folder)
    make_tree(first.path)
    change(first.path)
    before = attributes(first.path)
    assert first.finish() == []
    after = attributes(mount(f"/{bucket}", folder=folder).path)
    assert after.keys() == before.keys()
    return [
        f"{path}: {field} {was} became {now}"
        for path in before
        for field, was, now in zip(FIELDS, before[path], after[path], strict=True)
        if was != now
    ]


@pytest.mark.semantics("attributes-after-a-remount")
@pytest.mark.parametrize(
    "change",
    [nothing, rename_file, rename_directory, chmod_entry, write_entry, remove_entry, remove_directory],
    ids=lambda change: change.__name__,
)
def test_attributes_after_a_remount(
    bucket: str, mount: Mounter, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    """Mode, owner, size, times and inode number of files, directories and links are the same as before."""
    report(after_a_remount(bucket, mount, tmp_path, change))


@pytest.mark.semantics("times")
def test_times_set_after_ftruncate(folder: Path) -> None:
    fd = os.open(folder / "f", os.O_WRONLY | os.O_CREAT, 0o600)
    os.ftruncate(fd, 2)
    os.utime(folder / "f", ns=(1, 1))
    os.close(fd)
    assert (folder / "f").stat().st_mtime_ns == 1

"""open(2): every combination of flags on everything that a name can lead to, as on a local file system."""

from __future__ import annotations

import itertools
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.posix.both import Both, report, told

ACCESS = ("O_RDONLY", "O_WRONLY", "O_RDWR")
FLAGS = ("O_CREAT", "O_EXCL", "O_TRUNC", "O_APPEND", "O_DIRECTORY", "O_NOFOLLOW")
# These change nothing of what is compared here; alone, and with what they could disturb.
HARMLESS = ("O_CLOEXEC", "O_SYNC", "O_DSYNC", "O_NONBLOCK", "O_NOATIME", "O_NOCTTY")

Target = Callable[[Path], Path | str]


def absent(top: Path) -> Path:
    return top / "target"


def empty_file(top: Path) -> Path:
    (top / "target").touch()
    return top / "target"


def file(top: Path) -> Path:
    (top / "target").write_bytes(b"content")
    return top / "target"


def directory(top: Path) -> Path:
    (top / "target").mkdir()
    return top / "target"


def link_to_file(top: Path) -> Path:
    (top / "file").write_bytes(b"content")
    (top / "target").symlink_to("file")
    return top / "target"


def link_to_directory(top: Path) -> Path:
    (top / "directory").mkdir()
    (top / "target").symlink_to("directory")
    return top / "target"


def dangling_link(top: Path) -> Path:
    (top / "target").symlink_to("nowhere")
    return top / "target"


def link_loop(top: Path) -> Path:
    (top / "target").symlink_to("back")
    (top / "back").symlink_to("target")
    return top / "target"


def below_a_file(top: Path) -> Path:
    (top / "file").write_bytes(b"content")
    return top / "file/target"


def below_nothing(top: Path) -> Path:
    return top / "nothing/target"


def file_with_slash(top: Path) -> str:
    return f"{file(top)}/"  # a Path drops the slash


def new_with_slash(top: Path) -> str:
    return f"{top}/target/"


def fifo(top: Path) -> Path:
    os.mkfifo(top / "target")
    return top / "target"


TARGETS = (
    absent,
    empty_file,
    file,
    directory,
    link_to_file,
    link_to_directory,
    dangling_link,
    link_loop,
    below_a_file,
    below_nothing,
    file_with_slash,
    new_with_slash,
    fifo,
)


def combinations(target: Target) -> Iterator[tuple[str, ...]]:
    always = ("O_NONBLOCK",) if target is fifo else ()  # or open(2) waits for somebody at the other end
    for access in ACCESS:
        for count in range(len(FLAGS) + 1):
            for chosen in itertools.combinations(FLAGS, count):
                yield (access, *chosen, *always)
    for flag in HARMLESS:
        for access, more in itertools.product(
            ACCESS, ((), ("O_CREAT",), ("O_CREAT", "O_EXCL"), ("O_TRUNC",))
        ):
            yield (access, flag, *more, *always)
    for more in (
        (),
        ("O_DIRECTORY",),
        ("O_NOFOLLOW",),
        ("O_DIRECTORY", "O_NOFOLLOW"),
        ("O_CREAT", "O_TRUNC"),
    ):
        yield ("O_PATH", *more, *always)


def shown(top: Path) -> dict[str, Any]:
    """What is in a directory: types, sizes, and through a new open the content."""
    found: dict[str, Any] = {}
    for name in sorted(os.listdir(top)):
        status = (top / name).lstat()
        kind = stat.S_IFMT(status.st_mode)
        content = (top / name).read_bytes() if kind == stat.S_IFREG else None
        found[name] = (oct(status.st_mode), status.st_size if content is not None else None, content)
    return found


def use(path: Path | str, flags: int) -> list[Any]:
    """Open, write, read from the start, look, close."""
    fd = told(os.open, path, flags, 0o640)
    if isinstance(fd, str):
        return [("open", fd)]
    return [
        ("open", "done"),
        ("write", told(os.write, fd, b"XY")),
        ("seek", told(os.lseek, fd, 0, os.SEEK_SET)),
        ("read", told(os.read, fd, 100)),
        ("fstat", told(lambda: stat.S_IFMT(os.fstat(fd).st_mode))),
        ("close", told(os.close, fd)),
    ]


class Place:
    """A directory with the target in it, made again only where an attempt has changed it."""

    def __init__(self, top: Path, target: Target) -> None:
        self.top = top
        self.target = target
        self.pristine: dict[str, Any] | None = None
        self.path: Path | str = top
        self.make()

    def make(self) -> None:
        for entry in os.scandir(self.top):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry)
            else:
                os.unlink(entry)
        self.path = self.target(self.top)
        self.pristine = shown(self.top)

    def attempt(self, flags: int) -> list[Any]:
        steps = use(self.path, flags)
        after = shown(self.top)
        if after != self.pristine:
            self.make()
        return [*steps, ("afterwards", after)]


@pytest.mark.semantics("open-flags")
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_open_flags(both: Both, target: Target) -> None:
    """Each combination opens, refuses, creates, empties and appends as it does locally."""
    local, mounted = Place(both.local, target), Place(both.mounted, target)
    differences = []
    for names in combinations(target):
        flags = 0
        for name in names:
            flags |= getattr(os, name)
        expected, found = local.attempt(flags), mounted.attempt(flags)
        differences += [
            f"{'|'.join(names)}: local {one}, mount {other}"
            for one, other in itertools.zip_longest(expected, found)
            if one != other
        ][:2]
    report(differences)

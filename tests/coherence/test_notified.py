"""Programs that wait for changes."""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import struct
import subprocess
import time
from pathlib import Path

import pytest

from natsfs.files.reader import SMALL
from tests.coherence.test_seen_at_once import Writers
from tests.support import Mount, holds, until

IN_DELETE_SELF = 0x400
IN_CHANGES = 0xFC6  # of content, attributes, entries and the name; not what opening, reading and closing tell
IN_IGNORED = 0x8000  # the watch has ended


@pytest.fixture(params=["natsfs", "go", "rust", "javascript", "python"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def events(fd: int, limit: float) -> int:
    """The union of the masks of what arrives within `limit` seconds, or until the file is gone."""
    mask, deadline = 0, time.monotonic() + limit
    while not mask & IN_DELETE_SELF and select.select([fd], [], [], max(0, deadline - time.monotonic()))[0]:
        data = os.read(fd, 4096)
        while data:
            _, found, _, length = struct.unpack_from("iIII", data)
            mask |= found
            data = data[16 + length :]
    return mask


@pytest.mark.semantics("inotify")
def test_inotify_of_a_removal(
    folders: tuple[Path, Path], writers: Writers, mounts: tuple[Mount, Mount], kind: str
) -> None:
    """Who watches a file with inotify(7) hears that another client has removed it."""
    here, there = folders
    writer = writers(kind, mounts[1])
    libc = ctypes.CDLL(None, use_errno=True)
    (there / "f").write_bytes(b"x")
    until(lambda: (here / "f").exists())
    # Notifications of one directory come in order: after this the kernel has heard all that there was about "f".
    writer.put(here.name, "g", b"x")
    until(lambda: (here / "g").exists() and (there / "g").exists())
    writer.delete(here.name, "g")
    until(lambda: not (here / "g").exists())
    fd = libc.inotify_init1(os.O_CLOEXEC)
    try:
        assert libc.inotify_add_watch(fd, os.fsencode(here / "f"), IN_DELETE_SELF) > 0
        writer.delete(here.name, "f")
        assert events(fd, 2) & IN_DELETE_SELF
    finally:
        os.close(fd)


def settled(here: Path, there: Path) -> None:
    """The kernel has heard of all that was done in a directory: its notifications come in order."""
    (there / "later").touch()
    until((here / "later").exists, 10)
    (there / "later").unlink()
    until(lambda: not (here / "later").exists(), 10)


@pytest.mark.semantics("inotify")
def test_what_inotify_tells(folders: tuple[Path, Path]) -> None:
    """Who watches a file or directory hears that it is removed or renamed elsewhere. Nobody hears anything else.

    Who watches a file that is replaced hears that it is removed if the kernel has asked by then for its links.
    """
    here, there = (folder / "d" for folder in folders)
    there.mkdir()
    for name in ("removed", "renamed", "replaced"):
        (there / name).write_text("old")
    until(lambda: len(os.listdir(folders[0])) == 1 and len(os.listdir(here)) == 3, 10)
    settled(here, there)
    settled(*folders)
    libc = ctypes.CDLL(None, use_errno=True)
    watched: dict[int, str] = {}
    told: list[str] = []

    def hear(last: str) -> None:
        """Until the end of this watch is told."""
        ended = False
        while not ended and select.select([fd], [], [], 10)[0]:
            data = os.read(fd, 4096)
            while data:
                watch, mask, _, length = struct.unpack_from("iIII", data)
                data = data[16 + length :]
                if mask & IN_IGNORED:
                    ended = ended or watched[watch] == last
                else:
                    told.append(f"{watched[watch]} {mask & 0xFFFF:#x}")
        assert ended, told

    fd = libc.inotify_init1(os.O_CLOEXEC)
    try:
        for path in (folders[0], here, here / "removed", here / "renamed", here / "replaced"):
            watched[libc.inotify_add_watch(fd, os.fsencode(path), IN_CHANGES)] = path.name
        assert len(watched) == 5
        for name in ("new", "replaced"):
            (there / name).write_text("new content")
            until(lambda name=name: holds(here / name, b"new content"))  # type: ignore[misc]
        with (there / "removed").open("a") as file:
            file.write(" and more")
        until(lambda: holds(here / "removed", b"old and more"))
        (there / "removed").chmod(0o600)
        until(lambda: (here / "removed").stat().st_mode & 0o777 == 0o600)
        (there / "directory").mkdir()
        until((here / "directory").is_dir)
        (there / "renamed").rename(there / "directory" / "f")
        hear("renamed")
        (there / "removed").unlink()
        hear("removed")
        shutil.rmtree(there / "directory")
        for name in ("new", "replaced"):
            (there / name).unlink()
        until(lambda: os.listdir(here) == [])
        settled(here, there)
        there.rmdir()
        hear("d")
    finally:
        os.close(fd)
    told = [one for one in told if one != f"replaced {IN_DELETE_SELF:#x}"]
    assert told == [f"{name} {IN_DELETE_SELF:#x}" for name in ("renamed", "removed", "d")]


@pytest.mark.semantics("tail")
@pytest.mark.parametrize("flag", ["-f", "-F"])
@pytest.mark.parametrize("how", ["close", "fsync"])
@pytest.mark.parametrize("size", [7, SMALL - 40], ids=["short", "over 1 MiB"])
def test_tail(folders: tuple[Path, Path], tmp_path: Path, size: int, how: str, flag: str) -> None:
    """`tail -f` and `tail -F` print each line that another mount appends to a log once, and none twice."""
    here, there = folders
    first = "line 0\n".rjust(size, "-")
    (there / "log").write_text(first)
    until(lambda: (here / "log").exists())
    printed = tmp_path / "printed"
    with printed.open("wb") as output, (tmp_path / "said").open("wb") as said:
        tail = subprocess.Popen(
            ["tail", "-n", "+1", flag, "-s", "0.05", here / "log"],
            stdout=output,
            stderr=said,
        )
        try:
            until(lambda: printed.read_text() == first, 10)
            held = os.open(there / "log", os.O_WRONLY | os.O_APPEND)
            for number in range(1, 11):
                line = f"line {number}\n".encode()
                if how == "fsync":
                    os.write(held, line)
                    os.fsync(held)
                else:
                    with (there / "log").open("ab") as log:
                        log.write(line)
                time.sleep(0.1)
            os.close(held)
            expected = first + "".join(f"line {number}\n" for number in range(1, 11))
            until(lambda: printed.read_text().endswith("line 10\n"), 10)
            assert printed.read_text() == expected
        finally:
            tail.kill()
            tail.wait()

"""renameat2(2) with RENAME_EXCHANGE."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from pathlib import Path

import pytest

from tests.support import Client, Mounter, opened, raises

RENAME_EXCHANGE = 2
AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


def exchange(one: Path, two: Path) -> None:
    if _libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(two), RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one))


@pytest.mark.semantics("rename-exchange")
def test_two_files_change_places(folder: Path, client: Client) -> None:
    """Content, inode and attributes go along; open handles stay with their file."""
    (folder / "d").mkdir()
    (folder / "one").write_bytes(b"1" * 200_000)
    (folder / "d/two").write_bytes(b"two")
    (folder / "one").chmod(0o600)
    inos = (folder / "one").stat().st_ino, (folder / "d/two").stat().st_ino
    with opened(folder / "one", os.O_RDWR) as fd:
        exchange(folder / "one", folder / "d/two")
        assert os.pread(fd, 3, 0) == b"111"
    assert (folder / "one").read_bytes() == b"two"
    assert (folder / "d/two").read_bytes() == b"1" * 200_000
    assert (folder / "d/two").stat().st_mode & 0o777 == 0o600
    assert ((folder / "d/two").stat().st_ino, (folder / "one").stat().st_ino) == inos
    assert client.read(folder.name, "one") == b"two"
    assert client.read(folder.name, "d/two") == b"1" * 200_000
    assert client.names(folder.name) == {"one", "d/", "d/two"}, "nothing else is left"
    exchange(folder / "one", folder / "d/two")
    assert (folder / "d/two").read_bytes() == b"two"


@pytest.mark.semantics("rename-exchange")
def test_a_file_that_is_being_written_changes_places(folder: Path, client: Client) -> None:
    (folder / "old").write_bytes(b"old")
    with opened(folder / "new", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"new")
        exchange(folder / "old", folder / "new")
        os.write(fd, b" and more")
    assert (folder / "old").read_bytes() == b"new and more"
    assert (folder / "new").read_bytes() == b"old"
    assert client.read(folder.name, "old") == b"new and more"


@pytest.mark.semantics("rename-exchange")
def test_directories_change_places_with_all_that_is_below(folder: Path, client: Client) -> None:
    for name in ("a/x/f", "a/g", "b/h"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "file").write_text("file")
    exchange(folder / "a", folder / "b")
    assert (folder / "b/x/f").read_text() == "a/x/f"
    assert (folder / "a/h").read_text() == "b/h"
    assert sorted(os.listdir(folder / "b")) == ["g", "x"]
    exchange(folder / "b", folder / "file")
    assert (folder / "b").read_text() == "file"
    assert (folder / "file/x/f").read_text() == "a/x/f"
    assert client.names(folder.name) == {"a/", "a/h", "b", "file/", "file/g", "file/x/", "file/x/f"}


@pytest.mark.semantics("rename-exchange")
def test_exchange_errors(folder: Path) -> None:
    (folder / "d/e").mkdir(parents=True)
    (folder / "f").touch()
    with raises(errno.ENOENT):
        exchange(folder / "f", folder / "absent")
    with raises(errno.ENOENT):
        exchange(folder / "absent", folder / "f")
    with raises(errno.EINVAL):
        exchange(folder / "d", folder / "d/e")
    with raises(errno.EINVAL):
        exchange(folder / "d/e", folder / "d")
    exchange(folder / "f", folder / "f")
    assert sorted(os.listdir(folder)) == ["d", "f"]


@pytest.mark.semantics("rename-exchange")
def test_no_name_is_ever_missing(bucket: str, mount: Mounter) -> None:
    """A reader elsewhere finds one of the two files under either name at any time."""
    here, there = mount(f"/{bucket}").path, mount(f"/{bucket}").path
    for name in ("one", "two"):
        (here / name).write_text(name)
    stop = threading.Event()
    seen: list[str] = []

    def look() -> None:
        while not stop.is_set():
            for name in ("one", "two"):
                try:
                    seen.append((there / name).read_text())
                except OSError as error:
                    seen.append(f"{name}: {error}")

    for name in ("one", "two"):
        while not (there / name).exists():
            pass
    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(50):
            exchange(here / "one", here / "two")
    finally:
        stop.set()
        thread.join()
    assert set(seen) <= {"one", "two"}
    assert {(here / name).read_text() for name in ("one", "two")} == {"one", "two"}

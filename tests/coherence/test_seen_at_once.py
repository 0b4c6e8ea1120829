"""Whatever anybody changes shows on a mount that has everything cached, without any time-out."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.coherence.writers import DESCRIPTION, Writer
from tests.support import Mount, noise, until

Writers = Callable[[str, Mount], Writer]

ALL = ("natsfs", "go", "python", "rust", "javascript")
# nats-py can neither rename nor link.
RENAMING = ("natsfs", "go", "rust", "javascript")
LARGE = 300_000


def entry(path: Path) -> object:
    """What a program finds under a name: None, a directory, a link's text, or size and content."""
    try:
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            return "directory"
        if stat.S_ISLNK(status.st_mode):
            return os.readlink(path)
        return status.st_size, path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.errno


def view(folder: Path, *absent: str) -> dict[str, object]:
    """A folder by listing, stat, readlink and read, with the names of which it is asked beside the listing.

    Called before a change, it fills all caches of the kernel: those of entries that do not exist, too.
    """
    listed = os.listdir(folder)
    assert len(set(listed)) == len(listed)
    return {name: entry(folder / name) for name in {*listed, *absent}}


def shows(folder: Path, expected: dict[str, object], *absent: str) -> None:
    wanted = dict.fromkeys(absent) | expected
    try:
        until(lambda: view(folder, *absent) == wanted)
    except AssertionError:
        assert view(folder, *absent) == wanted


def described(path: Path) -> str | None:
    try:
        return os.getxattr(path, "user.nats.description").decode()
    except OSError as error:
        return None if error.errno == errno.ENODATA else str(error)


def whole(data: bytes) -> tuple[int, bytes]:
    return len(data), data


@pytest.fixture(params=ALL)
def writer(request: pytest.FixtureRequest, writers: Writers, mounts: tuple[Mount, Mount]) -> Writer:
    return writers(request.param, mounts[1])


@pytest.fixture(params=RENAMING)
def renamer(request: pytest.FixtureRequest, writers: Writers, mounts: tuple[Mount, Mount]) -> Writer:
    return writers(request.param, mounts[1])


@pytest.mark.semantics("changes-by-others-show")
def test_put(folders: tuple[Path, Path], writer: Writer) -> None:
    """A new object is found where there was none before, in a new directory, too."""
    here, _ = folders
    assert view(here, "f", "d", "empty") == {"f": None, "d": None, "empty": None}
    data = noise(LARGE)
    writer.put(here.name, "f", data)
    shows(here, {"f": whole(data)}, "d", "empty")
    writer.put(here.name, "empty", b"")
    shows(here, {"f": whole(data), "empty": whole(b"")}, "d")


@pytest.mark.semantics("changes-by-others-show")
def test_overwrite(folders: tuple[Path, Path], writer: Writer) -> None:
    """New content shows although size and pages were cached; also of the same size, and empty."""
    here, _ = folders
    (here / "f").write_bytes(noise(LARGE))
    until(lambda: (folders[1] / "f").exists())
    for number, size in enumerate((LARGE, LARGE, 5, 5, 0, LARGE + 1)):
        data = noise(size, number + 1)
        view(here)
        writer.put(here.name, "f", data)
        shows(here, {"f": whole(data)})


@pytest.mark.semantics("changes-by-others-show")
def test_metadata(folders: tuple[Path, Path], writer: Writer) -> None:
    """A change of the metadata shows, and the file stays the same file with the same content."""
    here, there = folders
    (here / "f").write_bytes(b"content")
    (here / "f").chmod(0o640)
    until(lambda: (there / "f").exists() and (there / "f").stat().st_mode & 0o777 == 0o640)
    before = (here / "f").stat()
    with open(here / "f", "rb") as file:
        writer.change(here.name, "f")
        until(lambda: described(here / "f") == DESCRIPTION)
        assert (here / "f").stat().st_ino == before.st_ino
        assert file.read() == b"content"
    assert view(here) == {"f": whole(b"content")}


@pytest.mark.semantics("changes-by-others-show")
def test_delete(folders: tuple[Path, Path], writer: Writer) -> None:
    """A deleted object is gone from listings and from the cache of entries; a put brings the name back."""
    here, there = folders
    (here / "f").write_bytes(noise(LARGE))
    (here / "g").write_bytes(b"stays")
    until(lambda: (there / "f").exists())
    view(here)
    writer.delete(here.name, "f")
    shows(here, {"g": whole(b"stays")}, "f")
    until(lambda: not (there / "f").exists())
    writer.put(here.name, "f", b"again")
    shows(here, {"f": whole(b"again"), "g": whole(b"stays")})


@pytest.mark.semantics("changes-by-others-show")
def test_rename(folders: tuple[Path, Path], renamer: Writer) -> None:
    """The new name appears and the old one goes, although most clients purge it without any message."""
    here, there = folders
    data = noise(LARGE)
    (here / "a").write_bytes(data)
    until(lambda: (there / "a").exists())
    view(here, "b")
    renamer.rename(here.name, "a", "b")
    shows(here, {"b": whole(data)}, "a")
    until(lambda: (there / "b").exists())
    renamer.rename(here.name, "b", "a")
    shows(here, {"a": whole(data)}, "b")


@pytest.mark.semantics("changes-by-others-show")
def test_link(folders: tuple[Path, Path], renamer: Writer) -> None:
    """A link is a symbolic link at once."""
    here, there = folders
    (here / "f").write_bytes(b"target")
    until(lambda: (there / "f").exists())
    view(here, "link")
    renamer.link(here.name, "f", "link")
    shows(here, {"f": whole(b"target"), "link": "f"})
    assert (here / "link").read_bytes() == b"target"

"""Official clients and natsfs on the same buckets: all see the same objects, byte for byte."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from tests.interop.clients import JavaScript, Other
from tests.support import CHUNK, Client, Mount, content, digest_of, holds, noise, opened, until

SIZES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 1_000_000, 5_000_000]
NAMES = ["plain", "with space/and/slashes", "ÿé in Latin-1", "emoji 🐘", "new\nline"]


def usable(other: Other, name: str) -> bool:
    """The JavaScript client encodes names in Latin-1 where all others take UTF-8: it finds only its own ones."""
    return name.isascii() or not isinstance(other, JavaScript)


@pytest.mark.parametrize("size", SIZES)
def test_written_here_read_there(folder: Path, other: Other, size: int) -> None:
    """What was written through the mount has the right content and digest for the client."""
    data = noise(size, 3)
    (folder / "f").write_bytes(data)
    assert other.get(folder.name, "f") == data
    assert other.digest(folder.name, "f") == digest_of(data)


@pytest.mark.parametrize("size", SIZES)
def test_written_there_read_here(folder: Path, other: Other, size: int) -> None:
    """What the client puts reads back through the mount, whole and at its ends."""
    data = noise(size, 4)
    other.put(folder.name, "f", data)
    until(lambda: (folder / "f").exists())
    assert (folder / "f").stat().st_size == size
    with opened(folder / "f", os.O_RDONLY) as fd:
        assert os.pread(fd, 1000, max(0, size - 1000)) == data[-1000:]
        assert os.pread(fd, 1000, size // 2) == data[size // 2 :][:1000]
    assert (folder / "f").read_bytes() == data


@pytest.mark.parametrize("name", NAMES)
def test_names(folder: Path, other: Other, name: str) -> None:
    """The same name on both sides, in both directions."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"here")
    if usable(other, name):
        assert other.get(folder.name, name) == b"here"
        assert name in other.names(folder.name)
        other.put(folder.name, name, b"there")
        until(lambda: content(path) == b"there")
        path.unlink()
        assert other.get(folder.name, name) is None
        other.put(folder.name, name, b"again")
        until(lambda: content(path) == b"again")
    else:
        assert name in other.names(folder.name)


def test_a_name_that_javascript_encodes_its_own_way(folder: Path, other: Other, client: Client) -> None:
    """Under whatever subject an object came: it is read, overwritten and removed there, and no second one appears."""
    name = "ÿé"
    other.put(folder.name, name, b"theirs")
    until(lambda: content(folder / name) == b"theirs")
    (folder / name).write_bytes(b"ours")
    assert other.get(folder.name, name) == b"ours"
    assert len(client.subjects(folder.name, "M")) == 1
    (folder / name).unlink()
    assert not other.get(folder.name, name)
    assert len(client.subjects(folder.name, "M")) == 1
    assert os.listdir(folder) == []


def test_deletes_are_seen(folder: Path, other: Other) -> None:
    """Each side's delete makes the object disappear on the other."""
    (folder / "a").write_bytes(b"a")
    other.put(folder.name, "b", b"b")
    until(lambda: (folder / "b").exists())
    other.delete(folder.name, "a")
    until(lambda: os.listdir(folder) == ["b"])
    (folder / "b").unlink()
    assert other.get(folder.name, "b") is None
    assert other.names(folder.name) == set()
    assert os.listdir(folder) == []


def test_tombstones_do_not_hinder(folder: Path, other: Other) -> None:
    """After a removal here the client puts, gets, deletes and lists the name as if it were new, again and again."""
    for number in range(3):
        (folder / "f").write_bytes(f"{number}".encode())
        (folder / "f").unlink()
        assert other.names(folder.name) == set()
        assert other.get(folder.name, "f") is None
        other.put(folder.name, "f", b"there")
        assert other.get(folder.name, "f") == b"there"
        until(lambda: content(folder / "f") == b"there")
        other.delete(folder.name, "f")
        until(lambda: not (folder / "f").exists())


def test_overwriting_each_other(folder: Path, other: Other) -> None:
    """Writes in turns: each side always has the last one, with the right digest."""
    for number in range(6):
        data = noise(200_000 + number, number)
        if number % 2:
            other.put(folder.name, "f", data)
            until(partial(holds, folder / "f", data))
        else:
            (folder / "f").write_bytes(data)
        assert other.get(folder.name, "f") == data
        assert other.digest(folder.name, "f") == digest_of(data)


def test_their_object_changed_here(folder: Path, other: Other) -> None:
    """Append, change, truncate and chmod an object of the client: it reads the result."""
    data = noise(500_000)
    other.put(folder.name, "f", data)
    path = folder / "f"
    until(lambda: path.exists())
    with path.open("ab") as file:
        file.write(b"appended")
    assert other.get(folder.name, "f") == data + b"appended"
    with opened(path, os.O_RDWR) as fd:
        os.pwrite(fd, b"changed", 100_000)
    expected = data[:100_000] + b"changed" + data[100_007:] + b"appended"
    assert other.get(folder.name, "f") == expected
    os.truncate(path, 150_000)
    path.chmod(0o600)
    assert other.get(folder.name, "f") == expected[:150_000]
    assert other.digest(folder.name, "f") == digest_of(expected[:150_000])


def test_their_object_renamed_and_removed_here(folder: Path, other: Other) -> None:
    """The client finds it under the new name only, then not at all."""
    data = noise(300_000)
    other.put(folder.name, "a", data)
    until(lambda: (folder / "a").exists())
    (folder / "d").mkdir()
    (folder / "a").rename(folder / "d/b")
    assert other.get(folder.name, "a") is None
    assert other.get(folder.name, "d/b") == data
    assert "a" not in other.names(folder.name)
    (folder / "d/b").unlink()
    assert other.get(folder.name, "d/b") is None


@pytest.mark.parametrize("then", ["put", "delete", "put and delete"])
def test_the_old_name_after_a_rename(folder: Path, other: Other, then: str) -> None:
    """What the client does to the old name leaves the renamed object whole: the tombstone has a nuid of its own."""
    data = noise(300_000)
    (folder / "a").write_bytes(data)
    (folder / "a").rename(folder / "b")
    if "put" in then:
        other.put(folder.name, "a", b"new")
        until(lambda: content(folder / "a") == b"new")
    if "delete" in then:
        try:
            other.delete(folder.name, "a")
        except Exception:
            assert then == "delete"  # some clients refuse to delete what is deleted already
        until(lambda: not (folder / "a").exists())
    assert other.get(folder.name, "b") == data
    with opened(folder / "b", os.O_RDONLY) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, len(data), 0) == data


def test_a_directory_rename_for_others(folder: Path, other: Other) -> None:
    """After a directory was renamed the client reads everything under the new names, and nothing under the old."""
    (folder / "old/sub").mkdir(parents=True)
    for number in range(5):
        (folder / f"old/sub/{number}").write_bytes(noise(140_000, number))
    (folder / "old").rename(folder / "new")
    names = other.names(folder.name)
    assert not [name for name in names if name.startswith("old")]
    for number in range(5):
        assert f"new/sub/{number}" in names
        assert other.get(folder.name, f"new/sub/{number}") == noise(140_000, number)


def test_buckets_made_by_mkdir(folder: Path, other: Other, shared: Mount) -> None:
    """A bucket that mkdir made works for the client like one of its own (this is `folder`)."""
    other.put(folder.name, "x", b"1")
    assert other.names(folder.name) == {"x"}
    other.delete(folder.name, "x")
    until(lambda: os.listdir(folder) == [])


def test_symbolic_links_and_directories_are_harmless_objects(folder: Path, other: Other) -> None:
    """What only a file system has is an empty object for the client; it does not break its listing."""
    (folder / "link").symlink_to("nowhere")
    (folder / "d").mkdir()
    os.mkfifo(folder / "fifo")
    assert other.names(folder.name) == {"link", "d/", "fifo"}
    assert other.get(folder.name, "link") == b""
    assert other.get(folder.name, "d/") == b""


@pytest.mark.semantics("links-for-others")
def test_a_link_to_an_object_is_one_for_the_client(folder: Path, other: Other) -> None:
    """Whoever gets the link through another client has the object that it leads to."""
    (folder / "d").mkdir()
    (folder / "d/f").write_bytes(b"content")
    for name, target in (("near", "d/f"), ("d/up", "../d/./f"), ("far", folder / "d/f")):
        (folder / name).symlink_to(target)
        assert os.readlink(folder / name) == str(target)
        assert (folder / name).read_bytes() == b"content"
        assert other.get(folder.name, name) == b"content"

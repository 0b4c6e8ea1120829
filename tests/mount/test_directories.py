"""Implied directories, markers, and large directories."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.support import Client, Mounter, run, until


@pytest.mark.semantics("directories")
def test_implied_directories(bucket: str, mount: Mounter, client: Client) -> None:
    """`a/b/c` makes the directories a and a/b, before and after the mount."""
    client.put(bucket, "a/b/c", b"1")
    root = mount(f"/{bucket}").path
    assert os.listdir(root) == ["a"]
    assert os.listdir(root / "a") == ["b"]
    assert (root / "a/b/c").read_bytes() == b"1"
    client.put(bucket, "x/y/z", b"2")
    until(lambda: (root / "x/y/z").exists())
    assert sorted(os.listdir(root)) == ["a", "x"]


def test_an_implied_directory_goes_with_its_last_object(bucket: str, mount: Mounter, client: Client) -> None:
    """Without a marker, what another client empties is gone."""
    client.put(bucket, "a/b/c", b"1")
    root = mount(f"/{bucket}").path
    assert (root / "a/b").is_dir()
    client.delete(bucket, "a/b/c")
    until(lambda: os.listdir(root) == [])


@pytest.mark.semantics("directories")
def test_a_directory_stays_after_its_last_file(
    bucket: str, mount: Mounter, client: Client, tmp_path: Path
) -> None:
    """What is emptied through the mount stays until rmdir, also over a remount."""
    client.put(bucket, "a/b/c", b"1")
    first = mount(f"/{bucket}", folder=tmp_path)
    (first.path / "a/b/c").unlink()
    assert os.listdir(first.path / "a/b") == []
    assert client.names(bucket) == {"a/b/"}
    assert first.finish() == []
    root = mount(f"/{bucket}", folder=tmp_path).path
    assert os.listdir(root / "a") == ["b"]
    (root / "a/b").rmdir()
    assert os.listdir(root) == ["a"]
    (root / "a").rmdir()
    assert os.listdir(root) == []
    assert client.names(bucket) == set()


def test_a_directory_stays_after_its_last_file_is_moved_away(
    bucket: str, mount: Mounter, client: Client
) -> None:
    """rename(2) out of a directory keeps it as unlink(2) does."""
    client.put(bucket, "a/b", b"1")
    root = mount(f"/{bucket}").path
    (root / "a/b").rename(root / "b")
    assert sorted(os.listdir(root)) == ["a", "b"]
    assert client.names(bucket) == {"a/", "b"}


@pytest.mark.semantics("directories")
def test_markers(folder: Path, client: Client) -> None:
    """mkdir writes a zero-byte object `d/`; rmdir replaces it by a tombstone."""
    (folder / "d").mkdir(mode=0o750)
    meta = client.stored(folder.name, "d/")
    assert (meta["size"], meta["chunks"]) == (0, 0)
    assert meta["metadata"]["mode"] == "40750"
    (folder / "d").rmdir()
    assert client.names(folder.name) == set()
    (folder / "d").mkdir()
    assert client.names(folder.name) == {"d/"}


def test_markers_of_others(bucket: str, mount: Mounter, client: Client) -> None:
    """An empty object whose name ends in a slash, put by anybody, is a directory."""
    client.put(bucket, "made/by/others/", b"")
    root = mount(f"/{bucket}").path
    assert (root / "made/by/others").is_dir()
    client.put(bucket, "later/", b"")
    until(lambda: (root / "later").is_dir())
    client.delete(bucket, "later/")
    until(lambda: not (root / "later").exists())


def test_an_object_that_is_also_a_directory(bucket: str, mount: Mounter, client: Client) -> None:
    """`a` and `a/b` are both legal objects; both can be read, and removed."""
    client.put(bucket, "a/b", b"below")
    client.put(bucket, "a", b"beside")
    root = mount(f"/{bucket}").path
    assert (root / "a/b").read_bytes() == b"below"
    contents = {path.read_bytes() for path in (root / "a").iterdir()}
    assert contents == {b"below", b"beside"}
    run("rm", "-r", root / "a")
    assert client.names(bucket) == set()


def test_a_large_directory(bucket: str, mount: Mounter, client: Client) -> None:
    """5,000 entries are listed whole, each once, with `ls` and `find`."""
    names = [f"file number {number:05}" for number in range(5000)]
    client.put_many(bucket, names)
    root = mount(f"/{bucket}").path
    assert sorted(os.listdir(root)) == names
    assert run("ls", "-l", root).stdout.count("\n") == 5001
    with os.scandir(root) as entries:
        assert sum(entry.stat().st_size == 0 for entry in entries) == 5000


def test_a_large_directory_removed(folder: Path, client: Client) -> None:
    """`rm -r` removes while it lists: nothing is left out."""
    (folder / "d").mkdir()
    client.put_many(folder.name, [f"d/{number}" for number in range(1500)])
    until(lambda: len(os.listdir(folder / "d")) == 1500, 10)
    run("rm", "-r", folder / "d")
    assert os.listdir(folder) == []
    assert client.names(folder.name) == set()


def test_listing_while_entries_come_and_go(folder: Path) -> None:
    """What is there all the time is listed each time, once; what comes and goes does not disturb."""
    lasting = {f"lasting{number}" for number in range(300)}
    for name in lasting:
        (folder / name).touch()
    stop = threading.Event()

    def churn(letter: str) -> None:
        while not stop.is_set():
            for number in range(20):
                (folder / f"{letter}{number}").touch()
            for number in range(20):
                (folder / f"{letter}{number}").unlink()

    threads = [threading.Thread(target=churn, args=(letter,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    try:
        for _ in range(40):
            names = os.listdir(folder)
            assert len(names) == len(set(names))
            assert lasting <= set(names)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(os.listdir(folder)) == lasting


def test_a_directory_handle_after_rmdir(folder: Path) -> None:
    """Who is inside a removed directory sees it empty, and can make nothing in it."""
    (folder / "d").mkdir()
    fd = os.open(folder / "d", os.O_RDONLY)
    try:
        (folder / "d").rmdir()
        assert os.listdir(fd) == []
        try:
            os.close(os.open("f", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
        except FileNotFoundError:
            pass
        else:
            raise AssertionError("a file was made in a removed directory")
    finally:
        os.close(fd)


def test_a_shell_keeps_its_place(folder: Path) -> None:
    """A directory that was made here a moment ago has a path for whoever works in it."""
    for number in range(10):
        place = folder / f"d{number}"
        place.mkdir()
        done = run("sh", "-c", "cd $0 && sleep 0.05 && env pwd -P", place)
        assert done.stdout.strip() == str(place)

"""A real tree of files, with the tools that people move trees with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import Client, Mount, Server, differences, run, snapshot, until

PAST = 1_000_000_000_123_456_789


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python's standard library, with some entries that are less usual."""
    tree = tmp_path_factory.mktemp("source") / "tree"
    # Compiled files are a cache of whoever ran Python last, and may change while they are compared.
    other = ("site-packages", "dist-packages", "__pycache__")
    shutil.copytree(sysconfig.get_path("stdlib"), tree, symlinks=True, ignore=shutil.ignore_patterns(*other))
    assert len(list(tree.rglob("*"))) > 500, "this is not the whole standard library"
    (tree / "link").symlink_to("json/__init__.py")
    (tree / "link to a directory").symlink_to("json")
    (tree / "dangling").symlink_to("nowhere")
    (tree / "empty directory").mkdir(mode=0o700)
    (tree / "a name\nof two lines é🐘").write_bytes(b"x")
    (tree / "os.py").chmod(0o4755)
    for path in (tree / "empty directory", tree):
        os.utime(path, ns=(PAST, PAST))  # rsync takes times in the same second for the same
    os.utime(tree / "json", ns=(1_111_111_111_111_111_111, 1_222_222_222_222_222_222))
    if os.getuid() == 0:
        os.chown(tree / "this.py", 1234, 2345)
        os.chown(tree / "email", 1234, 2345)
        os.chown(tree / "dangling", 1234, 2345, follow_symlinks=False)
    return tree


class Library:
    """The tree, copied into a bucket of its own with `cp -a`."""

    def __init__(self, server: Server, source: Path, folder: Path) -> None:
        self.client = server.client
        self.bucket = "library"
        self.client.create_bucket(self.bucket)
        self.source = source
        self.expected = snapshot(source)
        self._server = server
        self._folder = folder
        self.mount = self._mounted()
        self.path = self.mount.path / "tree"
        run("cp", "-a", source, self.path)

    def _mounted(self) -> Mount:
        return Mount.make(self._server, self._folder, f"/{self.bucket}", "purge_grace=1")

    def remount(self) -> None:
        problems = self.mount.finish()
        self.mount = self._mounted()
        assert problems == []


@pytest.fixture(scope="module")
def library(nats_server: Server, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Library]:
    library = Library(nats_server, source, tmp_path_factory.mktemp("library"))
    yield library
    problems = library.mount.finish()
    library.client.delete_bucket(library.bucket)
    assert problems == []


def test_library_copied_in(library: Library) -> None:
    """After `cp -a` the tree is the same for `diff -r` and in all metadata, and rsync finds nothing to do."""
    run("diff", "-r", "--no-dereference", library.source, library.path)
    assert differences(library.expected, snapshot(library.path)) == []
    changes = run("rsync", "-a", "--itemize-changes", "--delete", f"{library.source}/", library.path).stdout
    assert changes == ""


def test_library_after_a_remount(library: Library) -> None:
    """Content and metadata come back from the store as they were."""
    library.remount()
    assert differences(library.expected, snapshot(library.path)) == []


def test_library_copied_out(library: Library, tmp_path: Path) -> None:
    """`rsync -a` out of the mount makes the same tree."""
    run("rsync", "-a", f"{library.path}/", tmp_path / "out")
    assert differences(library.expected, snapshot(tmp_path / "out")) == []
    shutil.rmtree(tmp_path / "out")


def test_library_packed_and_unpacked(library: Library, tmp_path: Path) -> None:
    """`tar` reads the tree and writes it into the mount again."""
    archive, unpacked = tmp_path / "archive.tar", library.mount.path / "unpacked"
    run("tar", "--create", "--format=posix", f"--file={archive}", "--directory", library.mount.path, "tree")
    unpacked.mkdir()
    run("tar", "--extract", "--same-owner", f"--file={archive}", "--directory", unpacked)
    archive.unlink()
    assert differences(library.expected, snapshot(unpacked / "tree")) == []


def test_library_removed(library: Library) -> None:
    """`rm -rf` of everything leaves tombstones in the bucket, and no chunk once the grace time is over."""
    assert len(library.client.names(library.bucket)) >= len(library.expected) - 1
    run("rm", "-rf", *library.mount.path.iterdir())
    assert os.listdir(library.mount.path) == []
    assert library.client.names(library.bucket) == set()
    until(lambda: not library.client.chunks(library.bucket), 30, "the chunks of what was removed are purged")


def test_cp_between_two_buckets(folder: Path, client: Client, tmp_path: Path) -> None:
    """`mv` of a tree from one bucket to another copies it and removes the original."""
    other = folder.parent / f"{folder.name}-other"
    other.mkdir()
    try:
        (folder / "tree/sub").mkdir(parents=True)
        (folder / "tree/sub/f").write_bytes(b"x" * 300_000)
        (folder / "tree/sub/f").chmod(0o640)
        (folder / "tree/link").symlink_to("sub/f")
        before = snapshot(folder / "tree")
        run("mv", folder / "tree", other / "moved")
        assert differences(before, snapshot(other / "moved")) == []
        assert os.listdir(folder) == []
        assert client.names(folder.name) == set()
    finally:
        client.delete_bucket(other.name)


def test_many_tools_at_once(folder: Path, source: Path) -> None:
    """Four trees are copied in side by side, while `find` walks; all of them are whole."""
    part = source / "email"
    copies = [
        subprocess.Popen(["cp", "-a", part, folder / f"copy{number}"], stdin=subprocess.DEVNULL)
        for number in range(4)
    ]
    while any(process.poll() is None for process in copies):
        subprocess.run(["find", folder], capture_output=True, check=False)
    assert [process.returncode for process in copies] == [0] * 4
    for number in range(4):
        assert differences(snapshot(part), snapshot(folder / f"copy{number}")) == []

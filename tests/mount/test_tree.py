"""A real tree of files, with the tools that people move trees with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import Client, Mount, Mounter, Server, differences, run, snapshot, until

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


def test_rsync_in_place_and_with_deletion(folder: Path, tmp_path: Path) -> None:
    """rsync -a --delete, --inplace and --append-verify bring a changed tree over."""
    source = tmp_path / "source"
    (source / "a/b").mkdir(parents=True)
    (source / "a/big").write_bytes(os.urandom(2_000_000))
    (source / "a/b/small").write_bytes(b"1")

    def make_old(seconds: int) -> None:
        for path in (source, *source.rglob("*")):
            os.utime(path, ns=(PAST, PAST + seconds * 10**9))  # rsync takes times in one second for the same

    make_old(0)
    run("rsync", "-a", f"{source}/", folder / "copy")
    with (source / "a/big").open("r+b") as file:
        file.seek(700_000)
        file.write(b"changed")
        file.seek(0, os.SEEK_END)
        file.write(b"appended")
    (source / "a/b/small").unlink()
    make_old(5)
    run("rsync", "-a", "--inplace", "--no-whole-file", "--delete", f"{source}/", folder / "copy")
    assert differences(snapshot(source), snapshot(folder / "copy")) == []
    with (source / "a/big").open("ab") as end:
        end.write(b"more")
    run("rsync", "-a", "--append-verify", f"{source}/", folder / "copy")
    assert differences(snapshot(source), snapshot(folder / "copy")) == []


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


GIT = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    **{
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "Test"), ("EMAIL", "test@localhost"), ("DATE", "2024-01-01T00:00:00Z"))
    },
}


def git(*arguments: str | Path, cwd: Path) -> str:
    return run("git", *arguments, cwd=cwd, env=os.environ | GIT).stdout


def test_git(folder: Path, source: Path) -> None:
    """init, commit, branch, clone, rename of directories, gc and fsck, all of it on the mount."""
    work = folder / "work"
    work.mkdir()
    git("init", "--initial-branch=main", cwd=work)
    shutil.copytree(source / "email", work / "email")
    shutil.copytree(source / "json", work / "json")
    git("add", "--all", cwd=work)
    git("commit", "--message=one", cwd=work)
    assert git("status", "--porcelain", cwd=work) == ""

    git("mv", "email", "post", cwd=work)
    (work / "json/decoder.py").write_text("changed\n")
    git("commit", "--all", "--message=two", cwd=work)
    git("checkout", "-b", "other", "HEAD~1", cwd=work)
    assert (work / "email").is_dir()
    assert not (work / "post").exists()
    (work / "new").write_text("new\n")
    git("add", "new", cwd=work)
    git("commit", "--message=three", cwd=work)
    git("merge", "--message=merged", "main", cwd=work)
    assert (work / "json/decoder.py").read_text() == "changed\n"

    git("clone", "--no-local", work, folder / "clone", cwd=folder)
    run("diff", "-r", "--exclude=.git", work, folder / "clone")
    git("gc", "--prune=now", cwd=work)
    git("fsck", "--full", "--strict", cwd=work)
    git("fsck", "--full", "--strict", cwd=folder / "clone")

    (folder / "work").rename(folder / "moved")
    assert git("status", "--porcelain", cwd=folder / "moved") == ""
    git("fsck", "--full", cwd=folder / "moved")
    assert len(git("log", "--oneline", cwd=folder / "moved").splitlines()) == 4


def test_git_worktree_survives_a_remount(bucket: str, mount: Mounter, tmp_path: Path) -> None:
    """After a remount git's index still fits the files: `git diff-files` without a refresh finds nothing."""
    first = mount(f"/{bucket}", folder=tmp_path)
    work = first.path / "work"
    work.mkdir()
    git("init", "--initial-branch=main", cwd=work)
    for number in range(20):
        (work / f"f{number}").write_text(f"{number}\n")
    git("add", "--all", cwd=work)
    git("commit", "--message=one", cwd=work)
    assert git("diff-files", cwd=work) == ""
    assert first.finish() == []
    mount(f"/{bucket}", folder=tmp_path)
    assert git("diff-files", cwd=work) == ""

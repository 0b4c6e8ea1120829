"""git on a mount: repositories, clones, worktrees, and what it does without hard links."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import pytest

from tests.support import Mounter, run

GIT = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    **{
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "Test"), ("EMAIL", "test@localhost"), ("DATE", "2024-01-01T00:00:00Z"))
    },
}


def git(*arguments: str | Path, cwd: Path, status: int = 0) -> str:
    """What git printed; with a status of failure, what it complained about."""
    done = run("git", *arguments, cwd=cwd, status=status, env=os.environ | GIT)
    return done.stderr if status else done.stdout


def library(name: str, into: Path) -> None:
    """A real tree of some files: a package of Python's standard library."""
    shutil.copytree(
        Path(sysconfig.get_path("stdlib"), name), into / name, ignore=shutil.ignore_patterns("__pycache__")
    )


def repository(folder: Path) -> Path:
    """A small repository with two commits."""
    work = folder / "work"
    work.mkdir()
    git("init", "--initial-branch=main", cwd=work)
    library("json", work)
    git("add", "--all", cwd=work)
    git("commit", "--message=one", cwd=work)
    (work / "json/decoder.py").write_text("changed\n")
    git("commit", "--all", "--message=two", cwd=work)
    return work


@pytest.mark.semantics("git-works")
def test_git(folder: Path) -> None:
    """init, commit, branch, clone, rename of directories, gc and fsck, all of it on the mount."""
    work = folder / "work"
    work.mkdir()
    git("init", "--initial-branch=main", cwd=work)
    library("email", work)
    library("json", work)
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


@pytest.mark.semantics("git-works", "git-index-fits-after-a-remount")
def test_git_worktree_survives_a_remount(bucket: str, mount: Mounter, tmp_path: Path) -> None:
    """After a remount git's index still fits the files: `git diff-files` without a refresh finds nothing."""
    first = mount(f"/{bucket}", folder=tmp_path)
    work = repository(first.path)
    git("worktree", "add", "-b", "other", first.path / "second", cwd=work)
    assert git("diff-files", cwd=work) == ""
    assert first.finish() == []
    second = mount(f"/{bucket}", folder=tmp_path).path / "second"
    for tree in (work, second):
        assert git("diff-files", cwd=tree) == ""
        assert git("status", "--porcelain", cwd=tree) == ""
    git("fsck", "--full", "--strict", cwd=work)


@pytest.mark.semantics("git-works")
def test_git_clone_and_push_between_the_mount_and_elsewhere(folder: Path, tmp_path: Path) -> None:
    """A bare repository serves clones and takes pushes, whichever of the two is on the mount."""
    original = repository(tmp_path)
    for number, (bare, clone) in enumerate(((tmp_path, folder), (folder, tmp_path), (folder, folder))):
        git("clone", "--bare", original, bare / f"bare{number}.git", cwd=tmp_path)
        git("clone", bare / f"bare{number}.git", clone / f"clone{number}", cwd=tmp_path)
        work = clone / f"clone{number}"
        run("diff", "-r", "--exclude=.git", original, work)
        (work / "new").write_text("new\n")
        git("add", "new", cwd=work)
        git("commit", "--message=new", cwd=work)
        git("push", "origin", "main", cwd=work)
        git("gc", cwd=bare / f"bare{number}.git")
        git("fsck", "--full", "--strict", cwd=bare / f"bare{number}.git")
        git("fsck", "--full", "--strict", cwd=work)
        assert git("status", "--porcelain", cwd=work) == ""
        assert git("rev-parse", "main", cwd=bare / f"bare{number}.git") == git("rev-parse", "HEAD", cwd=work)


@pytest.mark.semantics("git-works")
def test_git_worktree_added_and_removed(folder: Path) -> None:
    """A second working tree is made, committed to, and removed again without a trace."""
    work = repository(folder)
    second = folder / "second"
    git("worktree", "add", "-b", "other", second, cwd=work)
    run("diff", "-r", "--exclude=.git", work, second)
    (second / "json/decoder.py").unlink()
    git("commit", "--all", "--message=removed", cwd=second)
    assert git("status", "--porcelain", cwd=second) == ""
    assert git("status", "--porcelain", cwd=work) == ""
    git("worktree", "remove", second, cwd=work)
    assert not second.exists()
    git("merge", "other", cwd=work)
    assert not (work / "json/decoder.py").exists()
    git("stash", "list", cwd=work)
    git("fsck", "--full", "--strict", cwd=work)


@pytest.mark.semantics("git-clone-local-needs-hard-links")
def test_git_clone_local(folder: Path) -> None:
    """`git clone` of a path copies what it would link elsewhere; with an explicit --local it gives up."""
    work = repository(folder)
    git("clone", work, folder / "clone", cwd=folder)
    git("fsck", "--full", "--strict", cwd=folder / "clone")
    complaint = git("clone", "--local", work, folder / "linked", cwd=folder, status=128)
    assert "failed to create link" in complaint
    assert not (folder / "linked").exists()
    git("clone", "--local", "--no-hardlinks", work, folder / "copied", cwd=folder)
    git("fsck", "--full", "--strict", cwd=folder / "copied")
    git("fsck", "--full", "--strict", cwd=work)

"""Programs that copy: rsync, tar, cp, dd, truncate, and those that look for what has changed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support import Client, Mounter, differences, noise, run, snapshot

PAST = 1_000_000_000_123_456_789


def make_old(tree: Path, seconds: int = 0) -> None:
    """rsync takes times in one second for the same, and trusts no file that has just been written."""
    for path in (*tree.rglob("*"), tree):
        os.utime(path, ns=(PAST, PAST + seconds * 10**9), follow_symlinks=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small tree with a bit of everything that a copy has to keep."""
    tree = tmp_path / "source"
    (tree / "a/b").mkdir(parents=True)
    (tree / "a/big").write_bytes(noise(600_000))
    (tree / "a/b/small").write_bytes(b"1")
    (tree / "a/b/empty").touch()
    (tree / "a/b/empty").chmod(0o4755)
    (tree / "a/closed").mkdir(mode=0o700)
    os.setxattr(tree / "a/big", "user.colour", b"\0red")
    os.setxattr(tree / "a/b", "user.empty", b"")
    (tree / "name é\n🐘").write_bytes(b"x" * 4096)
    (tree / "link").symlink_to("a/big")
    (tree / "dangling").symlink_to("nowhere")
    os.mkfifo(tree / "fifo", 0o640)
    if os.getuid() == 0:
        os.chown(tree / "a/b/small", 12345, 23456)
        os.chown(tree / "dangling", 12345, 23456, follow_symlinks=False)
    make_old(tree)
    return tree


def taken(top: Path) -> dict[str, tuple[object, ...]]:
    """`snapshot`, which reads every file, with the fifo only looked at."""
    fifo = (top / "fifo").lstat()
    aside = top.parent / "fifo aside"
    (top / "fifo").rename(aside)
    times = (PAST, PAST)
    os.utime(top, ns=times)
    try:
        return snapshot(top) | {"./fifo": (fifo.st_mode, fifo.st_uid, fifo.st_gid, fifo.st_mtime_ns)}
    finally:
        aside.rename(top / "fifo")
        os.utime(top, ns=times)


def itemized(*arguments: str | Path) -> str:
    """What rsync says that it has changed."""
    return run("rsync", "--itemize-changes", *arguments).stdout


@pytest.mark.semantics("rsync-finds-nothing-to-do")
def test_rsync_twice_in_both_directions(folder: Path, source: Path, tmp_path: Path) -> None:
    """`rsync -aHAX --checksum` makes the same tree in both directions, and the second time it moves nothing."""
    for here, there in ((source, folder / "in"), (folder / "in", tmp_path / "out")):
        assert itemized("-aHAX", "--checksum", f"{here}/", there) != ""
        assert itemized("-aHAX", "--checksum", f"{here}/", there) == ""
        assert itemized("-aHAX", f"{here}/", there) == ""
        assert itemized("-aHAX", "--checksum", "--delete", f"{there}/", here) == ""
    assert differences(taken(source), taken(tmp_path / "out")) == []


@pytest.mark.semantics("rsync-finds-nothing-to-do")
def test_rsync_after_a_remount(bucket: str, mount: Mounter, source: Path, tmp_path: Path) -> None:
    """After a remount rsync finds nothing to do either."""
    first = mount(f"/{bucket}", folder=tmp_path / "mounted")
    itemized("-aHAX", f"{source}/", first.path / "in")
    assert first.finish() == []
    second = mount(f"/{bucket}", folder=tmp_path / "mounted")
    assert itemized("-aHAX", "--checksum", "--delete", f"{source}/", second.path / "in") == ""


@pytest.mark.semantics("hard-links-refused")
def test_rsync_with_hard_links(folder: Path, source: Path) -> None:
    """With -H rsync leaves the further names of a file out, names them, and ends with 23; without -H it copies them."""
    os.link(source / "a/big", source / "a/second name")
    failed = run("rsync", "-aHAX", f"{source}/", folder / "in", status=23)
    assert "failed: Operation not permitted" in failed.stderr
    names = {path.name for path in (folder / "in/a").iterdir()}
    assert len(names & {"big", "second name"}) == 1
    itemized("-a", f"{source}/", folder / "in")
    assert (folder / "in/a/second name").read_bytes() == (source / "a/big").read_bytes()
    assert itemized("-a", "--checksum", "--delete", f"{source}/", folder / "in") == ""


@pytest.mark.semantics("rsync-in-place-and-append")
def test_rsync_in_place_and_with_deletion(folder: Path, source: Path, tmp_path: Path) -> None:
    """rsync --delete, --inplace, --append and --append-verify make of a copy what they make of a local one."""
    mounted, local = folder / "copy", tmp_path / "local"

    def both(*options: str) -> None:
        for copy in (mounted, local):
            run("rsync", "-a", *options, f"{source}/", copy)
        assert differences(taken(local), taken(mounted)) == []
        assert (mounted / "a/big").read_bytes() == (source / "a/big").read_bytes()

    both()
    inode = (mounted / "a/big").stat().st_ino
    with (source / "a/big").open("r+b") as file:
        file.seek(300_000)
        file.write(b"changed")
        file.seek(0, os.SEEK_END)
        file.write(b"appended")
    (source / "a/b/small").unlink()
    make_old(source, 5)
    both("--inplace", "--no-whole-file", "--delete")
    assert not (mounted / "a/b/small").exists()
    for turn, how in enumerate(("--append", "--append-verify")):
        with (source / "a/big").open("ab") as end:
            end.write(noise(200_000))
        make_old(source, 10 + turn)
        both(how)
    assert (mounted / "a/big").stat().st_ino == inode, "the file was not written in place"


@pytest.mark.semantics("tar-keeps-owners-and-times")
def test_tar_in_and_out(folder: Path, source: Path, tmp_path: Path) -> None:
    """tar with numeric owners and times to the nanosecond, into the mount and out of it again."""
    (folder / "in").mkdir()
    (tmp_path / "out").mkdir()
    options = ("--format=posix", "--numeric-owner")
    for archive, here, there in (
        (folder / "archive.tar", source.parent, folder / "in"),
        (folder / "other.tar.gz", folder / "in", tmp_path / "out"),
    ):
        run("tar", "--create", "--auto-compress", *options, "-f", archive, "-C", here, "source")
        run("tar", "--compare", "-f", archive, "-C", here)
        run("tar", "--extract", "--same-owner", "--same-permissions", *options, "-f", archive, "-C", there)
        run("tar", "--compare", "-f", archive, "-C", there)
    for copy in (folder / "in", tmp_path / "out"):
        assert differences(taken(source), taken(copy / "source")) == []


@pytest.mark.semantics("tar-keeps-owners-and-times")
def test_tar_appends_and_finds_what_is_new(folder: Path, source: Path) -> None:
    """`tar --append` and an incremental archive work on an archive that lies on the mount."""
    archive, state = folder / "archive.tar", folder / "state"
    run("cp", "-a", source, folder / "tree")
    run("tar", "--create", f"--listed-incremental={state}", "-f", archive, "-C", folder, "tree")
    (folder / "tree/a/b/new").write_text("new\n")
    second = folder / "second.tar"
    run("tar", "--create", f"--listed-incremental={state}", "-f", second, "-C", folder, "tree")
    listed = run("tar", "--list", "-f", second).stdout.split()
    assert [name for name in listed if not name.endswith("/")] == ["tree/a/b/new"]
    run("tar", "--append", "-f", archive, "-C", folder, "tree/a/b/new")
    assert "tree/a/b/new" in run("tar", "--list", "-f", archive).stdout.split()


@pytest.mark.semantics("hard-links-refused")
def test_tar_with_hard_links(folder: Path, source: Path) -> None:
    """tar cannot make the second name of a file: it says so and ends with 2; with --hard-dereference it copies."""
    os.link(source / "a/b/small", source / "a/b/small too")
    archive = folder / "archive.tar"
    (folder / "in").mkdir()
    run("tar", "--create", "-f", archive, "-C", source, "a")
    failed = run("tar", "--extract", "-f", archive, "-C", folder / "in", status=2)
    assert "Cannot hard link" in failed.stderr
    run("tar", "--create", "--hard-dereference", "-f", archive, "-C", source, "a")
    run("tar", "--extract", "-f", archive, "-C", folder / "in")
    run("diff", "-r", source / "a", folder / "in/a")


@pytest.mark.semantics("hard-links-refused")
def test_cp_with_links(folder: Path, source: Path) -> None:
    """`cp -al` fails for each file with EPERM and leaves the source as it was."""
    run("cp", "-a", source, folder / "tree")
    before = taken(folder / "tree")
    failed = run("cp", "-al", folder / "tree", folder / "links", status=1)
    for name in ("a/big", "a/b/small", "link"):
        assert f"{name}': Operation not permitted" in failed.stderr
    assert [path for path in (folder / "links").rglob("*") if not path.is_dir()] == []
    assert taken(folder / "tree") == before


@pytest.mark.semantics("no-sparse-files", "no-reflinks")
def test_cp_sparse_and_reflink(folder: Path, client: Client, tmp_path: Path) -> None:
    """`cp --sparse` and `--reflink=auto` copy the bytes; a hole is zeros that count; `--reflink=always` fails."""
    with (tmp_path / "sparse").open("wb") as file:
        file.write(b"start")
        file.seek(3_000_000)
        file.write(b"end")
    expected = (tmp_path / "sparse").read_bytes()
    run("cp", "-a", "--sparse=always", tmp_path / "sparse", folder / "one")
    run("cp", "-a", "--sparse=always", folder / "one", folder / "two")
    run("cp", "--reflink=auto", folder / "two", folder / "three")
    for name in ("one", "two", "three"):
        assert (folder / name).read_bytes() == expected
        assert client.read(folder.name, name) == expected
        assert (folder / name).stat().st_blocks == -(-len(expected) // 512)
    run("cp", "--reflink=always", folder / "one", folder / "four", status=1)
    run("cp", "--sparse=always", folder / "three", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == expected


@pytest.mark.semantics("sizes-agree")
def test_du_and_find_agree_with_a_local_copy(folder: Path, tmp_path: Path) -> None:
    """`find -size` and `du --apparent-size` say what they say of a local copy; `du` counts whole blocks of 512."""
    local = tmp_path / "tree"
    (local / "d").mkdir(parents=True)
    for size in (0, 1, 511, 512, 513, 4095, 4096, 4097, 131_072, 300_001):
        (local / f"d/{size}").write_bytes(noise(size))
    run("cp", "-a", local, folder / "tree")

    def find(top: Path, *arguments: str) -> list[str]:
        return sorted(run("find", ".", "-type", "f", *arguments, cwd=top).stdout.splitlines())

    for wanted in ("0", "1", "-2", "+8", "1c", "4096c", "+100k", "-1M", "8"):
        assert find(folder / "tree", "-size", wanted) == find(local, "-size", wanted)
    assert find(folder / "tree", "-empty") == ["./d/0"]
    files = [f"d/{path.name}" for path in (local / "d").iterdir()]
    sizes = ("du", "--apparent-size", "--block-size=1", *files)
    assert run(*sizes, cwd=folder / "tree").stdout == run(*sizes, cwd=local).stdout
    blocks = run("du", "--block-size=512", *files, cwd=folder / "tree").stdout.split()
    assert all(int(count) == -(-int(name.removeprefix("d/")) // 512) for count, name in _pairs(blocks))


def _pairs(words: list[str]) -> list[tuple[str, str]]:
    return list(zip(words[::2], words[1::2], strict=True))


@pytest.mark.semantics("find-newer")
def test_find_newer(folder: Path) -> None:
    """`find -newer` sees what was written after a file, to the nanosecond."""
    for name in ("old", "mark", "new"):
        (folder / name).touch()
    os.utime(folder / "old", ns=(PAST, PAST - 1))
    os.utime(folder / "mark", ns=(PAST, PAST))
    os.utime(folder / "new", ns=(PAST, PAST + 1))
    newer = run("find", ".", "-type", "f", "-newer", "mark", cwd=folder).stdout
    assert newer == "./new\n"
    with (folder / "old").open("a") as file:
        file.write("changed")
    newer = run("find", ".", "-type", "f", "-newer", "new", cwd=folder).stdout
    assert newer == "./old\n"
    run("touch", "-r", "mark", "old", cwd=folder)
    assert run("find", ".", "-type", "f", "-newer", "mark", cwd=folder).stdout == "./new\n"


@pytest.mark.semantics("dd-and-truncate")
def test_dd_and_truncate(folder: Path, tmp_path: Path) -> None:
    """dd with seek=, conv=notrunc and oflag=append, and truncate, do to a file what they do to a local one."""
    (tmp_path / "in").write_bytes(noise(10_000, 1))
    dd = ("dd", f"if={tmp_path / 'in'}", "of=file", "status=none")
    steps: list[tuple[str, ...]] = [
        (*dd, "bs=1000"),
        (*dd, "bs=100", "seek=20", "count=7", "conv=notrunc"),
        (*dd, "bs=1", "seek=200001", "count=5", "conv=notrunc"),
        (*dd, "bs=512", "oflag=append", "conv=notrunc"),
        ("truncate", "--size=150000", "file"),
        ("truncate", "--size=+7", "file"),
        ("truncate", "--size=%4096", "file"),
        (*dd, "bs=4096", "seek=10", "conv=fsync"),
        (*dd, "bs=4096", "skip=1", "seek=1", "conv=notrunc,fdatasync"),
        ("truncate", "--reference", str(tmp_path / "in"), "file"),
        ("truncate", "--size=0", "file"),
        (*dd, "bs=4096", "seek=3", "conv=sparse"),
    ]
    (tmp_path / "local").mkdir()
    for number, step in enumerate(steps):
        for place in (tmp_path / "local", folder):
            run(*step, cwd=place)
        assert (folder / "file").read_bytes() == (tmp_path / "local/file").read_bytes(), (number, step)


@pytest.mark.semantics("shell-redirections")
def test_shell_redirections(folder: Path) -> None:
    """Redirections of a shell, also those that many child processes share, give the file that they say."""
    script = """
        for number in 1 2 3 4 5; do /bin/echo $number; done > all
        { /bin/echo a; /bin/echo b >&2; } > both 2>&1
        /bin/echo more >> all
        cat < all > copy
        (/bin/echo x & /bin/echo x & wait) >> all
        exec 3<> copy; read -r first <&3; /bin/echo $first-again >&3; exec 3>&-
    """
    subprocess.run(["bash", "-c", script], cwd=folder, check=True)
    assert (folder / "all").read_text() == "1\n2\n3\n4\n5\nmore\nx\nx\n"
    assert (folder / "both").read_text() == "a\nb\n"
    assert (folder / "copy").read_text().startswith("1\n1-again\n")

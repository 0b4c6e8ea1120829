"""Names that are hard, and the errors of calls that work on names."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import Client, Mount, Mounter, opened, raises, run

HARD_NAMES = [
    "with spaces  and trailing ",
    "new\nline",
    "tab\tand\\backslash",
    "emoji 🐘🪢",
    "combining é and é",
    "-rf",
    "*?[a]$HOME'\"",
    ".hidden",
    "...",
    "%2F/x",
    "%2Fx",
    "%",
    "100% %00 %25",
    "中文/目录",
    "x" * 255,
    "é" * 127 + "x",
    "\x01\x7f",
    "a.M.>",
]


@pytest.mark.semantics("one-path-one-object")
@pytest.mark.parametrize("name", HARD_NAMES)
def test_hard_names(folder: Path, client: Client, name: str) -> None:
    """Created, listed, read, renamed and removed; the object has the same name where a name needs no escape."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name)
    assert os.listdir(path.parent) == [path.name]
    assert path.read_text() == name
    contents = {
        client.read(folder.name, stored).decode() for stored in client.names(folder.name) if stored[-1] != "/"
    }
    assert contents == {name}
    if "%" not in name:
        assert client.read(folder.name, name).decode() == name
    path.rename(folder / "renamed")
    assert (folder / "renamed").read_text() == name
    (folder / "renamed").rename(path)
    assert path.read_text() == name
    path.unlink()
    assert os.listdir(path.parent) == []


def test_a_name_of_bytes_that_are_not_utf8(folder: Path) -> None:
    """Any bytes make a file name."""
    path = os.fsencode(folder) + b"/\xff\xfe caf\xe9"
    with open(path, "wb") as file:
        file.write(b"latin")
    assert os.listdir(os.fsencode(folder)) == [b"\xff\xfe caf\xe9"]
    with open(path, "rb") as file:
        assert file.read() == b"latin"
    os.unlink(path)


@pytest.mark.semantics("one-path-one-object")
def test_all_hard_names_survive_a_remount(bucket: str, mount: Mounter, tmp_path: Path) -> None:
    """One path, one object: also when the names come back from the store."""
    first = mount(f"/{bucket}", folder=tmp_path)
    names = [name for name in HARD_NAMES if "/" not in name]
    for name in names:
        (first.path / name).write_text(name)
    assert first.finish() == []
    root = mount(f"/{bucket}", folder=tmp_path).path
    assert sorted(os.listdir(root)) == sorted(names)
    assert [(root / name).read_text() for name in names] == names


@pytest.mark.semantics("one-path-one-object")
def test_names_with_a_leading_slash(bucket: str, mount: Mounter, client: Client) -> None:
    """The nats command stores `/home/u/f`; it is `%2F/home/u/f`, can be removed, and made again with mkdir."""
    client.put(bucket, "/home/u/f", b"theirs")
    root = mount(f"/{bucket}").path
    assert (root / "%2F/home/u/f").read_bytes() == b"theirs"
    run("rm", "-r", root / "%2F")
    assert os.listdir(root) == []
    assert client.names(bucket) == set()
    (root / "%2F").mkdir()
    (root / "%2F/f").write_bytes(b"ours")
    assert client.read(bucket, "/f") == b"ours"
    (root / "%2F").rename(root / "plain")
    assert client.read(bucket, "plain/f") == b"ours"
    (root / "plain").rename(root / "%2F")
    assert client.read(bucket, "/f") == b"ours"
    (root / "%2F/f").unlink()
    (root / "%2F").rmdir()
    assert os.listdir(root) == []


@pytest.mark.parametrize("name", ["%2F", "%03", "d/%2F", "%2E", "d/%2E%2E/%03"])
def test_file_names_that_stand_for_no_object(folder: Path, name: str) -> None:
    """EINVAL, or a name that reads back."""
    (folder / "d/%2E%2E").mkdir(parents=True)
    refused: OSError | None = None
    try:
        (folder / name).write_text("x")
    except OSError as error:
        refused = error
    if refused is None:
        assert (folder / name).read_text() == "x"
        assert (folder / name).name in os.listdir((folder / name).parent)
    else:
        assert refused.errno == errno.EINVAL
        assert not (folder / name).exists()


@pytest.mark.parametrize("call", ["open", "mkdir", "stat", "rename", "symlink", "unlink"])
def test_a_name_that_is_too_long(folder: Path, call: str) -> None:
    """256 bytes: ENAMETOOLONG."""
    path = folder / ("x" * 256)
    (folder / "f").touch()
    calls: dict[str, Callable[[], object]] = {
        "open": lambda: path.write_bytes(b""),
        "mkdir": path.mkdir,
        "stat": path.stat,
        "rename": lambda: (folder / "f").rename(path),
        "symlink": lambda: path.symlink_to("x"),
        "unlink": path.unlink,
    }
    with raises(errno.ENAMETOOLONG):
        calls[call]()


def test_deep_nesting(folder: Path, client: Client) -> None:
    """Forty directories deep, with tools that walk down."""
    names = [f"level {number}" for number in range(40)]
    deep = folder.joinpath(*names)
    deep.mkdir(parents=True)
    (deep / "f").write_text("deep")
    assert client.read(folder.name, "/".join([*names, "f"])) == b"deep"
    assert run("find", folder, "-type", "f").stdout == f"{deep}/f\n"
    run("rm", "-r", folder / names[0])
    assert os.listdir(folder) == []
    assert client.names(folder.name) == set()


def test_mkdir_errors(folder: Path) -> None:
    """EEXIST, ENOENT and ENOTDIR."""
    (folder / "d").mkdir()
    (folder / "f").touch()
    with raises(errno.EEXIST):
        (folder / "d").mkdir()
    with raises(errno.EEXIST):
        (folder / "f").mkdir()
    with raises(errno.ENOENT):
        (folder / "missing/d").mkdir()
    with raises(errno.ENOTDIR):
        (folder / "f/d").mkdir()


def test_rmdir_errors(folder: Path) -> None:
    """ENOTEMPTY, ENOENT, ENOTDIR."""
    (folder / "d/e").mkdir(parents=True)
    (folder / "d/e/f").touch()
    with raises(errno.ENOTEMPTY):
        (folder / "d").rmdir()
    with raises(errno.ENOTEMPTY):
        (folder / "d/e").rmdir()
    with raises(errno.ENOENT):
        (folder / "missing").rmdir()
    with raises(errno.ENOTDIR):
        (folder / "d/e/f").rmdir()


def test_unlink_errors(folder: Path) -> None:
    """EISDIR for a directory, ENOENT for nothing."""
    (folder / "d").mkdir()
    with raises(errno.EISDIR):
        (folder / "d").unlink()
    with raises(errno.ENOENT):
        (folder / "missing").unlink()


def test_open_errors(folder: Path) -> None:
    """EISDIR, ENOENT, ENOTDIR."""
    (folder / "d").mkdir()
    (folder / "f").touch()
    with raises(errno.EISDIR):
        os.open(folder / "d", os.O_WRONLY)
    with raises(errno.ENOENT):
        os.open(folder / "missing", os.O_RDONLY)
    with raises(errno.ENOENT):
        os.open(folder / "missing/f", os.O_WRONLY | os.O_CREAT)
    with raises(errno.ENOTDIR):
        os.open(folder / "f/g", os.O_WRONLY | os.O_CREAT)
    with raises(errno.ENOTDIR):
        os.open(folder / "f", os.O_RDONLY | os.O_DIRECTORY)


def test_rename_errors(folder: Path) -> None:
    """ENOENT, EISDIR, ENOTDIR, ENOTEMPTY, and EINVAL for a directory into itself."""
    (folder / "full/f").parent.mkdir()
    (folder / "full/f").touch()
    (folder / "dir").mkdir()
    (folder / "f").touch()
    with raises(errno.ENOENT):
        (folder / "missing").rename(folder / "x")
    with raises(errno.EISDIR):
        (folder / "f").rename(folder / "dir")
    with raises(errno.ENOTDIR):
        (folder / "dir").rename(folder / "f")
    with raises(errno.ENOTEMPTY):
        (folder / "dir").rename(folder / "full")
    with raises(errno.EINVAL):
        (folder / "full").rename(folder / "full/below")
    assert sorted(os.listdir(folder)) == ["dir", "f", "full"]


def test_rename_onto_itself(folder: Path) -> None:
    """Nothing happens."""
    (folder / "f").write_text("x")
    (folder / "f").rename(folder / "f")
    assert (folder / "f").read_text() == "x"


def test_rename_without_replacing(folder: Path, client: Client) -> None:
    """`mv --no-clobber` keeps what is there."""
    (folder / "a").write_text("a")
    (folder / "b").write_text("b")
    run("mv", "--no-clobber", folder / "a", folder / "b")
    assert client.read(folder.name, "b") == b"b"


def test_rename_of_a_directory(folder: Path, client: Client) -> None:
    """All below moves; contents and attributes stay; nothing is copied, no old name is left."""
    for number in range(150):
        path = folder / f"old/d{number % 5}/f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{number}")
        path.chmod(0o600 + number % 7)
    (folder / "old/empty").mkdir(mode=0o711)
    nuids = {name: client.stored(folder.name, f"old/{name}")["nuid"] for name in ("d0/f0", "d4/f149")}
    with opened(folder / "old/d3/f3", os.O_RDONLY) as fd:
        (folder / "old").rename(folder / "new")
        assert os.pread(fd, 10, 0) == b"3"
    assert os.listdir(folder) == ["new"]
    for number in range(150):
        path = folder / f"new/d{number % 5}/f{number}"
        assert path.read_text() == f"{number}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 + number % 7
    assert stat.S_IMODE((folder / "new/empty").stat().st_mode) == 0o711
    assert not [name for name in client.names(folder.name) if not name.startswith("new/")]
    for name, nuid in nuids.items():
        assert client.stored(folder.name, f"new/{name}")["nuid"] == nuid


def test_rename_of_a_directory_over_an_empty_one(folder: Path) -> None:
    """The empty target is replaced."""
    (folder / "a").mkdir()
    (folder / "a/f").write_text("x")
    (folder / "b").mkdir()
    (folder / "a").rename(folder / "b")
    assert os.listdir(folder) == ["b"]
    assert (folder / "b/f").read_text() == "x"


def test_rename_of_a_directory_and_back(folder: Path, client: Client) -> None:
    """Over the tombstones of the first rename."""
    (folder / "a/sub").mkdir(parents=True)
    (folder / "a/sub/f").write_text("x")
    for _ in range(3):
        (folder / "a").rename(folder / "b")
        assert (folder / "b/sub/f").read_text() == "x"
        (folder / "b").rename(folder / "a")
        assert (folder / "a/sub/f").read_text() == "x"
    assert os.listdir(folder) == ["a"]
    assert client.read(folder.name, "a/sub/f") == b"x"


def test_rename_of_a_directory_with_a_dirty_file(folder: Path, client: Client) -> None:
    """A file that is being written moves along, committed or never committed before."""
    (folder / "a").mkdir()
    (folder / "a/old").write_text("old ")
    with (
        opened(folder / "a/new", os.O_WRONLY | os.O_CREAT) as new,
        opened(folder / "a/old", os.O_WRONLY | os.O_APPEND) as old,
    ):
        os.write(new, b"one ")
        os.write(old, b"one ")
        (folder / "a").rename(folder / "b")
        os.write(new, b"two")
        os.write(old, b"two")
    assert client.read(folder.name, "b/new") == b"one two"
    assert client.read(folder.name, "b/old") == b"old one two"
    assert os.listdir(folder) == ["b"]
    assert {name for name in client.names(folder.name) if name[-1] != "/"} == {"b/new", "b/old"}


def test_move_between_directories(folder: Path, client: Client) -> None:
    """A file moves up and down the tree."""
    (folder / "a/b").mkdir(parents=True)
    (folder / "f").write_text("x")
    (folder / "f").rename(folder / "a/b/f")
    assert client.read(folder.name, "a/b/f") == b"x"
    (folder / "a/b/f").rename(folder / "a/g")
    assert sorted(os.listdir(folder / "a")) == ["b", "g"]
    assert os.listdir(folder / "a/b") == []


@pytest.mark.semantics("special-files")
def test_special_files(folder: Path) -> None:
    """Symbolic links, also dangling ones, and fifos; hard links are refused with EPERM."""
    (folder / "f").write_text("target")
    (folder / "link").symlink_to("f")
    (folder / "dangling").symlink_to("/nowhere/é\n")
    (folder / "d").mkdir()
    (folder / "d/up").symlink_to("../f")
    assert (folder / "link").read_text() == "target"
    assert (folder / "d/up").read_text() == "target"
    assert os.readlink(folder / "dangling") == "/nowhere/é\n"
    os.mkfifo(folder / "fifo", 0o640)
    assert stat.S_ISFIFO((folder / "fifo").stat().st_mode)
    with raises(errno.EPERM):
        os.link(folder / "f", folder / "hard")
    (folder / "link").unlink()
    assert (folder / "f").read_text() == "target"


def test_a_mount_of_a_prefix(bucket: str, mount: Mounter, client: Client) -> None:
    """nats://host/bucket/prefix shows one directory of the bucket."""
    client.put(bucket, "a/b/f", b"inside")
    client.put(bucket, "a/other", b"outside")
    root = mount(f"/{bucket}/a/b").path
    assert os.listdir(root) == ["f"]
    (root / "d").mkdir()
    (root / "d/new").write_text("new")
    (root / "f").rename(root / "d/f")
    assert client.read(bucket, "a/b/d/new") == b"new"
    assert client.read(bucket, "a/b/d/f") == b"inside"
    assert client.names(bucket) >= {"a/other", "a/b/d/f", "a/b/d/new"}
    run("rm", "-r", root / "d")
    assert os.listdir(root) == []


def test_read_only_mount(bucket: str, mount: Mounter, client: Client) -> None:
    """-o ro: everything is readable, every change is EROFS."""
    client.put(bucket, "d/f", b"data")
    root = mount(f"/{bucket}", "ro").path
    assert (root / "d/f").read_bytes() == b"data"
    for change in (
        lambda: (root / "d/f").write_bytes(b""),
        lambda: (root / "new").touch(),
        lambda: (root / "d/f").unlink(),
        lambda: (root / "new").mkdir(),
        lambda: (root / "d").rename(root / "e"),
        lambda: (root / "d/f").chmod(0o600),
    ):
        with raises(errno.EROFS):
            change()


def test_tools_agree_on_what_is_there(folder: Path, shared: Mount) -> None:
    """`find`, `ls -R` and `du` walk the tree without a complaint."""
    for name in ("a/b/c/1", "a/b/2", "a/3", "4"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    found = run("find", ".", "-type", "f", "-printf", "%P %s\\n", cwd=folder).stdout.splitlines()
    assert sorted(found) == ["4 1", "a/3 3", "a/b/2 5", "a/b/c/1 7"]
    assert run("ls", "-lR", folder).stderr == ""
    run("du", "-a", folder)

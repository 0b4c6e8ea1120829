"""Extended attributes: the calls, where they are stored, what NATS shows, and the programs that copy them."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import natsrpy
import pytest

from tests.support import Client, Mount, Mounter, noise, opened, raises, run, until

LIBC = ctypes.CDLL(None, use_errno=True)
ODD = {
    b'user.with space = and, "quotes"': b"x",
    "user.ümläut/☃".encode(): "schön".encode(),
    b"user.not utf-8 \xff\xfe": b"\x00\xff binary \x80",
    b"user.mode": b"mine",
    b"user.user.mode": b"mine, too",
    b"user.symlink": b"/etc/passwd",
    b"user.mtime": b"never",
    b"user.user.nats.size": b"huge",
    b"user.name~ff": b"looks escaped",
    b"user." + b"n" * 250: b"longest",
    b"user.empty": b"",
    b"user.0s": b"0sZm9v",
    b"user.large": noise(40_000),
}


def attributes(path: Path) -> dict[bytes, bytes]:
    """All that is listed."""
    raw = os.fsencode(path)
    names = [os.fsencode(name) for name in os.listxattr(raw, follow_symlinks=False)]
    assert len(set(names)) == len(names)
    return {name: os.getxattr(raw, name, follow_symlinks=False) for name in names}


def label(path: Path, values: dict[bytes, bytes]) -> None:
    for name, value in values.items():
        os.setxattr(path, name, value)


def outcome(call: Callable[[], object]) -> object:
    try:
        return call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def until_shown(path: Path, values: dict[bytes, bytes]) -> None:
    """Another client's change arrives; one that was listed before it may be gone when it is read."""
    until(lambda: outcome(lambda: attributes(path)) == values)


def get_with_room(path: Path, name: bytes, room: int) -> int | str:
    """getxattr(2) with a buffer of `room` bytes."""
    buffer = ctypes.create_string_buffer(room)
    done = LIBC.getxattr(os.fsencode(path), name, buffer, room)
    return errno.errorcode[ctypes.get_errno()] if done < 0 else int(done)


# --- the calls ------------------------------------------------------------------------------------------------


def calls(path: Path) -> dict[str, object]:
    """What each call with each kind of argument does."""
    create, replace = os.XATTR_CREATE, os.XATTR_REPLACE
    steps: dict[str, Callable[[], object]] = {
        "get what is not there": lambda: os.getxattr(path, "user.a"),
        "remove what is not there": lambda: os.removexattr(path, "user.a"),
        "replace what is not there": lambda: os.setxattr(path, "user.a", b"1", replace),
        "still not there": lambda: os.listxattr(path),
        "create": lambda: os.setxattr(path, "user.a", b"1", create),
        "create again": lambda: os.setxattr(path, "user.a", b"2", create),
        "unchanged": lambda: os.getxattr(path, "user.a"),
        "replace": lambda: os.setxattr(path, "user.a", b"3", replace),
        "replaced": lambda: os.getxattr(path, "user.a"),
        "set": lambda: os.setxattr(path, "user.a", b"four"),
        "four": lambda: os.getxattr(path, "user.a"),
        "room for none": lambda: get_with_room(path, b"user.a", 0),
        "room for three": lambda: get_with_room(path, b"user.a", 3),
        "room for four": lambda: get_with_room(path, b"user.a", 4),
        "empty": lambda: os.setxattr(path, "user.e", b""),
        "is empty": lambda: os.getxattr(path, "user.e"),
        "list": lambda: sorted(os.listxattr(path)),
        "room for no list": lambda: LIBC.listxattr(os.fsencode(path), ctypes.create_string_buffer(8), 8),
        "longest name": lambda: os.setxattr(path, "user." + "n" * 250, b"x"),
        "name too long": lambda: os.setxattr(path, "user." + "n" * 251, b"x"),
        "get a name too long": lambda: os.getxattr(path, "user." + "n" * 251),
        "value too long": lambda: os.setxattr(path, "user.v", b"x" * 65537),
        "no name": lambda: os.setxattr(path, "user.", b"x"),
        "get no name": lambda: os.getxattr(path, "user."),
        "no namespace": lambda: os.setxattr(path, "colour", b"x"),
        "get without namespace": lambda: os.getxattr(path, "colour"),
        "remove": lambda: os.removexattr(path, "user.a"),
        "removed": lambda: os.getxattr(path, "user.a"),
        "remove again": lambda: os.removexattr(path, "user.a"),
        "the rest": lambda: sorted(os.listxattr(path)),
    }
    return {what: outcome(step) for what, step in steps.items()}


@pytest.mark.semantics("xattr-calls")
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_as_on_a_local_file_system(folder: Path, tmp_path: Path, kind: str) -> None:
    """Each call has the result and the errno that it has on the local file system."""
    results = []
    for top in (tmp_path, folder):
        path = top / "it"
        path.mkdir() if kind == "directory" else path.write_text("x")
        results.append(calls(path))
    assert results[1] == results[0]


@pytest.mark.semantics("xattr-calls")
def test_other_file_types(folder: Path, tmp_path: Path) -> None:
    """Symbolic links, fifos and sockets have no attributes of users, as everywhere on Linux."""
    results = []
    for top in (tmp_path, folder):
        (top / "link").symlink_to("nowhere")
        os.mkfifo(top / "fifo")
        results.append(
            [
                outcome(call)
                for path in (top / "link", top / "fifo")
                for call in (
                    lambda: os.setxattr(path, "user.a", b"1", follow_symlinks=False),  # noqa: B023
                    lambda: os.getxattr(path, "user.a", follow_symlinks=False),  # noqa: B023
                    lambda: os.removexattr(path, "user.a", follow_symlinks=False),  # noqa: B023
                    lambda: os.listxattr(path, follow_symlinks=False),  # noqa: B023
                )
            ]
        )
    assert results[1] == results[0]


@pytest.mark.semantics("xattr-calls")
def test_what_is_removed_and_open(folder: Path, tmp_path: Path) -> None:
    """A file or directory that has no name any more keeps its attributes for whoever has it open."""
    for top in (tmp_path, folder):
        (top / "f").write_text("x")
        (top / "d").mkdir()
        with opened(top / "f", os.O_RDWR) as file, opened(top / "d", os.O_RDONLY) as directory:
            os.setxattr(file, "user.before", b"1")
            (top / "f").unlink()
            (top / "d").rmdir()
            os.setxattr(file, "user.after", b"2")
            os.setxattr(directory, "user.after", b"2")
            assert sorted(os.listxattr(file)) == ["user.after", "user.before"]
            assert os.getxattr(directory, "user.after") == b"2"


@pytest.mark.semantics("xattr-other-namespaces")
@pytest.mark.parametrize(
    "name", ["security.capability", "security.x", "trusted.x", "system.posix_acl_access", "system.x"]
)
def test_other_namespaces(folder: Path, name: str) -> None:
    """Attributes that are not of users do not exist and cannot be made."""
    path = folder / "f"
    path.touch()
    value = bytes.fromhex("0100000200200000" + "00" * 12)  # what `setcap cap_net_raw+ep` writes
    value = value if "cap" in name else b"\x02\0\0\0"
    for call in (
        lambda: os.getxattr(path, name),
        lambda: os.setxattr(path, name, value),
        lambda: os.setxattr(path, name, value, os.XATTR_CREATE),
        lambda: os.removexattr(path, name),
    ):
        with raises(errno.EOPNOTSUPP):
            call()
    assert os.listxattr(path) == []


@pytest.mark.semantics("xattr-calls")
def test_ctime(folder: Path) -> None:
    """A changed attribute moves ctime and nothing else."""
    for path in (folder / "f", folder / "d"):
        path.mkdir() if path.name == "d" else path.write_text("x")
        before = path.stat()
        os.setxattr(path, "user.a", b"1")
        middle = path.stat()
        os.removexattr(path, "user.a")
        after = path.stat()
        assert before.st_ctime_ns < middle.st_ctime_ns < after.st_ctime_ns
        assert (before.st_mtime_ns, before.st_ino, before.st_mode) == (
            after.st_mtime_ns,
            after.st_ino,
            after.st_mode,
        )


@pytest.mark.semantics("xattr-limit")
@pytest.mark.parametrize("kind", ["committed", "open", "directory"])
def test_more_than_a_message_holds(folder: Path, client: Client, kind: str) -> None:
    """ENOSPC for what does not fit into the object's metadata; what is there stays, and so do all other changes."""
    path = folder / "it"
    path.mkdir() if kind == "directory" else path.write_text("x")
    with opened(path, os.O_RDONLY if kind == "directory" else os.O_RDWR) as fd:
        if kind == "open":
            os.write(fd, b"y")
        count = 0
        with raises(errno.ENOSPC):
            for count in range(100):
                os.setxattr(fd, f"user.{count}", noise(60_000, count))
        assert 5 < count < 20
        with raises(errno.ENODATA):
            os.getxattr(fd, f"user.{count}")
        os.setxattr(fd, "user.0", b"small")
    path.chmod(0o700)
    other = folder / ("é" * 120)
    path.rename(other)
    assert os.getxattr(other, "user.0") == b"small"
    assert os.getxattr(other, "user.1") == noise(60_000, 1)
    for number in range(1, count):
        os.removexattr(other, f"user.{number}")
    assert os.listxattr(other) == ["user.0"]


@pytest.mark.semantics("errors-of-the-store")
@pytest.mark.semantics("xattr-stored-at-once")
def test_a_full_bucket(mount: Mounter, client: Client) -> None:
    """The error of the store is the call's error, and the old value shows again."""
    client.create_bucket("full", max_bytes=100_000)
    try:
        mounted = mount("/full")
        mounted.allow("maximum bytes exceeded")
        path = mounted.path / "f"
        path.write_bytes(noise(60_000))
        (mounted.path / "d").mkdir()
        for one in (path, mounted.path / "d"):
            os.setxattr(one, "user.a", b"old")
            before = one.stat()
            with raises(errno.ENOSPC):
                os.setxattr(one, "user.a", noise(60_000))
            with raises(errno.ENOSPC):
                os.setxattr(one, "user.b", noise(60_000))
            assert attributes(one) == {b"user.a": b"old"}
            assert one.stat() == before
        with path.open("r+b") as file, raises(errno.ENOSPC):
            os.setxattr(file.fileno(), "user.a", noise(60_000))
        assert path.read_bytes() == noise(60_000)
        assert mounted.finish() == []
    finally:
        client.delete_bucket("full")


@pytest.mark.semantics("errors-of-the-store")
@pytest.mark.semantics("xattr-stored-at-once")
def test_a_sealed_bucket(mount: Mounter, client: Client) -> None:
    """Attributes of a bucket that cannot be written are read, and changing them is EROFS."""
    client.create_bucket("sealed")
    try:
        client.put("sealed", "f", b"x", {"metadata": {"colour": "red"}})
        client.change_bucket("sealed", sealed=True)
        mounted = mount("/sealed")
        mounted.allow("is read-only|it is sealed")
        path = mounted.path / "f"
        assert attributes(path) == {b"user.colour": b"red"}
        with raises(errno.EROFS):
            os.setxattr(path, "user.colour", b"blue")
        with raises(errno.EROFS):
            os.removexattr(path, "user.colour")
        assert attributes(path) == {b"user.colour": b"red"}
        assert os.getxattr(mounted.path, "user.nats.sealed") == b"true"
        assert mounted.finish() == []
    finally:
        client.delete_bucket("sealed")


# --- where they are stored ------------------------------------------------------------------------------------


@pytest.mark.semantics("xattr-is-metadata")
def test_other_clients_see_them(folder: Path, client: Client) -> None:
    """user.NAME is the entry NAME of the object's metadata; it is stored when the call returns."""
    path = folder / "f"
    path.write_text("x")
    before = client.stored(folder.name, "f")
    run("setfattr", "-n", "user.colour", "-v", "red", path)
    after = client.stored(folder.name, "f")
    assert after["metadata"]["colour"] == "red"
    assert (after["nuid"], after["digest"]) == (before["nuid"], before["digest"])
    run("setfattr", "-x", "user.colour", path)
    assert client.stored(folder.name, "f")["metadata"].keys() == before["metadata"].keys()
    (folder / "d").mkdir()
    os.setxattr(folder / "d", "user.colour", b"blue")
    assert client.stored(folder.name, "d/")["metadata"]["colour"] == "blue"


@pytest.mark.semantics("xattr-is-metadata")
def test_what_other_clients_stored(folder: Path, client: Client) -> None:
    """Every entry of an object's metadata is listed, also where its key can be no name; natsfs' own are not."""
    long, own = "k" * 300, {"mode": "100600", "uid": "0", "mtime": "2020-01-01T00:00:00Z"}
    theirs = {
        "colour": "grün",
        "content-type": "text/plain",
        "nats.size": "1",
        long: "long",
        "": "nameless",
        "a\0": "b",
    }
    client.put(folder.name, "f", b"x", {"metadata": theirs | own})
    path = folder / "f"
    until(path.exists)
    found = attributes(path)
    assert sorted(found.values()) == sorted(value.encode() for value in theirs.values())
    assert found[b"user.colour"] == "grün".encode()
    assert found[b"user.content-type"] == b"text/plain"
    assert found[b"user.user.nats.size"] == b"1"
    for name in found:
        os.setxattr(path, name, found[name] + b"!")
    stored = client.stored(folder.name, "f")["metadata"]
    assert {key: stored[key] for key in theirs} == {key: value + "!" for key, value in theirs.items()}
    assert stored["mtime"].startswith("2020-01-01T00:00:00")
    for name in found:
        os.removexattr(path, name)
    assert not client.stored(folder.name, "f")["metadata"].keys() & theirs.keys()


@pytest.mark.semantics("xattr-is-metadata")
def test_a_change_by_another_client(folder: Path, client: Client) -> None:
    """New metadata shows at once and on the same inode, also to who has the file open; new content brings its own."""
    path = folder / "f"
    path.write_text("x")
    os.setxattr(path, "user.colour", b"red")
    before = path.stat()
    with opened(path, os.O_RDONLY) as fd:
        meta = client.stored(folder.name, "f")
        client.publish_meta(
            meta | {"metadata": meta["metadata"] | {"colour": "blue"}, "description": "theirs"}
        )
        until(lambda: os.getxattr(fd, "user.colour") == b"blue")
        assert os.getxattr(path, "user.nats.description") == b"theirs"
        assert path.stat().st_ino == before.st_ino
        client.put(folder.name, "f", b"new", {"metadata": {"shape": "round"}})
        until_shown(path, {b"user.shape": b"round"})
        assert os.getxattr(fd, "user.colour") == b"blue"
        with raises(errno.ENODATA):
            os.getxattr(path, "user.nats.description")


@pytest.mark.semantics("xattr-names-and-values")
def test_odd_names_and_values(bucket: str, mount: Mounter, client: Client, tmp_path: Path) -> None:
    """Any name and any value comes back to the byte, after a remount as well, and stays off natsfs' own entries."""
    first = mount(f"/{bucket}", folder=tmp_path)
    paths = ["f", "d", "d/g"]
    (first.path / "d").mkdir()
    for name in paths:
        path = first.path / name
        if name != "d":
            path.write_text("x")
        path.chmod(0o750)
        label(path, ODD)
        assert attributes(path) == ODD
    assert first.finish() == []
    root = mount(f"/{bucket}", folder=tmp_path).path
    for name in paths:
        assert attributes(root / name) == ODD
        assert stat.S_IMODE((root / name).stat().st_mode) == 0o750
        assert not (root / name).is_symlink()
    assert client.stored(bucket, "f")["metadata"]["mode"] == "100750"


@pytest.mark.semantics("xattr-is-metadata")
def test_the_rust_client_reads_them(nats_server: Any, folder: Path, client: Client) -> None:
    """An object with attributes of every kind is an ordinary object for a client that is strict about its form."""
    path = folder / "f"
    path.write_bytes(noise(10_000))
    label(path, ODD | {b"user.nats.description": b"theirs", b"user.nats.header.X-A": b"1\n2"})

    async def read() -> Any:
        connection = natsrpy.Nats([nats_server.url])
        await connection.startup()
        try:
            store = await (await connection.jetstream()).object_store.get(folder.name)
            return await store.get_info("f")
        finally:
            await connection.shutdown()

    info = client.run(read())
    assert info.description == "theirs"
    assert {name: list(values) for name, values in info.headers.items()} == {"X-A": ["1", "2"]}
    assert info.metadata == client.stored(folder.name, "f")["metadata"]
    assert (info.metadata["user.mode"], info.metadata["empty"]) == ("mine", "")
    assert info.size == 10_000


# --- life -----------------------------------------------------------------------------------------------------


@pytest.mark.semantics("xattr-survive")
def test_they_survive(bucket: str, mount: Mounter, tmp_path: Path) -> None:
    """Attributes of files and directories stay through every other change, and a remount."""
    first = mount(f"/{bucket}", folder=tmp_path)
    (first.path / "d/e").mkdir(parents=True)
    path = first.path / "d/e/f"
    values = {b"user.a": b"1", b"user.mode": b"\xff"}
    path.write_text("one")
    for one in (path, path.parent, path.parent.parent):
        label(one, values)
    path.write_text("two")
    assert attributes(path) == values
    with path.open("a") as file:
        file.write("three")
    os.truncate(path, 4)
    path.chmod(0o600)
    os.utime(path, ns=(1, 2))
    path.parent.chmod(0o700)
    if os.getuid() == 0:
        os.chown(path, 5, 6)
        os.chown(path.parent, 5, 6)
    path = path.rename(path.with_name("g"))
    (path.parent / "h").write_text("target")
    path = path.rename(path.with_name("h"))
    assert attributes(path) == values
    (first.path / "d").rename(first.path / "moved")
    for root in (first.path, None):
        if root is None:
            assert first.finish() == []
            root = mount(f"/{bucket}", folder=tmp_path).path
        for name in ("moved", "moved/e", "moved/e/h"):
            assert attributes(root / name) == values
        assert (root / "moved/e/h").read_text() == "twot"
        assert (root / "moved/e/h").stat().st_mtime_ns == 2


@pytest.mark.semantics("xattr-survive")
def test_a_new_file_of_the_name_has_none(folder: Path) -> None:
    """After a removal, or a rename over it, nothing is left of the old file's attributes."""
    path = folder / "f"
    path.write_text("x")
    os.setxattr(path, "user.a", b"1")
    path.unlink()
    path.write_text("y")
    assert attributes(path) == {}
    os.setxattr(path, "user.a", b"1")
    (folder / "g").write_text("z")
    (folder / "g").rename(path)
    assert attributes(path) == {}


@pytest.mark.semantics("xattr-with-the-content")
@pytest.mark.parametrize("how", ["new", "truncated", "appended"])
def test_of_a_file_being_written(folder: Path, client: Client, how: str) -> None:
    """Attributes of a file with unsaved content show at once here, and to others with the content at close()."""
    path = folder / "f"
    if how != "new":
        path.write_text("old")
        os.setxattr(path, "user.old", b"stays")
    flags = {"new": os.O_CREAT | os.O_EXCL, "truncated": os.O_TRUNC, "appended": os.O_APPEND}[how]
    with opened(path, os.O_WRONLY | flags) as fd:
        os.write(fd, noise(3_000_000))
        os.setxattr(fd, "user.a", b"1")
        os.setxattr(path, "user.b", b"2")
        os.setxattr(path, "user.nats.description", b"mine")
        os.setxattr(path, "user.gone", b"2")
        os.removexattr(fd, "user.gone")
        assert os.getxattr(path, "user.a") == b"1"
        with raises(errno.EEXIST):
            os.setxattr(fd, "user.b", b"3", os.XATTR_CREATE)
        assert "a" not in ((client.meta(folder.name, "f") or {}).get("metadata") or {})
    wanted = {b"user.a": b"1", b"user.b": b"2"} | ({} if how == "new" else {b"user.old": b"stays"})
    assert attributes(path) == wanted
    meta = client.stored(folder.name, "f")
    assert (meta["metadata"]["a"], meta["metadata"]["b"], meta["description"]) == ("1", "2", "mine")
    assert client.read(folder.name, "f").endswith(noise(3_000_000))
    client.publish_meta(meta | {"metadata": {"a": "theirs"}, "description": "theirs"})
    until_shown(path, {b"user.a": b"theirs"})  # nothing is waiting any more
    assert os.getxattr(path, "user.nats.description") == b"theirs"


@pytest.mark.semantics("xattr-with-the-content")
def test_others_change_the_metadata_meanwhile(folder: Path, client: Client) -> None:
    """A commit keeps what another client added to the metadata since the file was opened."""
    path = folder / "f"
    path.write_text("x")
    with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
        os.write(fd, b"y")
        os.setxattr(fd, "user.mine", b"1")
        meta = client.stored(folder.name, "f")
        client.publish_meta(meta | {"metadata": meta["metadata"] | {"theirs": "2"}, "headers": {"X": ["1"]}})
        until_shown(path, {b"user.mine": b"1", b"user.theirs": b"2"})
        os.setxattr(fd, "user.nats.header.Y", b"2")
    meta = client.stored(folder.name, "f")
    assert attributes(path) == {b"user.mine": b"1", b"user.theirs": b"2"}
    assert meta["headers"] == {"X": ["1"], "Y": ["2"]}
    assert path.read_text() == "xy"


@pytest.mark.semantics("xattr-with-the-content")
def test_a_commit_that_fails(bucket: str, mount: Mounter, client: Client) -> None:
    """The attributes go aside with the content; the name shows what the store holds."""
    mounted = mount(f"/{bucket}")
    mounted.allow_failed()
    mounted.allow("flush: ")
    path = mounted.path / "f"
    path.write_text("x")
    os.setxattr(path, "user.a", b"old")
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, b"y", 1)
    os.setxattr(fd, "user.a", b"new")
    client.put(bucket, "f", b"theirs", {"metadata": {"a": "theirs"}})
    until(lambda: path.read_text() == "theirs")
    with raises(errno.ESTALE):
        os.close(fd)
    assert attributes(path) == {b"user.a": b"theirs"}
    (manifest,) = mounted.failed()
    assert manifest["attributes"]["a"] == "new"


@pytest.mark.semantics("xattr-with-the-content")
def test_a_commit_that_finds_no_room(mount: Mounter, client: Client) -> None:
    """After a close() that failed the old attributes show again, with the old content."""
    client.create_bucket("narrow", max_bytes=100_000)
    try:
        mounted = mount("/narrow")
        mounted.allow_failed()
        mounted.allow("flush: |maximum bytes exceeded")
        path = mounted.path / "f"
        path.write_text("old")
        os.setxattr(path, "user.a", b"old")
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.write(fd, noise(200_000))
        os.setxattr(fd, "user.a", b"new")
        os.setxattr(fd, "user.b", b"new")
        with raises(errno.ENOSPC):
            os.close(fd)
        assert path.read_text() == "old"
        assert attributes(path) == {b"user.a": b"old"}
        (manifest,) = mounted.failed()
        assert (manifest["attributes"]["a"], manifest["attributes"]["b"]) == ("new", "new")
        assert mounted.finish() == []
    finally:
        client.delete_bucket("narrow")


@pytest.mark.semantics("xattr-concurrent")
def test_two_machines_at_once(bucket: str, mount: Mounter) -> None:
    """Of attributes that two mounts set on one file or directory at the same time none is lost."""
    roots = [mount(f"/{bucket}").path for _ in range(2)]
    (roots[0] / "f").write_text("x")
    (roots[0] / "d").mkdir()
    until(lambda: (roots[1] / "f").exists() and (roots[1] / "d").exists())
    wanted = {f"user.{root}.{number}".encode(): b"x" for root in range(2) for number in range(15)}

    def work(root: int) -> None:
        for number in range(15):
            for name in "fd":
                os.setxattr(roots[root] / name, f"user.{root}.{number}", b"x")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    for root in roots:
        until_shown(root / "f", wanted)
        until_shown(root / "d", wanted)


@pytest.mark.semantics("xattr-concurrent")
def test_beside_commits_of_the_content(folder: Path, client: Client) -> None:
    """An attribute that is set while close() saves the content is stored when both calls have returned."""
    path = folder / "f"
    path.touch()
    with ThreadPoolExecutor(1) as pool, path.open("rb"):
        for number in range(12):
            data = noise(2_000_000, number)
            fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
            os.write(fd, data)
            closing = pool.submit(os.close, fd)
            time.sleep(number * 0.002)  # at another moment each time
            os.setxattr(path, f"user.{number}", b"x")
            closing.result()
            stored = client.stored(folder.name, "f")["metadata"]
            assert {str(n) for n in range(number + 1)} <= stored.keys()
            assert client.read(folder.name, "f") == data


# --- what NATS shows ------------------------------------------------------------------------------------------


def shown(path: Path, what: str) -> str:
    return os.getxattr(path, f"user.nats.{what}").decode()


@pytest.mark.semantics("xattr-nats-of-an-object")
def test_what_nats_knows_of_an_object(folder: Path, client: Client) -> None:
    """user.nats.* are the object's coordinates in the store."""
    more = {
        "description": "theirs",
        "headers": {"X-A": ["1", "2"], "X-B": [""]},
        "metadata": {"colour": "blue"},
    }
    client.put(folder.name, "d/f", noise(300_000), more)
    path = folder / "d/f"
    until(path.exists)
    meta = client.stored(folder.name, "d/f")
    assert (shown(path, "nuid"), shown(path, "digest")) == (meta["nuid"], meta["digest"])
    assert [shown(path, what) for what in ("size", "chunks", "chunk_size")] == ["300000", "3", "131072"]
    assert json.loads(shown(path, "metadata")) == {"colour": "blue"}
    assert json.loads(shown(path, "headers")) == more["headers"]
    assert (shown(path, "description"), shown(path, "header.X-A"), shown(path, "header.X-B")) == (
        "theirs",
        "1\n2",
        "",
    )
    assert int(shown(path, "seq")) == client.info(folder.name)["state"]["last_seq"]
    os.setxattr(path, "user.colour", b"red")
    assert int(shown(path, "seq")) == client.info(folder.name)["state"]["last_seq"]
    assert attributes(path) == {b"user.colour": b"red"}  # none of the above is listed
    for what in ("header.x-a", "header.X-C", "header.", "header", "link", "other"):
        with raises(errno.ENODATA):
            shown(path, what)
    with raises(errno.ENODATA):
        shown(path.parent, "nuid")  # a directory that follows from a name has no object
    path.parent.chmod(0o700)
    until(lambda: client.meta(folder.name, "d/"))
    assert shown(path.parent, "nuid") == client.stored(folder.name, "d/")["nuid"]


@pytest.mark.semantics("xattr-nats-of-an-object")
def test_a_file_that_was_never_committed(folder: Path) -> None:
    """Until the first close() there is no object to tell of."""
    with opened(folder / "f", os.O_WRONLY | os.O_CREAT) as fd:
        for what in (
            "nuid",
            "digest",
            "chunks",
            "chunk_size",
            "size",
            "seq",
            "metadata",
            "headers",
            "description",
        ):
            with raises(errno.ENODATA):
                os.getxattr(fd, f"user.nats.{what}")
    assert shown(folder / "f", "size") == "0"


@pytest.mark.semantics("xattr-nats-set")
def test_description_and_headers_can_be_set(folder: Path, client: Client) -> None:
    """Setting and removing them changes the object's description and headers for every client."""
    (folder / "d").mkdir()
    (folder / "f").write_text("x")
    for path, name in ((folder / "f", "f"), (folder / "d", "d/")):
        os.setxattr(path, "user.nats.description", "schön".encode())
        os.setxattr(path, "user.nats.header.X-A", b"1\n2")
        os.setxattr(path, "user.nats.header.X-B", b"3")
        meta = client.stored(folder.name, name)
        assert (meta["description"], meta["headers"]) == ("schön", {"X-A": ["1", "2"], "X-B": ["3"]})
        os.removexattr(path, "user.nats.header.X-A")
        assert client.stored(folder.name, name)["headers"] == {"X-B": ["3"]}
        os.setxattr(path, "user.nats.headers", b'{"Y": ["4", "5"]}')
        assert client.stored(folder.name, name)["headers"] == {"Y": ["4", "5"]}
        assert shown(path, "header.Y") == "4\n5"
        os.removexattr(path, "user.nats.headers")
        os.removexattr(path, "user.nats.description")
        meta = client.stored(folder.name, name)
        assert "headers" not in meta
        assert "description" not in meta
        for what in ("headers", "description", "header.Y"):
            with raises(errno.ENODATA):
                os.removexattr(path, f"user.nats.{what}")
        for what, value in (
            ("headers", b"[]"),
            ("headers", b'{"a": "b"}'),
            ("header.a:b", b"c"),
            ("description", b"\xff"),
        ):
            with raises(errno.EINVAL):
                os.setxattr(path, f"user.nats.{what}", value)


@pytest.mark.semantics("xattr-nats-set")
def test_the_rest_is_read_only(folder: Path) -> None:
    """EPERM for what NATS decides, and for names below user.nats. that mean nothing."""
    path = folder / "f"
    path.write_text("x")
    for what in ("nuid", "digest", "chunks", "chunk_size", "size", "seq", "metadata", "other"):
        with raises(errno.EPERM):
            os.setxattr(path, f"user.nats.{what}", b"1")
        with raises(errno.EPERM):
            os.removexattr(path, f"user.nats.{what}")
    for what in ("sealed", "other"):
        with raises(errno.EPERM):
            os.setxattr(folder, f"user.nats.{what}", b"1")


@pytest.mark.semantics("xattr-nats-of-a-bucket")
@pytest.mark.parametrize("alone", [True, False])
def test_what_nats_knows_of_a_bucket(mount: Mounter, client: Client, alone: bool) -> None:
    """On a bucket's directory user.nats.* are settings and use of its stream."""
    settings = {
        "max_bytes": 1_000_000,
        "max_age": 3_600_000_000_000,
        "compression": "s2",
        "storage": "memory",
    }
    client.create_bucket("shown", description="for tests", **settings)
    try:
        client.put("shown", "f", b"x")
        mounted = mount("/shown") if alone else mount()
        path = mounted.path if alone else mounted.path / "shown"
        wanted = {
            "sealed": False,
            "replicas": 1,
            "storage": "memory",
            "max_bytes": 1_000_000,
            "ttl": 3600,
            "compression": "s2",
            "description": "for tests",
            "messages": 2,
            "bytes": client.info("shown")["state"]["bytes"],
        }
        for _ in range(2):  # before the bucket is loaded, and after
            assert json.loads(shown(path, "status")) == wanted
            for what, value in wanted.items():
                assert shown(path, what) == (value if isinstance(value, str) else json.dumps(value))
            assert (path / "f").exists()
        with raises(errno.ENODATA):
            shown(path, "nuid")
        assert os.listxattr(path) == []
        assert mounted.finish() == []
    finally:
        client.delete_bucket("shown")


@pytest.mark.semantics("xattr-nats-of-a-bucket")
def test_a_bucket_holds_none(shared: Mount, folder: Path) -> None:
    """Neither a bucket's own directory nor the root of all buckets can be given attributes."""
    for path in (folder, shared.path):
        with raises(errno.EOPNOTSUPP):
            os.setxattr(path, "user.a", b"1")
        with raises(errno.ENODATA):
            os.getxattr(path, "user.a")
        with raises(errno.ENODATA):
            os.removexattr(path, "user.a")
        assert os.listxattr(path) == []
    with raises(errno.ENODATA):
        shown(shared.path, "status")


@pytest.mark.semantics("xattr-calls")
def test_the_root_of_a_mount_below_a_bucket(bucket: str, mount: Mounter, client: Client) -> None:
    """A directory of a bucket is one like any other where it is what is mounted."""
    client.put(bucket, "d/e/f", b"x")
    path = mount(f"/{bucket}/d/e").path
    os.setxattr(path, "user.a", b"1")
    assert attributes(path) == {b"user.a": b"1"}
    assert client.stored(bucket, "d/e/")["metadata"]["a"] == "1"


# --- programs -------------------------------------------------------------------------------------------------


def make_tree(top: Path) -> None:
    """Files and directories with attributes of every kind."""
    (top / "d/e").mkdir(parents=True)
    (top / "d/f").write_bytes(noise(200_000))
    (top / "d/empty").touch()
    (top / "d/link").symlink_to("f")
    (top / "d/e/executable").write_text("#!/bin/sh\n")
    (top / "d/e/executable").chmod(0o755)
    small = {
        name: value for name, value in ODD.items() if len(name) + len(value) < 200
    }  # ext4 has 4 KiB for all
    for name in ("d", "d/e", "d/f", "d/empty"):
        label(top / name, small)
    os.setxattr(top / "d/e/executable", "user.only", b"one")


def tree(top: Path) -> dict[str, tuple[object, ...]]:
    return {
        str(path.relative_to(top)): (
            attributes(path),
            path.read_bytes() if path.is_file() and not path.is_symlink() else None,
            stat.S_IMODE(path.lstat().st_mode),
        )
        for path in [top / "d", *(top / "d").rglob("*")]
    }


def by_cp(source: Path, target: Path) -> None:
    run("cp", "-a", source / "d", target)


def by_cp_preserve(source: Path, target: Path) -> None:
    run("cp", "-r", "--no-dereference", "--preserve=mode,xattr", source / "d", target)


def by_rsync(source: Path, target: Path) -> None:
    run("rsync", "-aX", source / "d", target)
    again = run("rsync", "-aX", "--itemize-changes", source / "d", target).stdout.splitlines()
    assert not [line for line in again if not line.startswith(".d..t")], again


def by_tar(source: Path, target: Path) -> None:
    archive = target / "archive.tar"
    run("tar", "--xattrs", "--xattrs-include=user.*", "-cf", archive, "-C", source, "d")
    run("tar", "--xattrs", "--xattrs-include=user.*", "-xpf", archive, "-C", target)


def by_mv(source: Path, target: Path) -> None:
    run("cp", "-a", source / "d", source / "copy")
    run("mv", source / "d", target / "d")
    (source / "copy").rename(source / "d")


@pytest.mark.semantics("xattr-programs")
@pytest.mark.parametrize("copy", [by_cp, by_cp_preserve, by_rsync, by_tar, by_mv])
def test_programs_copy_them_both_ways(
    folder: Path, tmp_path: Path, copy: Callable[[Path, Path], None]
) -> None:
    """From a local file system to the mount, inside it, and back: the same attributes everywhere."""
    places = [tmp_path / "from", folder / "one", folder / "two", tmp_path / "back"]
    for place in places:
        place.mkdir()
    make_tree(places[0])
    wanted = tree(places[0])
    for source, target in pairwise(places):
        copy(source, target)
        assert tree(target) == wanted
    shutil.rmtree(folder / "one")


@pytest.mark.semantics("xattr-programs")
def test_setfattr_and_getfattr(folder: Path, tmp_path: Path) -> None:
    """What `getfattr -d` prints is the same on both sides, and `setfattr --restore` takes it."""
    dumps = []
    for top in (tmp_path, folder):
        (top / "f").touch()
        run("setfattr", "-n", "user.text", "-v", 'a "b"', "f", cwd=top)
        run("setfattr", "-n", "user.binary", "-v", "0x00ff", "f", cwd=top)
        run("setfattr", "-n", "user.0s", "-v", "0s" + "MHM=", "f", cwd=top)
        run("setfattr", "-n", "user.gone", "f", cwd=top)
        run("setfattr", "-x", "user.gone", "f", cwd=top)
        dumps.append(sorted(run("getfattr", "-d", "-m", "-", "f", cwd=top).stdout.splitlines()))
        (top / "dump").write_text(run("getfattr", "-d", "-m", "-", "f", cwd=top).stdout)
        (top / "f").unlink()
        (top / "f").touch()
        run("setfattr", "--restore=dump", cwd=top)
        dumps.append(sorted(run("getfattr", "-d", "-m", "-", "f", cwd=top).stdout.splitlines()))
    assert dumps[0] == dumps[1] == dumps[2] == dumps[3]
    assert len([line for line in dumps[0] if line.startswith("user.")]) == 3

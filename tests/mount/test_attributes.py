"""Mode, owner and times; statfs."""

from __future__ import annotations

import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support import Client, Mounter, never, noise, opened, run, snapshot, until

NS = 1_234_567_890_123_456_789


def stored_mode(client: Client, bucket: str, name: str, mode: str) -> bool:
    return bool(client.stored(bucket, name)["metadata"]["mode"] == mode)


@pytest.mark.semantics("defaults")
def test_defaults_of_foreign_objects(bucket: str, mount: Mounter, client: Client) -> None:
    """An object without attributes has the mounting user, the default modes and the time of its message."""
    before = time.time()
    client.put(bucket, "d/f", b"x")
    status = (mount(f"/{bucket}").path / "d/f").stat()
    assert stat.S_IMODE(status.st_mode) == 0o644
    assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid())
    assert before - 1 <= status.st_mtime <= time.time() + 1


@pytest.mark.semantics("defaults")
def test_default_options(bucket: str, mount: Mounter, client: Client) -> None:
    """-o uid, gid, file_mode and dir_mode say what objects without attributes get."""
    client.put(bucket, "d/f", b"x")
    root = mount(f"/{bucket}", "uid=1234", "gid=2345", "file_mode=640", "dir_mode=750").path
    for path, mode in ((root / "d/f", 0o640), (root / "d", 0o750)):
        status = path.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (mode, 1234, 2345)


@pytest.mark.semantics("times-persist")
def test_attributes_persist(bucket: str, mount: Mounter, tmp_path: Path) -> None:
    """Mode, owner, mtime and atime of files, directories and links are the same after a remount."""
    first = mount(f"/{bucket}", folder=tmp_path)
    root = first.path
    (root / "dir").mkdir()
    (root / "dir/file").write_bytes(b"x" * 200_000)
    (root / "dir/empty").touch()
    (root / "dir/link").symlink_to("file")
    (root / "implied/by").mkdir(parents=True)
    for number, path in enumerate(
        (root / "dir/file", root / "dir/empty", root / "implied/by", root / "dir", root / "implied")
    ):
        path.chmod(0o4751 + number if path.is_file() else 0o1751 + number)
        if os.getuid() == 0:
            os.chown(path, 1000 + number, 2000 + number)
            path.chmod(0o4751 + number if path.is_file() else 0o1751 + number)
        os.utime(path, ns=(NS + number, NS + 10 + number))
    os.utime(root / "dir/link", ns=(NS, NS + 7), follow_symlinks=False)
    if os.getuid() == 0:
        os.chown(root / "dir/link", 7, 8, follow_symlinks=False)
    before = snapshot(root)
    atimes = {path: path.lstat().st_atime_ns for path in root.rglob("*")}
    assert before["./dir/file"][3] == NS + 10
    assert before["./dir"][3] == NS + 13
    del before["."]
    assert first.finish() == []
    root = mount(f"/{bucket}", folder=tmp_path).path
    after = snapshot(root)
    del after["."]
    assert after == before
    assert {path: path.lstat().st_atime_ns for path in root.rglob("*")} == atimes


@pytest.mark.semantics("metadata-map")
def test_attributes_of_a_file_being_written(folder: Path, client: Client) -> None:
    """fchmod and utimensat between write and close hold, as `cp -p` and `tar` do it."""
    with opened(folder / "f", os.O_WRONLY | os.O_CREAT, 0o600) as fd:
        os.write(fd, b"data")
        os.fchmod(fd, 0o751)
        os.utime(fd, ns=(NS, NS))
        assert os.fstat(fd).st_mtime_ns == NS
    status = (folder / "f").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (0o751, NS)
    assert client.stored(folder.name, "f")["metadata"]["mode"] == "100751"


def test_a_write_sets_mtime(folder: Path) -> None:
    """A change of the content moves mtime and ctime; reading does not."""
    (folder / "f").write_bytes(b"x")
    os.utime(folder / "f", ns=(NS, NS))
    (folder / "f").read_bytes()
    assert (folder / "f").stat().st_mtime_ns == NS
    with (folder / "f").open("ab") as file:
        file.write(b"y")
    assert abs((folder / "f").stat().st_mtime - time.time()) < 10


def test_chmod_keeps_the_content_and_copies_nothing(folder: Path, client: Client) -> None:
    """chmod is one metadata message with the same nuid."""
    (folder / "f").write_bytes(b"x" * 1_000_000)
    before = client.stored(folder.name, "f")
    (folder / "f").chmod(0o600)
    until(partial(stored_mode, client, folder.name, "f", "100600"))
    after = client.stored(folder.name, "f")
    assert (after["nuid"], after["digest"]) == (before["nuid"], before["digest"])
    assert client.read(folder.name, "f") == b"x" * 1_000_000


@pytest.mark.semantics("others-data-survives")
def test_what_others_stored_survives(folder: Path, client: Client) -> None:
    """Headers, description and unknown metadata stay through chmod, append and rename."""
    more = {"description": "theirs", "headers": {"X-A": ["1", "2"]}, "metadata": {"colour": "blue"}}
    client.put(folder.name, "f", b"x", more)
    path = folder / "f"
    while not path.exists():
        time.sleep(0.01)
    path.chmod(0o600)
    with path.open("ab") as file:
        file.write(b"y")
    path.rename(folder / "g")
    meta = client.stored(folder.name, "g")
    assert client.read(folder.name, "g") == b"xy"
    assert (meta["description"], meta["headers"]) == ("theirs", {"X-A": ["1", "2"]})
    assert meta["metadata"]["colour"] == "blue"


def test_times_of_a_directory(folder: Path) -> None:
    """A directory's mtime moves when an entry comes or goes, not when one is written to."""
    (folder / "d").mkdir()
    (folder / "d/f").write_text("x")

    def moved() -> bool:
        now = (folder / "d").stat().st_mtime_ns
        os.utime(folder / "d", ns=(NS, NS))
        return now != NS

    moved()
    assert not moved()
    (folder / "d/g").touch()
    assert moved()
    (folder / "d/g").unlink()
    assert moved()
    (folder / "d/f").rename(folder / "d/h")
    assert moved()
    (folder / "d/e").mkdir()
    assert moved()
    with (folder / "d/h").open("a") as file:
        file.write("y")
    assert not moved()


def test_number_of_links_of_a_directory(folder: Path) -> None:
    """2 and one for each directory in it, which `find` relies on."""
    (folder / "d").mkdir()
    assert (folder / "d").stat().st_nlink == 2
    (folder / "d/a").mkdir()
    (folder / "d/b/c").mkdir(parents=True)
    (folder / "d/f").touch()
    assert (folder / "d").stat().st_nlink == 4
    (folder / "d/a").rmdir()
    assert (folder / "d").stat().st_nlink == 3


def test_inode_numbers_are_stable(bucket: str, mount: Mounter, tmp_path: Path) -> None:
    """The same numbers after a remount, so that git and backup programs do not read everything again."""
    first = mount(f"/{bucket}", folder=tmp_path)
    (first.path / "d").mkdir()
    (first.path / "d/f").write_text("x")
    (first.path / "g").write_text("y")
    before = {str(path): path.stat().st_ino for path in first.path.rglob("*")}
    assert len(set(before.values())) == 3
    assert first.finish() == []
    second = mount(f"/{bucket}", folder=tmp_path)
    assert {str(path): path.stat().st_ino for path in second.path.rglob("*")} == before


@pytest.mark.semantics("permissions")
def test_permissions_are_enforced(bucket: str, mount: Mounter) -> None:
    """Another user may enter with allow_other, and the kernel checks modes."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    mounted = mount(f"/{bucket}", "allow_other")
    (mounted.path / "private").write_text("secret")
    (mounted.path / "private").chmod(0o600)
    (mounted.path / "public").write_text("hello")
    for parent in mounted.path.parents[:-2]:
        parent.chmod(0o755)
    as_nobody: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []}
    assert run("cat", mounted.path / "public", **as_nobody).stdout == "hello"
    run("cat", mounted.path / "private", status=1, **as_nobody)


def test_statfs_of_a_bucket_with_a_limit(mount: Mounter, client: Client) -> None:
    """df shows the bucket's max_bytes and what is used of it."""
    client.create_bucket("limited", max_bytes=50_000_000)
    try:
        mounted = mount("/limited")
        before = os.statvfs(mounted.path)
        assert before.f_blocks * before.f_frsize == pytest.approx(50_000_000, rel=0.001)
        (mounted.path / "f").write_bytes(os.urandom(10_000_000))
        time.sleep(2.2)  # the age at which the figures are asked for again
        after = os.statvfs(mounted.path)
        used = (before.f_bavail - after.f_bavail) * after.f_frsize
        assert used == pytest.approx(10_000_000, rel=0.02)
        assert after.f_namemax == 255
        run("df", mounted.path)
        assert mounted.finish() == []
    finally:
        client.delete_bucket("limited")


@pytest.mark.semantics("attributes-stored")
def test_chmod_beside_a_commit(folder: Path, client: Client) -> None:
    """A mode that is changed while close() saves the content is stored, whoever else has the file open."""
    path = folder / "f"
    path.touch()
    with ThreadPoolExecutor(1) as pool, path.open("rb"):
        for number in range(24):
            fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
            os.write(fd, noise(2_000_000, number))
            closing = pool.submit(os.close, fd)
            time.sleep(number * 0.001)
            path.chmod(0o600 + number)
            closing.result()
            mode = f"{0o100600 + number:o}"
            until(partial(stored_mode, client, folder.name, "f", mode))


@pytest.mark.semantics("attributes-stored")
def test_attributes_are_stored_together_soon_after(bucket: str, mount: Mounter, client: Client) -> None:
    """What chmod, chown and utimensat change one after the other is one message; fsync stores it at once."""
    root = mount(f"/{bucket}").path
    (root / "f").write_bytes(b"x")
    (root / "d").mkdir()
    before = client.info(bucket)["state"]["last_seq"]
    for path in (root / "f", root / "d"):
        path.chmod(0o700)
        os.chown(path, 1, 2)
        path.chmod(0o711)
        os.utime(path, ns=(NS, NS))
    for name, mode in (("f", "100711"), ("d/", "40711")):
        until(partial(stored_mode, client, bucket, name, mode))
        assert client.stored(bucket, name)["metadata"]["gid"] == "2"
        assert client.stored(bucket, name)["metadata"]["mtime"].startswith("2009-02-13T23:31:30.123456789")
    assert client.info(bucket)["state"]["last_seq"] == before + 2
    for path, name in ((root / "f", "f"), (root / "d", "d/")):
        path.chmod(0o755)
        with opened(path, os.O_RDONLY) as fd:
            os.fsync(fd)
        assert client.stored(bucket, name)["metadata"]["mode"].endswith("755")


@pytest.mark.semantics("attributes-stored")
def test_a_rename_carries_attributes_along(bucket: str, mount: Mounter, client: Client) -> None:
    """As rsync and editors do it: write a temporary file, set times and mode, rename it over the old one."""
    root = mount(f"/{bucket}").path
    (root / "f").write_bytes(b"old")
    (root / "t").write_bytes(b"new")
    before = client.info(bucket)["state"]["last_seq"]
    os.utime(root / "t", ns=(NS, NS))
    (root / "t").chmod(0o640)
    (root / "t").rename(root / "f")
    stored = client.stored(bucket, "f")["metadata"]
    assert (stored["mode"], stored["mtime"][:29]) == ("100640", "2009-02-13T23:31:30.123456789")
    never(
        lambda: client.info(bucket)["state"]["last_seq"] > before + 2, 0.5, "more than the rename is stored"
    )


@pytest.mark.semantics("attributes-stored")
def test_attributes_set_just_before_the_unmount(bucket: str, mount: Mounter, client: Client) -> None:
    mounted = mount(f"/{bucket}")
    (mounted.path / "d").mkdir()
    (mounted.path / "d/f").touch()
    (mounted.path / "d/f").chmod(0o600)
    (mounted.path / "d").chmod(0o700)
    assert mounted.finish() == []
    assert client.stored(bucket, "d/f")["metadata"]["mode"] == "100600"
    assert client.stored(bucket, "d/")["metadata"]["mode"] == "40700"

"""The root of a mount of all buckets."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import Client, Mount, Mounter, opened, raises, run, until


@pytest.mark.semantics("buckets")
def test_mkdir_and_rmdir_of_a_bucket(shared: Mount, client: Client) -> None:
    """mkdir in the root makes an object store that other clients can use; rmdir deletes it when it is empty."""
    path = shared.path / "new-bucket_1"
    path.mkdir()
    config = client.info("new-bucket_1")["config"]
    assert config["subjects"] == ["$O.new-bucket_1.C.>", "$O.new-bucket_1.M.>"]
    assert (config["allow_rollup_hdrs"], config["allow_direct"], config["discard"]) == (True, True, "new")
    with raises(errno.EEXIST):
        path.mkdir()
    (path / "f").write_bytes(b"x")
    with raises(errno.ENOTEMPTY):
        path.rmdir()
    (path / "f").unlink()
    path.rmdir()
    assert "new-bucket_1" not in client.buckets()
    assert not path.exists()


@pytest.mark.semantics("buckets")
def test_a_bucket_name_that_nats_does_not_allow(shared: Mount) -> None:
    """EINVAL."""
    for name in ("with space", "dot.ted", "é", "*", ">"):
        with raises(errno.EINVAL):
            (shared.path / name).mkdir()


def test_files_in_the_root(shared: Mount) -> None:
    """The root holds buckets only: EPERM."""
    with raises(errno.EPERM):
        (shared.path / "file").touch()
    with raises(errno.EPERM):
        (shared.path / "link").symlink_to("x")
    with raises(errno.EPERM):
        os.mkfifo(shared.path / "fifo")


@pytest.mark.semantics("buckets")
def test_rename_between_buckets(shared: Mount, folder: Path, bucket: str) -> None:
    """EXDEV for files and directories, so that mv(1) copies; a bucket itself cannot be renamed."""
    other = shared.path / bucket
    until(other.is_dir)
    (folder / "d").mkdir()
    (folder / "d/f").write_bytes(b"x")
    with raises(errno.EXDEV):
        (folder / "d/f").rename(other / "f")
    with raises(errno.EXDEV):
        (folder / "d").rename(other / "d")
    with raises(errno.EXDEV):
        folder.rename(shared.path / "renamed")
    run("mv", folder / "d", other / "d")
    assert (other / "d/f").read_bytes() == b"x"


def test_buckets_of_other_clients_come_and_go(shared: Mount, client: Client) -> None:
    """A bucket that is created or deleted elsewhere is seen without waiting, also after it has been used."""
    path = shared.path / "foreign"
    assert not path.exists()
    for attempt in range(3):
        client.create_bucket("foreign")
        until(path.is_dir)
        assert os.listdir(path) == []
        client.put("foreign", "f", f"{attempt}".encode())
        until(lambda: (path / "f").exists())
        assert (path / "f").read_text() == f"{attempt}"
        client.delete_bucket("foreign")
        until(lambda: not path.exists())
        assert "foreign" not in os.listdir(shared.path)


def test_a_bucket_that_is_made_anew_at_once(shared: Mount, client: Client) -> None:
    """Deleted and created again between two looks: nothing of the old one is shown or trusted."""
    path = shared.path / "anew"
    client.create_bucket("anew")
    client.put("anew", "f", b"old content")
    client.put("anew", "old", b"x")
    until(lambda: (path / "f").exists())
    assert (path / "f").read_bytes() == b"old content"
    client.delete_bucket("anew")
    client.create_bucket("anew")
    client.put("anew", "f", b"new")
    until(lambda: not (path / "old").exists())
    until(lambda: (path / "f").exists() and (path / "f").read_bytes() == b"new")
    (path / "g").write_bytes(b"g")
    assert client.read("anew", "g") == b"g"
    client.delete_bucket("anew")
    until(lambda: not path.exists())


def test_a_bucket_deleted_while_a_file_in_it_is_written(mount: Mounter, client: Client) -> None:
    """close(2) says that the data could not be stored, and the data is kept."""
    mounted = mount()
    mounted.allow("does not exist any more")
    mounted.allow_failed()
    client.create_bucket("doomed")
    path = mounted.path / "doomed"
    until(path.is_dir)
    fd = os.open(path / "f", os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"precious")
    client.delete_bucket("doomed")
    until(lambda: not path.exists())
    with raises(errno.ENOENT, errno.ESTALE, errno.EIO):
        os.close(fd)
    kept = [manifest for manifest in mounted.failed() if manifest["name"] == "f"]
    assert [Path(manifest["data"]).read_bytes() for manifest in kept] == [b"precious"]


def test_other_streams_are_no_directories(shared: Mount, client: Client) -> None:
    """A stream that is no object store is not shown."""
    client.api("STREAM.CREATE.KV_other", {"name": "KV_other", "subjects": ["$KV.other.>"], "storage": "file"})
    try:
        time.sleep(0.5)
        assert not [name for name in os.listdir(shared.path) if "other" in name]
    finally:
        client.api("STREAM.DELETE.KV_other")


def test_a_shell_in_a_bucket(shared: Mount, folder: Path) -> None:
    """Relative paths with `..` lead from a bucket to the root and back."""
    (folder / "d").mkdir()
    shown = run("sh", "-c", f"cd d && pwd && cd ../../{folder.name} && ls -d d", cwd=folder).stdout
    assert shown == f"{folder}/d\nd\n"
    assert os.path.samefile(folder / "..", shared.path)


def test_df_of_all_buckets(shared: Mount) -> None:
    """statfs answers in the root and in a bucket."""
    status = os.statvfs(shared.path)
    assert status.f_blocks >= status.f_bfree > 0
    assert subprocess.run(["df", shared.path], capture_output=True, check=True).stdout


def test_a_file_of_a_removed_bucket_stays_readable(shared: Mount, client: Client) -> None:
    """What a handle has in the cache it still reads; no crash, whatever it reads."""
    shared.allow("does not exist|read")
    client.create_bucket("removed")
    client.put("removed", "f", b"x" * 1000)
    path = shared.path / "removed"
    until(lambda: (path / "f").exists())
    with opened(path / "f", os.O_RDONLY) as fd:
        assert os.pread(fd, 1000, 0) == b"x" * 1000
        client.delete_bucket("removed")
        until(lambda: not path.exists())
        assert os.pread(fd, 1000, 0) == b"x" * 1000


@pytest.mark.semantics("attributes-stay")
def test_attributes_of_a_bucket_that_the_kernel_forgets(folder: Path) -> None:
    """Mode and times of a bucket's own directory hold until the unmount, whatever the kernel drops from its caches."""
    (folder / "f").touch()
    folder.chmod(0o750)
    os.utime(folder, ns=(1, 2))
    with contextlib.suppress(PermissionError), open("/proc/sys/vm/drop_caches", "w") as control:
        control.write("2")
    status = folder.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_atime_ns, status.st_mtime_ns) == (0o750, 1, 2)


@pytest.mark.semantics("buckets")
def test_who_comes_while_a_bucket_is_loaded_waits_for_it(
    bucket: str, mount: Mounter, client: Client, tmp_path: Path
) -> None:
    """Also where it is not loaded for a program, but for a purge that the mount before has left."""
    first = mount("", "purge_grace=1", folder=tmp_path)
    for text in ("one", "two"):
        (first.path / bucket / "0").write_text(text)
    assert first.finish() == []
    names = [str(number) for number in range(3000)]
    client.put_many(bucket, names[1:])
    time.sleep(1)
    path = mount("", folder=tmp_path).path / bucket
    assert len(os.listdir(path)) == len(names)
    assert (path / names[-1]).exists()

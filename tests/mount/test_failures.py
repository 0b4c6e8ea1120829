"""A full bucket, a sealed one, a server that goes away, and a daemon that is told to end."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import Client, Mount, Mounter, Server, natsfs, noise, opened, raises, run, until

MEGABYTE = 1_000_000


@pytest.fixture
def small(client: Client) -> Iterator[str]:
    """A bucket of 4 MB."""
    client.create_bucket("small", max_bytes=4 * MEGABYTE)
    yield "small"
    client.delete_bucket("small")


@pytest.mark.semantics("errors-of-the-store")
def test_a_full_bucket(small: str, mount: Mounter, client: Client) -> None:
    """Writing gives ENOSPC at close or fsync, what was there stays whole, and rm makes room again."""
    mounted = mount(f"/{small}", "purge_grace=0")
    mounted.allow("maximum bytes exceeded|full|insufficient|ENOSPC|No space")
    mounted.allow_failed()
    root = mounted.path
    (root / "first").write_bytes(noise(3 * MEGABYTE))
    fd = os.open(root / "second", os.O_WRONLY | os.O_CREAT)
    with raises(errno.ENOSPC):
        os.write(fd, noise(2 * MEGABYTE, 1))
        os.fsync(fd)
    os.close(fd)
    assert os.listdir(root) == ["first"]
    with raises(errno.ENOSPC):
        (root / "third").write_bytes(noise(2 * MEGABYTE, 2))
    assert os.listdir(root) == ["first"]
    assert client.read(small, "first") == noise(3 * MEGABYTE)
    assert len(mounted.failed()) == 2
    (root / "first").unlink()
    (root / "third").write_bytes(noise(3 * MEGABYTE, 2))
    assert client.read(small, "third") == noise(3 * MEGABYTE, 2)
    until(lambda: len(client.chunks(small)) == 1, what="no chunk of a failed upload stays")


@pytest.mark.semantics("full-bucket")
def test_removing_from_a_bucket_without_any_room(small: str, mount: Mounter, client: Client) -> None:
    """Not even a tombstone fits; rm works all the same."""
    mounted = mount(f"/{small}")
    (mounted.path / "f").write_bytes(noise(2 * MEGABYTE))
    (mounted.path / "g").write_bytes(noise(1 * MEGABYTE))
    left = 4 * MEGABYTE - client.info(small)["state"]["bytes"]
    # Fill it up to the last bytes: messages have a few dozen bytes of their own.
    while left > 0:
        try:
            client.publish_chunk(small, "FILLER", bytes(min(left, 100_000) if left > 200 else 0))
        except Exception:
            left = left * 3 // 4
            if left < 50:
                break
        else:
            left = 4 * MEGABYTE - client.info(small)["state"]["bytes"]
    (mounted.path / "f").unlink()
    assert os.listdir(mounted.path) == ["g"]
    assert client.names(small) == {"g"}
    assert client.read(small, "g") == noise(1 * MEGABYTE)


def test_overwriting_in_a_nearly_full_bucket(small: str, mount: Mounter, client: Client) -> None:
    """The chunks that wait for their grace time are given up when the room is needed."""
    mounted = mount(f"/{small}", "purge_grace=1h")
    for number in range(6):
        (mounted.path / "f").write_bytes(noise(1_500_000, number))
    assert client.read(small, "f") == noise(1_500_000, 5)


@pytest.mark.semantics("errors-of-the-store")
def test_an_account_that_may_not_write(mount: Mounter) -> None:
    """EACCES for everything that changes something, and reading works."""
    allowed = '["$JS.API.>", "$O.open.>", "_INBOX.>"]'
    server = Server(
        f"authorization {{ users: [{{ user: all, password: all }}, {{ user: u, password: u, "
        f"permissions: {{ publish: {allowed} }} }}] }}\nno_auth_user: u\n"
    )
    server.start()
    client = Client(server.url.replace("//", "//all:all@"))
    try:
        for name in ("open", "closed"):
            client.create_bucket(name)
            client.put(name, "f", b"content")
        mounted = mount(server=server)
        mounted.allow("[Pp]ermissions [Vv]iolation|could not be committed|ermission")
        mounted.allow_failed()
        (mounted.path / "open/g").write_bytes(b"x")
        closed = mounted.path / "closed"
        assert (closed / "f").read_bytes() == b"content"
        for call in (
            lambda: (closed / "g").write_bytes(b"x"),
            lambda: (closed / "d").mkdir(),
            lambda: (closed / "f").unlink(),
            lambda: (closed / "f").rename(closed / "g"),
            lambda: (closed / "f").chmod(0o600),
            lambda: os.setxattr(closed / "f", "user.a", b"b"),
        ):
            with raises(errno.EACCES):
                call()
        assert os.listdir(closed) == ["f"]
        assert (closed / "f").stat().st_mode & 0o777 == 0o644
        assert mounted.finish() == []
    finally:
        client.close()
        server.close()


@pytest.mark.semantics("full-account")
def test_an_account_at_its_limit(mount: Mounter) -> None:
    """EDQUOT, for content and for a bucket; removing goes on to work and makes room."""
    server = Server(
        "accounts { A { jetstream { max_file: 4MB, max_streams: 1 }, users: [{ user: a, password: a }] } }\n"
        "no_auth_user: a\n"
    )
    server.start()
    try:
        server.client.create_bucket("b")
        mounted = mount(server=server)
        mounted.allow("account is at its limit")
        mounted.allow_failed()
        with raises(errno.EDQUOT):
            (mounted.path / "c").mkdir()
        root = mounted.path / "b"
        (root / "f").write_bytes(noise(2_500_000))
        with raises(errno.EDQUOT):
            (root / "g").write_bytes(noise(2_500_000))
        assert os.listdir(root) == ["f"]
        assert (root / "f").read_bytes() == noise(2_500_000)
        (root / "f").unlink()
        (root / "g").write_bytes(noise(2_500_000))
        assert mounted.finish() == []
    finally:
        server.close()


@pytest.mark.semantics("errors-of-the-store")
def test_a_sealed_bucket(bucket: str, mount: Mounter, client: Client) -> None:
    """EROFS for every change; reading works."""
    client.put(bucket, "f", b"data")
    client.change_bucket(bucket, sealed=True, deny_delete=True, deny_purge=True, allow_rollup_hdrs=False)
    mounted = mount(f"/{bucket}")
    mounted.allow("read-only|sealed")
    root = mounted.path
    assert (root / "f").read_bytes() == b"data"
    for change in (
        lambda: (root / "f").write_bytes(b"x"),
        lambda: (root / "new").touch(),
        lambda: (root / "f").unlink(),
        lambda: (root / "d").mkdir(),
        lambda: (root / "f").rename(root / "g"),
        lambda: (root / "f").chmod(0o600),
    ):
        with raises(errno.EROFS):
            change()
    assert (root / "f").read_bytes() == b"data"


def test_a_bucket_that_is_sealed_meanwhile(bucket: str, mount: Mounter, client: Client) -> None:
    """Sealed by another client while it is mounted: EROFS at the next close at the latest."""
    mounted = mount(f"/{bucket}")
    mounted.allow("read-only|sealed")
    (mounted.path / "f").write_bytes(b"data")
    client.change_bucket(bucket, sealed=True, deny_delete=True, deny_purge=True, allow_rollup_hdrs=False)
    with raises(errno.EROFS):
        (mounted.path / "f").unlink()
    with raises(errno.EROFS):
        (mounted.path / "new").mkdir()
    assert (mounted.path / "f").read_bytes() == b"data"


LOST = "is lost|is back|interrupted|starts again|NATS connection|could not be (read|compared)|waits:|out of reach"


@pytest.mark.semantics("server-away")
def test_a_pause_of_the_server_during_a_copy(fresh_server: Server, mount: Mounter, tmp_path: Path) -> None:
    """The server stops for three seconds in the middle of `cp`: the copy succeeds and is right."""
    client = fresh_server.client
    client.create_bucket("b")
    mounted = mount("/b", "timeout=60", server=fresh_server)
    mounted.allow(LOST)
    data = noise(60 * MEGABYTE)
    (tmp_path / "source").write_bytes(data)
    with subprocess.Popen(
        ["cp", tmp_path / "source", mounted.path / "copy"], stdin=subprocess.DEVNULL
    ) as copy:
        until(lambda: client.chunks("b"), 20, "the copy has begun")
        fresh_server.stop()
        time.sleep(3)
        fresh_server.start()
        assert copy.wait(90) == 0
    assert (mounted.path / "copy").read_bytes() == data
    client.run(client.connection.flush(30))
    assert client.read("b", "copy") == data
    # Changes are seen again, by a watch that was made anew.
    client.put("b", "later", b"x")
    until(lambda: (mounted.path / "later").exists(), 10)
    assert mounted.finish() == []


@pytest.mark.semantics("server-away")
def test_changes_during_a_pause_are_seen(fresh_server: Server, mount: Mounter) -> None:
    """What was deleted, put and renamed while the watch was down shows up after the restart."""
    client = fresh_server.client
    client.create_bucket("b")
    client.put("b", "gone", b"x")
    client.put("b", "old", b"y")
    mounted = mount("/b", server=fresh_server)
    mounted.allow(LOST)
    assert sorted(os.listdir(mounted.path)) == ["gone", "old"]
    assert (mounted.path / "old").read_bytes() == b"y"
    fresh_server.stop()
    assert sorted(os.listdir(mounted.path)) == ["gone", "old"]
    assert (mounted.path / "old").read_bytes() == b"y"
    fresh_server.start()
    client.run(client.connection.flush(30))
    client.delete("b", "gone")
    client.rename("b", "old", "new")
    client.put("b", "more", b"z")
    until(lambda: sorted(os.listdir(mounted.path)) == ["more", "new"], 10)
    assert (mounted.path / "new").read_bytes() == b"y"
    assert mounted.finish() == []


@pytest.mark.semantics("kept-on-failure")
def test_the_server_is_gone_for_good(fresh_server: Server, mount: Mounter) -> None:
    """close(2) fails within the time limit, the data is kept with a manifest, and umount says so."""
    fresh_server.client.create_bucket("b")
    mounted = mount("/b", "timeout=2", server=fresh_server)
    mounted.allow(LOST)
    mounted.allow_failed()
    data = noise(3 * MEGABYTE)
    fd = os.open(mounted.path / "f", os.O_WRONLY | os.O_CREAT, 0o640)
    os.write(fd, data[:MEGABYTE])
    fresh_server.stop()
    os.write(fd, data[MEGABYTE:])
    started = time.monotonic()
    with pytest.raises(OSError) as error:
        os.close(fd)
    assert time.monotonic() - started < 15
    assert error.value.errno in (errno.EIO, errno.ETIMEDOUT)
    (manifest,) = mounted.failed()
    assert (manifest["bucket"], manifest["name"], manifest["size"]) == ("b", "f", len(data))
    assert Path(manifest["data"]).read_bytes() == data
    assert not (mounted.path / "f").exists()
    with pytest.raises(OSError):
        (mounted.path / "d").mkdir()
    done = mounted.umount(status=1)
    assert "b/f" in done.stderr
    assert str(manifest["data"]) in done.stderr
    assert mounted.finish() == []


def test_unmounting_without_a_server(fresh_server: Server, mount: Mounter) -> None:
    """Nothing was dirty: umount ends in time and without an error."""
    fresh_server.client.create_bucket("b")
    mounted = mount("/b", "timeout=2", server=fresh_server)
    mounted.allow(LOST)
    (mounted.path / "f").write_bytes(b"x")
    fresh_server.stop()
    mounted.umount(limit=30)
    assert mounted.finish() == []


@pytest.mark.semantics("commit")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_commits_what_is_open(
    bucket: str, mount: Mounter, client: Client, number: signal.Signals
) -> None:
    """The daemon gets a signal while a file is open and dirty: its data is in the store, and all is taken down."""
    mounted = mount(f"/{bucket}")
    data = noise(2_500_000)
    fd = os.open(mounted.path / "f", os.O_WRONLY | os.O_CREAT)
    try:
        os.write(fd, data)
        os.kill(mounted.pid, number)
        mounted.wait()
        assert client.read(bucket, "f") == data
        assert not mounted.is_mounted
    finally:
        # The connection to the kernel is gone; what it says then is not the point here.
        with contextlib.suppress(OSError):
            os.close(fd)
    assert mounted.finish() == []


def test_umount_of_a_busy_mount(root: Path) -> None:
    """EBUSY while a file is open; the file and the mount go on."""
    with opened(root / "f", os.O_WRONLY | os.O_CREAT) as fd:
        done = natsfs("umount", root)
        assert done.returncode != 0
        assert "busy" in done.stderr
        os.write(fd, b"still here")
    assert (root / "f").read_bytes() == b"still here"


@pytest.mark.semantics("commit")
def test_umount_after_many_writes(bucket: str, mount: Mounter, client: Client) -> None:
    """Everything that was closed is in the store when umount returns, nothing stays on the machine."""
    mounted = mount(f"/{bucket}")
    for number in range(50):
        (mounted.path / f"f{number}").write_bytes(noise(20_000, number))
    mounted.umount()
    assert not mounted.is_running
    for number in range(50):
        assert client.read(bucket, f"f{number}") == noise(20_000, number)
    assert client.consumers(bucket) == []


def test_foreign_rubbish_does_not_end_the_daemon(bucket: str, mount: Mounter, client: Client) -> None:
    """Messages that are no metadata are passed over; the rest of the bucket works."""
    mounted = mount(f"/{bucket}")
    mounted.allow("passed over")
    (mounted.path / "f").write_bytes(b"x")
    for body in (
        b"",
        b"no json",
        b"[]",
        b"null",
        b"{}",
        b'{"name": 7}',
        b'{"name": "a", "size": -1}',
        b"\xff" * 9,
    ):
        client.run(client.js.publish(f"$O.{bucket}.M.cnViYmlzaA==", body))
    client.run(client.js.publish(f"$O.{bucket}.M.not-base64!", b'{"name": "", "nuid": "x"}'))
    client.put(bucket, "after", b"seen")
    until(lambda: (mounted.path / "after").exists())
    assert (mounted.path / "f").read_bytes() == b"x"
    (mounted.path / "g").write_bytes(b"y")
    assert client.read(bucket, "g") == b"y"


def test_a_killed_daemon_and_the_next_mount(
    bucket: str, mount: Mounter, client: Client, tmp_path: Path
) -> None:
    """After SIGKILL the mount point is dead; mounting there again works and shows what was committed."""
    first = mount(f"/{bucket}", folder=tmp_path)
    (first.path / "f").write_bytes(b"committed")
    until(lambda: not first.spooled())
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    with pytest.raises(OSError) as error:
        os.listdir(first.path)
    assert error.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    second = mount(f"/{bucket}", folder=tmp_path)
    assert (second.path / "f").read_bytes() == b"committed"
    # The killed daemon could not take its consumer with it; the server drops it by itself.
    until(lambda: len(client.consumers(bucket)) == 1, 20, "only the living daemon has a consumer")
    assert second.finish() == []
    assert first.finish() == []


def test_reading_an_object_whose_chunks_are_gone(bucket: str, mount: Mounter, client: Client) -> None:
    """An error, never zeros and never a wait without end."""
    client.put(bucket, "f", noise(500_000))
    mounted = mount(f"/{bucket}")
    mounted.allow("chunks of 'f' are gone|chunk|f")
    nuid = client.stored(bucket, "f")["nuid"]
    client.api(f"STREAM.PURGE.OBJ_{bucket}", {"filter": f"$O.{bucket}.C.{nuid}"})
    started = time.monotonic()
    with pytest.raises(OSError) as error:
        (mounted.path / "f").read_bytes()
    assert error.value.errno == errno.EIO
    assert time.monotonic() - started < 10


@pytest.mark.semantics("expired")
def test_an_expired_object(mount: Mounter, client: Client) -> None:
    """The name goes when the bucket's max_age is over, though nothing tells of it; reading it before gives ENOENT."""
    client.create_bucket("aging", max_age=3_000_000_000, duplicate_window=1_000_000_000)
    try:
        mounted = mount("/aging")
        root = mounted.path
        client.put("aging", "foreign", b"x")
        (root / "own").write_bytes(b"x")
        client.put("aging", "renewed", noise(300_000))
        until(lambda: len(os.listdir(root)) == 3)
        time.sleep(2)
        (root / "renewed").chmod(0o600)  # its metadata is younger than its chunks from now on
        until(lambda: not {"own", "foreign"} & set(os.listdir(root)), limit=10)
        with raises(errno.ENOENT):
            (root / "renewed").read_bytes()
        with raises(errno.ENOENT):
            (root / "own").stat()
        until(lambda: os.listdir(root) == [], limit=10)
        (root / "own").write_bytes(b"again")
        assert (root / "own").read_bytes() == b"again"
        assert mounted.finish() == []
    finally:
        client.delete_bucket("aging")


@pytest.mark.semantics("digest-checked")
def test_a_damaged_object(bucket: str, mount: Mounter, client: Client) -> None:
    """Content that does not fit its digest is not handed out silently when it is read from start to end."""
    data = noise(300_000)
    client.put(bucket, "f", data, {"digest": "SHA-256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU="})
    mounted = mount(f"/{bucket}")
    mounted.allow("digest")
    with pytest.raises(OSError) as error:
        (mounted.path / "f").read_bytes()
    assert error.value.errno == errno.EIO


def test_a_full_spool(bucket: str, mount: Mounter, client: Client) -> None:
    """-o spool_size: writing more than that is ENOSPC, the log says of what, and the mount works on."""
    mounted = mount(f"/{bucket}", "spool_size=2M")
    with opened(mounted.path / "f", os.O_WRONLY | os.O_CREAT) as fd:
        with raises(errno.ENOSPC):
            for _ in range(4):
                os.write(fd, bytes(1_000_000))
        full = f"nothing can be written in {mounted.spool}: the spool is full"
        assert full in mounted.log.read_text()
        mounted.allow(full)
        os.ftruncate(fd, 1000)
    (mounted.path / "g").write_bytes(noise(1_500_000))
    assert client.read(bucket, "g") == noise(1_500_000)


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, for the spool of a mount in its parent."""
    folder = tmp_path / "mount" / "spool"
    folder.mkdir(mode=0o700, parents=True)
    run("mount", "-t", "tmpfs", "-o", "size=1M,mode=700", "tmpfs", folder)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.semantics("full-spool")
def test_a_full_disk_under_the_spool(tiny: Path, bucket: str, mount: Mounter, client: Client) -> None:
    """A write gets ENOSPC, at the latest the one after those in memory; what was taken in is read, and stored."""
    mounted = mount(f"/{bucket}", folder=tiny.parent)
    mounted.allow("(does not take what was written|nothing can be written in .*): .*No space left")
    data = noise(2 * MEGABYTE)
    with opened(mounted.path / "f", os.O_RDWR | os.O_CREAT) as fd:
        size = 0
        with raises(errno.ENOSPC):
            while size < len(data):
                size += os.write(fd, data[size : size + 4096])
        assert size > 900_000
        with raises(errno.ENOSPC):
            os.write(fd, b"more")
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, len(data), 0) == data[:size]
        os.fsync(fd)
        assert client.read(bucket, "f") == data[:size]
        os.ftruncate(fd, 10)
        os.pwrite(fd, b"more", 10)
    assert client.read(bucket, "f") == data[:10] + b"more"


@pytest.mark.semantics("full-spool")
def test_a_full_disk_and_a_store_that_refuses(
    tiny: Path, bucket: str, mount: Mounter, client: Client
) -> None:
    """Then close says so. What the disk does not take of what was written at last is lost; the log names it."""
    mounted = mount(f"/{bucket}", folder=tiny.parent)
    mounted.allow("spool folder|are lost|cannot be described|sealed")
    mounted.allow_failed()
    data = noise(200_000)
    with raises(errno.EROFS), opened(mounted.path / "f", os.O_WRONLY | os.O_CREAT) as fd:
        os.write(fd, data[:100_000])
        until(lambda: 100_000 in [path.stat().st_size for path in mounted.spooled()])
        (tiny / "other").write_bytes(bytes((1 << 20) - 160_000))
        client.change_bucket(bucket, sealed=True)
        os.write(fd, data[100_000:])
    (kept,) = [path for path in mounted.spooled() if not path.suffix]
    front = kept.stat().st_size
    assert 100_000 < front < len(data)
    assert kept.read_bytes() == data[:front]
    assert f"bytes {front}-{len(data) - 1} of f are lost" in mounted.log.read_text()
    kept.unlink()
    kept.with_suffix(".json").unlink(missing_ok=True)
    (tiny / "other").unlink()


@pytest.mark.semantics("own-changes")
def test_many_threads_do_everything_at_once(folder: Path, shared: Mount, client: Client) -> None:
    """Eight threads create, rename, chmod, read and remove in one directory; the store agrees afterwards."""
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(25):
                path = folder / f"t{number}-{step}"
                path.write_bytes(noise(3000, step))
                path.chmod(0o600)
                path.rename(folder / f"r{number}-{step}")
                assert (folder / f"r{number}-{step}").read_bytes() == noise(3000, step)
                if step % 2:
                    (folder / f"r{number}-{step}").unlink()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    expected = {f"r{number}-{step}" for number in range(8) for step in range(0, 25, 2)}
    assert set(os.listdir(folder)) == expected
    assert client.names(folder.name) == expected
    run("ls", "-l", folder)

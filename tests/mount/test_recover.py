"""What a mount could not store, or a killed daemon had not stored, comes back by `natsfs recover`."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from natsfs.files.manifest import Manifest
from tests.mount.test_failures import LOST
from tests.support import Client, Mount, Mounter, Server, natsfs, noise, opened, raises, until


def recover(mounted: Mount, *words: str | Path, status: int = 0) -> str:
    """What `natsfs recover` has printed."""
    done = natsfs("recover", "--spool-dir", mounted.spool, *words)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def told(mounted: Mount) -> list[str]:
    """The command that umount tells for the one file that could not be saved."""
    line = mounted.umount(status=1).stderr.strip()
    assert "\n" not in line
    return line.rpartition("to copy it out: natsfs ")[2].split(" ")


@pytest.mark.semantics("recover", "recover-whole", "building-on-old-fails")
@pytest.mark.parametrize("kind", ["small", "large"])
def test_a_conflict(bucket: str, mount: Mounter, client: Client, tmp_path: Path, kind: str) -> None:
    """ESTALE at close; the command that umount tells gives back the file as its writer saw it.

    The other client removes what it replaces at once: what was not written comes from what the mount has read before.
    """
    mounted = mount(f"/{bucket}")
    mounted.allow("replaced by somebody else|chunks of 'd/f' are gone")
    mounted.allow_failed()
    mine = bytearray(noise(3000 if kind == "small" else 3_000_000))
    client.put(bucket, "d/f", bytes(mine), {"metadata": {"mode": "100640"}})
    file = mounted.path / "d" / "f"
    until(file.exists)
    fd = os.open(file, os.O_RDWR)
    assert os.pread(fd, len(mine), 0) == mine
    end = len(mine)
    mine += bytes(5004)
    for at in (1000, 2500, end + 5000):
        os.pwrite(fd, b"mine", at)
        mine[at : at + 4] = b"mine"
    client.put(bucket, "d/f", b"theirs")
    modified = os.fstat(fd).st_mtime_ns
    with raises(errno.ESTALE):
        os.close(fd)
    (line,) = recover(mounted).splitlines()
    assert f"  {mounted.server.url}/{bucket}/d/f  'd/f' was replaced by somebody else meanwhile" in line
    words = told(mounted)
    assert words[-1] == "DIR"
    done = natsfs(*words[:-1], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "f").read_bytes() == mine
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "f").stat().st_mtime_ns == modified
    recover(mounted, "--remove", line.split()[0])
    assert recover(mounted) == f"natsfs: nothing is kept in {mounted.spool}\n"


@pytest.mark.semantics("recover-whole")
def test_the_rest_comes_from_the_store(fresh_server: Server, mount: Mounter, tmp_path: Path) -> None:
    """The server was away: nothing could be fetched then; while it still is, what is missing is said, and later it is
    not missing."""
    client = fresh_server.client
    client.create_bucket("b")
    mounted = mount("/b", "timeout=2", server=fresh_server)
    mounted.allow(LOST)
    mounted.allow_failed()
    mine = bytearray(noise(300_000))
    (mounted.path / "f").write_bytes(mine)
    fd = os.open(mounted.path / "f", os.O_WRONLY)
    fresh_server.stop()
    os.pwrite(fd, b"mine", 200_000)
    mine[200_000:200_004] = b"mine"
    os.ftruncate(fd, 250_000)
    del mine[250_000:]
    with pytest.raises(OSError):
        os.close(fd)
    assert "written: 4, the rest is in the version before" in recover(mounted)
    copy = tmp_path / "f"
    out = recover(mounted, "--all", "--to", tmp_path, "--remove", status=1)
    assert "bytes 0-199999, 200004-249999 are zeros in the copy" in out
    assert copy.read_bytes() == bytes(200_000) + b"mine" + bytes(49_996)
    fresh_server.start()
    client.run(client.connection.flush(30))
    recover(mounted, "--all", "--to", tmp_path, "--force", "--remove")
    assert copy.read_bytes() == mine
    assert recover(mounted) == f"natsfs: nothing is kept in {mounted.spool}\n"
    assert mounted.finish() == []


@pytest.mark.semantics("recover-whole")
def test_the_rest_comes_from_a_server_with_a_login(
    mount: Mounter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file did not fit the spool and the bucket takes no more: its version is in the store, behind a password."""
    server = Server("authorization { user: u, password: secret }\n")
    server.start()
    try:
        server._connected = client = Client(server.url.replace("//", "//u:secret@"))
        client.create_bucket("b")
        mine = bytearray(noise(3_000_000))
        client.put("b", "f", bytes(mine))
        monkeypatch.setenv("NATSFS_PASSWORD", "secret")
        mounted = mount("/b", "user=u", "spool_size=1M", server=server)
        mounted.allow("sealed|read-only")
        mounted.allow_failed()
        fd = os.open(mounted.path / "f", os.O_WRONLY)
        os.pwrite(fd, b"mine", 2_500_000)
        mine[2_500_000:2_500_004] = b"mine"
        client.change_bucket("b", sealed=True)
        with raises(errno.EROFS):
            os.close(fd)
        assert "secret" not in mounted.failed()[0]["data"].with_suffix(".json").read_text()
        recover(mounted, "--all", "--to", tmp_path)
        assert (tmp_path / "f").read_bytes() == mine
        monkeypatch.delenv("NATSFS_PASSWORD")
        out = recover(mounted, "--all", "--to", tmp_path, "--force", status=1)
        assert "user=u has no password: give password_file=FILE or set NATSFS_PASSWORD" in out
        (tmp_path / "password").write_text("secret\n")
        login = f"user=u,password_file={tmp_path}/password"
        recover(mounted, "--all", "--to", tmp_path, "--force", "-o", login)
        assert (tmp_path / "f").read_bytes() == mine
        assert mounted.finish() == []
    finally:
        server.close()


def note_of(mounted: Mount, name: str) -> Manifest | None:
    for path in (mounted.spool / f"mount-{mounted.pid}").glob("*.json"):
        with contextlib.suppress(FileNotFoundError):
            note = Manifest.decode(path.read_text())
            if note.name == name:
                return note
    return None


def rested(mounted: Mount, name: str, *, extents: int) -> bool:
    """Whether the daemon has noted what it holds of a file, in so many pieces, and since when that rests."""
    note = note_of(mounted, name)
    return note is not None and len(note.segments or ()) == extents and note.fits(note.modified_ns)


@pytest.mark.semantics("recover-after-a-kill")
def test_a_killed_daemon(fresh_server: Server, mount: Mounter, tmp_path: Path) -> None:
    """New files, changes of stored ones and what is stored already are told apart, by their names.

    Without the server, so that nothing is committed because it rests. No program is started meanwhile: the fork would
    close its copies of the descriptors, and that commits.
    """
    client = fresh_server.client
    client.create_bucket("b")
    changed = bytearray(noise(300_000))
    client.put("b", "changed", bytes(changed))
    first = mount("/b", server=fresh_server, folder=tmp_path / "mount")
    first.allow(LOST)
    fds = [
        os.open(first.path / "new", os.O_WRONLY | os.O_CREAT, 0o600),
        os.open(first.path / "changed", os.O_WRONLY),
        os.open(first.path / "stored", os.O_WRONLY | os.O_CREAT),
    ]
    try:
        os.write(fds[2], noise(1000))
        os.fsync(fds[2])
        fresh_server.stop()
        for fd in fds[:2]:
            os.pwrite(fd, b"first", 70_000)
        os.pwrite(fds[2], b"then", 0)
        until(lambda: all(note_of(first, name) for name in ("new", "changed", "stored")), limit=10)
        for fd in fds[:2]:
            os.pwrite(fd, b"later", 80_000)
        changed[70_000:70_005], changed[80_000:80_005] = b"first", b"later"
        until(lambda: rested(first, "changed", extents=5), limit=10)
        until(lambda: rested(first, "stored", extents=1), limit=10)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    finally:
        for fd in fds:
            with raises(errno.ENOTCONN, errno.ECONNABORTED):
                os.close(fd)
    fresh_server.start()
    client.run(client.connection.flush(30))
    second = mount("/b", server=fresh_server, folder=tmp_path / "mount")
    lines = {line.split()[4].rpartition("/")[2]: line for line in recover(second).splitlines()}
    assert lines["new"].endswith("its daemon ended before this was saved")
    assert lines["changed"].endswith("saved; written: 10, the rest is in the version before")
    recover(second, "--all", "--to", tmp_path / "out", "--remove")
    assert (tmp_path / "out" / "new").read_bytes() == bytes(70_000) + b"first" + bytes(9995) + b"later"
    assert (tmp_path / "out" / "new").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "out" / "changed").read_bytes() == changed
    assert (tmp_path / "out" / "stored").read_bytes() == b"then" + noise(1000)[4:]
    assert [path.name for path in second.spool.glob("mount-*")] == [f"mount-{second.pid}"]
    assert second.finish() == []
    assert first.finish() == []


@pytest.mark.semantics("recover-after-a-kill")
def test_what_a_killed_daemon_had_saved(bucket: str, mount: Mounter, client: Client, tmp_path: Path) -> None:
    """Its file was still open: the list says that it is in the store."""
    first = mount(f"/{bucket}", folder=tmp_path / "mount")
    with raises(errno.ENOTCONN, errno.ECONNABORTED), opened(first.path / "f", os.O_WRONLY | os.O_CREAT) as fd:
        os.write(fd, noise(5000))
        until(lambda: note_of(first, "f"), limit=10)
        os.fsync(fd)
        until(lambda: (note := note_of(first, "f")) and note.saved and note.fits(note.modified_ns), limit=10)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    assert recover(first).rstrip().endswith("/f  is in the store; its daemon ended before it was closed")
    recover(first, "--all", "--to", tmp_path / "out", "--remove")
    assert (tmp_path / "out" / "f").read_bytes() == client.read(bucket, "f") == noise(5000)
    for consumer in client.consumers(bucket):
        client.api(f"CONSUMER.DELETE.OBJ_{bucket}.{consumer['name']}")
    assert first.finish() == []


def test_notes_go_with_what_they_are_of(shared: Mount, folder: Path) -> None:
    """After the last close nothing is left; a file that never stays open has no note."""
    with opened(folder / "f", os.O_WRONLY | os.O_CREAT) as fd:
        os.write(fd, b"x" * 1000)
        until(lambda: note_of(shared, "f"), limit=10)
    until(lambda: not note_of(shared, "f"))


@pytest.mark.semantics("recover-after-a-kill")
def test_small_writes_are_on_the_disk_soon(fresh_server: Server, mount: Mounter, tmp_path: Path) -> None:
    """Of a file that waits for its commit, with a note or not yet, and of one without a name. A kill leaves them."""
    client = fresh_server.client
    client.create_bucket("b")
    mounted = mount("/b", server=fresh_server)
    mounted.allow(LOST)
    data = noise(60_000)

    def there(content: bytes) -> bool:
        return [path.read_bytes() for path in mounted.spooled() if not path.suffix] == [content] * 2

    fds = [os.open(mounted.path / name, os.O_RDWR | os.O_CREAT) for name in ("f", "gone")]
    try:
        (mounted.path / "gone").unlink()
        fresh_server.stop()
        for end in (30_000, 60_000):
            for start in range(end - 30_000, end, 1000):
                for fd in fds:
                    os.pwrite(fd, data[start : start + 1000], start)
            until(partial(there, data[:end]), limit=10)
            until(lambda: note_of(mounted, "f"), limit=10)
        os.kill(mounted.pid, signal.SIGKILL)
        mounted.wait()
    finally:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)
    recover(mounted, "--all", "--to", tmp_path / "out", "--remove")
    assert sorted(path.read_bytes() for path in (tmp_path / "out").iterdir()) == [data] * 2
    assert (tmp_path / "out" / "f").read_bytes() == data
    fresh_server.start()
    assert mounted.finish() == []

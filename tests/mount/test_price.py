"""The price of a commit is the whole file: when there is one, and what all of them upload."""

from __future__ import annotations

import mmap
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import Client, Mounter, noise, opened, until


def stored_bytes(client: Client, bucket: str) -> int:
    return int(client.info(bucket)["state"]["bytes"])


@pytest.mark.semantics("commit-price", "close-duplicate")
def test_a_hundred_children_write_into_one_redirected_file(
    bucket: str, mount: Mounter, client: Client
) -> None:
    """Each child closes its standard output; what is uploaded stays within a few times the final size."""
    root = mount(f"/{bucket}", "purge_grace=3600").path
    script = "for i in $(seq 100); do dd if=/dev/zero bs=5000 count=1 status=none; done"
    with (root / "f").open("wb") as output:
        subprocess.run(["sh", "-c", script], stdout=output, check=True)
    size = (root / "f").stat().st_size
    assert size == 500_000
    assert client.read(bucket, "f") == bytes(size), "complete when the last close has returned"
    assert stored_bytes(client, bucket) <= 5 * size


@pytest.mark.semantics("close-duplicate")
def test_the_last_close_stores_whatever_came_before(folder: Path, client: Client) -> None:
    """Only a close that is sure to be followed by another one may leave something to that."""
    fd = os.open(folder / "f", os.O_WRONLY | os.O_CREAT)
    written = 0
    for number in range(30):
        duplicate = os.dup(fd)
        written += os.write(duplicate, b"%d" % (number % 10) * 10_000)
        os.close(duplicate)
    duplicate = os.dup(fd)
    os.close(fd)
    written += os.write(duplicate, b"end")
    os.close(duplicate)
    stored = client.read(folder.name, "f")
    assert len(stored) == written
    assert stored.endswith(b"9end")


@pytest.mark.semantics("close-duplicate", "fsync")
def test_fsync_stores_at_once_however_often(folder: Path, client: Client) -> None:
    with opened(folder / "f", os.O_WRONLY | os.O_CREAT) as fd:
        for number in range(1, 6):
            os.write(fd, b"x" * 50_000)
            os.fsync(fd)
            assert len(client.read(folder.name, "f")) == 50_000 * number


@pytest.mark.semantics("long-open")
def test_a_file_that_stays_open_is_stored_when_it_rests(folder: Path, client: Client) -> None:
    """A log that nobody closes is seen by others some seconds after it was last written."""
    with opened(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND) as fd:
        os.write(fd, b"x" * 100_000)
        assert client.meta(folder.name, "log") is None
        until(lambda: client.meta(folder.name, "log"), limit=20)
        assert client.read(folder.name, "log") == b"x" * 100_000
        os.write(fd, b"more")
    assert client.read(folder.name, "log") == b"x" * 100_000 + b"more"


@pytest.mark.semantics("mapping-failure")
def test_a_mapping_that_is_stored_after_the_last_close(bucket: str, mount: Mounter, client: Client) -> None:
    """What was stored through a mapping is committed when it goes; a failure then is in the log and the data kept."""
    mounted = mount(f"/{bucket}")
    path = mounted.path / "f"
    path.write_bytes(bytes(100_000))
    fd = os.open(path, os.O_RDWR)
    mapping = mmap.mmap(fd, 100_000)
    os.close(fd)
    mapping[10:14] = b"good"
    mapping.close()
    until(lambda: client.read(bucket, "f")[10:14] == b"good")
    fd = os.open(path, os.O_RDWR)
    mapping = mmap.mmap(fd, 100_000)
    os.close(fd)
    client.change_bucket(bucket, sealed=True)
    mounted.allow("could not be committed")
    mounted.allow("read-only")
    mounted.allow_failed()
    mapping[20:24] = b"late"
    mapping.close()
    kept = until(lambda: mounted.failed(), limit=20)
    assert kept[0]["name"] == "f"
    assert "read-only" in kept[0]["reason"]
    assert kept[0]["data"].read_bytes()[20:24] == b"late"
    until(lambda: path.read_bytes()[20:24] == bytes(4))


def test_a_small_write_is_one_request(bucket: str, mount: Mounter) -> None:
    """The kernel asks nothing else before a write: each request is one read(2) of the daemon."""
    mounted = mount(f"/{bucket}")

    def reads() -> int:
        return int(Path(f"/proc/{mounted.pid}/io").read_text().split("syscr: ")[1].split()[0])

    with opened(mounted.path / "f", os.O_WRONLY | os.O_CREAT) as fd:
        os.write(fd, b"x")
        before = reads()
        for number in range(500):
            os.pwrite(fd, bytes(4096), number * 4096)
        assert 500 <= reads() - before < 600


@pytest.mark.semantics("commit-price")
def test_what_was_committed_does_not_go_out_again_at_rest(
    bucket: str, mount: Mounter, client: Client
) -> None:
    """A change in the middle of a large file uploads it once, at the next fsync, and however long it rests before."""
    with opened(mount(f"/{bucket}", "purge_grace=3600").path / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, noise(4 << 20))
        os.fsync(fd)
        os.pwrite(fd, b"change", 1000)
        time.sleep(2.0)
        assert sum(client.chunks(bucket).values()) == 4 * 8
        os.pwrite(fd, b"another", 2000)
        os.fsync(fd)
        assert sum(client.chunks(bucket).values()) == 2 * 4 * 8


def test_what_is_written_in_small_pieces_goes_out_in_a_go(
    bucket: str, mount: Mounter, client: Client
) -> None:
    """Not while the program writes without a pause, but before the close where it takes its time or rests."""
    data = noise(8 << 20)

    def write(fd: int, start: int, end: int) -> None:
        for at in range(start, end, 4096):
            os.write(fd, data[at : at + 4096])

    with opened(mount(f"/{bucket}").path / "f", os.O_WRONLY | os.O_CREAT) as fd:
        write(fd, 0, 3 << 20)
        until(lambda: sum(client.chunks(bucket).values()) == 3 * 8, 5)
        stored = 0
        for start in range(3 << 20, 8 << 20, 1 << 18):  # never at rest for long
            stored = sum(client.chunks(bucket).values())
            write(fd, start, start + (1 << 18))
            time.sleep(0.1)
        assert stored >= 5 * 8
    assert client.read(bucket, "f") == data

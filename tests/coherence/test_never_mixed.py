"""A reader sees one version of an object from open(2) to close(2), or is told that it is gone."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.coherence.test_seen_at_once import Writers, entry, whole
from tests.support import Client, Mount, Mounter, noise, opened, raises, until

MiB = 1024 * 1024


@pytest.fixture(params=["natsfs", "go", "rust", "javascript", "python"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.semantics("open-version-stays")
@pytest.mark.parametrize(("size", "flags"), [(1, os.O_RDONLY), (130_000, os.O_RDWR), (MiB, os.O_RDONLY)])
def test_a_small_file_stays_readable(
    folders: tuple[Path, Path],
    writers: Writers,
    mounts: tuple[Mount, Mount],
    kind: str,
    size: int,
    flags: int,
) -> None:
    """What is open is read to its end, although nothing of it was read before it was replaced, then deleted."""
    here, there = folders
    writer = writers(kind, mounts[1])
    old, new = noise(size, 1), noise(size, 2)
    (there / "f").write_bytes(old)
    until(lambda: (here / "f").exists())
    with opened(here / "f", flags) as fd:
        writer.put(here.name, "f", new)
        until(lambda: (here / "f").read_bytes() == new)
        assert os.pread(fd, size + 1, 0) == old
        assert os.fstat(fd).st_size == size
        with opened(here / "f", flags) as second:
            writer.delete(here.name, "f")
            until(lambda: not (here / "f").exists())
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(fd, size + 1, 0) == old
            assert os.pread(second, size + 1, 0) == new


@pytest.mark.semantics("open-version-stays")
def test_the_links_of_a_file_that_is_open(
    folders: tuple[Path, Path], writers: Writers, mounts: tuple[Mount, Mount], kind: str
) -> None:
    """fstat of a file that was replaced or removed elsewhere shows no link, until a commit gives it its name."""
    here, there = folders
    writer = writers(kind, mounts[1])
    (there / "f").write_bytes(b"old")
    until(lambda: (here / "f").exists())
    with opened(here / "f", os.O_RDWR) as fd:
        assert os.fstat(fd).st_nlink == 1
        writer.put(here.name, "f", b"new")
        until(lambda: os.fstat(fd).st_nlink == 0)
        assert (here / "f").stat().st_nlink == 1
        with opened(here / "f", os.O_WRONLY) as second:
            writer.delete(here.name, "f")
            until(lambda: not (here / "f").exists())
            until(lambda: os.fstat(second).st_nlink == 0)
            os.ftruncate(second, 0)
            os.write(second, b"again")
            os.fsync(second)
            assert os.fstat(second).st_nlink == 1
            assert (here / "f").stat().st_ino == os.fstat(second).st_ino
        assert os.fstat(fd).st_nlink == 0


@pytest.mark.semantics("one-version-or-estale")
def test_a_large_file_that_is_replaced(
    folders: tuple[Path, Path], writers: Writers, mounts: tuple[Mount, Mount], kind: str
) -> None:
    """In the middle of a reading the content is replaced: the old bytes to the end, or ESTALE; nothing else."""
    here, there = folders
    mounts[0].allow("are gone")
    writer = writers(kind, mounts[1])
    old, new = noise(20 * MiB, 1), noise(20 * MiB + 1, 2)
    (there / "f").write_bytes(old)
    until(lambda: (here / "f").exists())
    got = b""
    with opened(here / "f", os.O_RDONLY) as fd:
        got = os.read(fd, MiB)
        writer.put(here.name, "f", new)
        until(lambda: (here / "f").stat().st_size == len(new))
        try:
            while part := os.read(fd, 300_000):
                got += part
        except OSError as error:
            assert error.errno == errno.ESTALE  # noqa: PT017
            assert kind != "natsfs"  # which leaves the old version to its readers for a while
        else:
            assert len(got) == len(old)
    assert got == old[: len(got)]
    assert (here / "f").read_bytes() == new


@pytest.mark.semantics("replaced-versions-stay-for-readers")
def test_a_slow_reader_and_ten_replacements(folders: tuple[Path, Path]) -> None:
    """A reader of a large file finishes its version while another mount replaces the file ten times.

    No more than 12 MiB are read ahead, so after each replacement there are chunks that only the store has.
    """
    here, there = folders
    old = noise(24 * MiB, 1)
    (there / "f").write_bytes(old)
    until(lambda: (here / "f").exists())
    expected, got = hashlib.sha256(old).digest(), hashlib.sha256()
    with opened(here / "f", os.O_RDONLY) as fd:
        got.update(os.read(fd, 100_000))
        for number in range(10):
            (there / "f").write_bytes(noise(2 * MiB + number, number + 2))
            time.sleep(0.25)  # due purges are looked for once a second
            got.update(os.read(fd, MiB))
        until(lambda: (here / "f").stat().st_size == 2 * MiB + 9)
        while part := os.read(fd, MiB):
            got.update(part)
    assert got.digest() == expected
    assert (here / "f").read_bytes() == noise(2 * MiB + 9, 11)


@pytest.mark.semantics("replaced-versions-stay-for-readers")
def test_how_long_a_replaced_version_stays(
    folders: tuple[Path, Path], client: Client, mount: Mounter
) -> None:
    """Its chunks are in the store, for readers elsewhere, as long as `purge_grace` says; soon after they are not."""
    here, _ = folders
    grace = 4.0
    there = mount(f"/{here.name}", f"purge_grace={grace:g}").path
    old, new = noise(2 * MiB, 1), noise(2 * MiB, 2)
    (there / "f").write_bytes(old)
    until(lambda: (here / "f").exists())
    before = {*client.chunks(here.name)}
    with opened(here / "f", os.O_RDONLY) as fd:
        began = time.monotonic()
        (there / "f").write_bytes(new)
        assert {*client.chunks(here.name)} > before
        assert os.pread(fd, len(old), 0) == old
    until(lambda: not before & {*client.chunks(here.name)}, grace + 10)
    assert time.monotonic() - began >= grace
    assert client.read(here.name, "f") == new


@pytest.mark.semantics("digest-checked")
def test_a_content_that_is_not_what_its_digest_says(
    folders: tuple[Path, Path], client: Client, mounts: tuple[Mount, Mount]
) -> None:
    """A complete reading of content that does not match its digest fails, each time."""
    here, _ = folders
    mounts[0].allow("does not match its digest")
    for name, size in (("small", 1000), ("large", 5 * MiB)):
        client.put(here.name, name, noise(size), {"digest": "SHA-256=" + "A" * 43 + "="})
        until(lambda name=name: (here / name).exists())  # type: ignore[misc]
        for _ in range(2):
            with raises(errno.EIO):
                (here / name).read_bytes()


@pytest.mark.semantics("mappings-keep-their-version")
def test_a_mapping_keeps_its_version(
    folders: tuple[Path, Path], writers: Writers, mounts: tuple[Mount, Mount], kind: str
) -> None:
    """Pages of a mapped file are those of the version that was mapped, also where they are touched only later."""
    here, there = folders
    writer = writers(kind, mounts[1])
    old, new = noise(MiB, 1), noise(MiB, 2)
    (there / "f").write_bytes(old)
    until(lambda: (here / "f").exists())
    with opened(here / "f", os.O_RDONLY) as fd:
        mapping = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    try:
        assert mapping[:10] == old[:10]
        writer.put(here.name, "f", new)
        until(lambda: (here / "f").read_bytes() == new)
        assert mapping[:] == old
        writer.delete(here.name, "f")
        until(lambda: not (here / "f").exists())
        assert mapping[:] == old
    finally:
        mapping.close()


# Maps a file, touches its first page, and after a line of its input all others, from the last to the first.
MAPPER = """
import hashlib, mmap, resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
path, size = sys.argv[1], int(sys.argv[2])
expected = hashlib.shake_128((1).to_bytes(8, "big")).digest(size)
with open(path, "rb") as file:
    mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
print(mapping[:4096] == expected[:4096], flush=True)
sys.stdin.readline()
for start in reversed(range(0, size, 4096)):
    if mapping[start : start + 4096] != expected[start : start + 4096]:
        sys.exit(f"other bytes at {start}")
"""


@pytest.mark.semantics("mappings-keep-their-version")
def test_a_mapping_of_a_large_file(
    folders: tuple[Path, Path], writers: Writers, mounts: tuple[Mount, Mount], kind: str
) -> None:
    """Pages that are touched after another mount has replaced the file are the old ones; after a client that purges at
    once has done so they end in SIGBUS.
    """
    here, there = folders
    mounts[0].allow("are gone")
    writer = writers(kind, mounts[1])
    size = 16 * MiB  # of which less than 12 are read ahead
    (there / "f").write_bytes(noise(size, 1))
    until(lambda: (here / "f").exists())
    with subprocess.Popen(
        [sys.executable, "-c", MAPPER, here / "f", str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        writer.put(here.name, "f", noise(size + 1, 2))
        until(lambda: (here / "f").stat().st_size == size + 1)
        said = process.communicate("go\n", timeout=60)
    assert said == ("", "")
    assert process.returncode == (0 if kind == "natsfs" else -signal.SIGBUS)


@pytest.mark.semantics("one-version-or-estale")
@pytest.mark.parametrize("size", [3000, 2 * MiB])
def test_readers_of_all_kinds_while_it_is_replaced(
    folders: tuple[Path, Path], writers: Writers, mounts: tuple[Mount, Mount], kind: str, size: int
) -> None:
    """read from the start, pread at random, through a mapping: each opened file shows one version throughout."""
    here, there = folders
    mounts[0].allow("are gone")
    writer = writers(kind, mounts[1])
    step = 1000  # of the pattern: each block of the file names its version

    def content(version: int) -> bytes:
        block = version.to_bytes(4, "big") * (step // 4)
        return block * (size // step)

    (there / "f").write_bytes(content(0))
    until(lambda: (here / "f").exists())
    stop = threading.Event()
    problems: list[str] = []
    newest = [0, 0, 0]
    readings = [0, 0, 0]

    def note(way: int, seen: set[bytes]) -> None:
        if len(seen) != 1:
            problems.append(f"way {way}: versions {sorted(seen)} in one reading")
            return
        version = int.from_bytes(seen.pop(), "big")
        if version < newest[way]:
            problems.append(f"way {way}: version {version} after {newest[way]}")
        newest[way] = version
        readings[way] += 1

    def read(way: int) -> None:
        while not stop.is_set():
            try:
                with opened(here / "f", os.O_RDONLY) as fd:
                    length = os.fstat(fd).st_size
                    if way == 0:
                        data = b"".join(iter(lambda fd=fd: os.read(fd, 70_000), b""))  # type: ignore[misc]
                        if len(data) != length:
                            problems.append(f"{len(data)} bytes of {length}")
                        note(way, {data[at : at + 4] for at in range(0, len(data), 4)})
                    elif way == 1:
                        places = [(at * 7919) % length // 4 * 4 for at in range(20)]
                        note(way, {os.pread(fd, 4, at) for at in places})
                    elif size <= MiB:
                        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapping:
                            note(way, {mapping[at : at + 4] for at in range(0, length, 4)})
            except OSError as error:
                if error.errno != errno.ESTALE:
                    problems.append(str(error))

    threads = [threading.Thread(target=read, args=(way,)) for way in range(3)]
    for thread in threads:
        thread.start()
    last = 12
    try:
        for number in range(1, last + 1):
            writer.put(here.name, "f", content(number))
        until(lambda: entry(here / "f") == whole(content(last)))
        until(lambda: readings[0] and readings[1])
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert problems == []

"""What is written is what is read, here and in the store."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import subprocess
import threading
from pathlib import Path

import pytest

from tests.support import CHUNK, Client, Mount, Mounter, digest_of, noise, opened, raises, run, until

SIZES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 40 * CHUNK + 1]


@pytest.mark.semantics("commit")
@pytest.mark.parametrize("size", SIZES)
def test_sizes_around_the_chunk_size(folder: Path, client: Client, size: int) -> None:
    """A file of this size is stored in full chunks, with the right digest, and reads back."""
    data = noise(size)
    (folder / "f").write_bytes(data)
    meta = client.stored(folder.name, "f")
    assert (meta["size"], meta["chunks"]) == (size, -(-size // CHUNK))
    assert meta["digest"] == digest_of(data)
    assert meta["options"]["max_chunk_size"] == CHUNK
    assert client.read(folder.name, "f") == data
    assert (folder / "f").read_bytes() == data
    assert (folder / "f").stat().st_size == size


@pytest.mark.parametrize("size", SIZES)
def test_sizes_survive_a_remount(bucket: str, mount: Mounter, size: int, tmp_path: Path) -> None:
    """Read from the store by a mount that did not write it."""
    data = noise(size, 1)
    first = mount(f"/{bucket}", folder=tmp_path)
    (first.path / "f").write_bytes(data)
    assert first.finish() == []
    assert (mount(f"/{bucket}", folder=tmp_path).path / "f").read_bytes() == data


def test_chunk_size_option(bucket: str, mount: Mounter, client: Client) -> None:
    """-o chunk_size decides how new objects are cut."""
    root = mount(f"/{bucket}", "chunk_size=64K").path
    data = noise(200_000)
    (root / "f").write_bytes(data)
    meta = client.stored(bucket, "f")
    assert (meta["chunks"], meta["options"]["max_chunk_size"]) == (4, 65536)
    assert client.read(bucket, "f") == data


def test_sparse_file(folder: Path, client: Client) -> None:
    """Holes read as zeros, in the mount and in the store."""
    with (folder / "f").open("wb") as file:
        file.seek(300_000)
        file.write(b"middle")
        file.truncate(1_000_000)
        file.flush()
        expected = bytes(300_000) + b"middle" + bytes(1_000_000 - 300_006)
        assert (folder / "f").read_bytes() == expected
    assert (folder / "f").read_bytes() == expected
    assert client.read(folder.name, "f") == expected


def test_write_beyond_the_end(folder: Path, client: Client) -> None:
    """pwrite behind the end of an existing file fills the gap with zeros."""
    (folder / "f").write_bytes(b"start")
    with opened(folder / "f", os.O_RDWR) as fd:
        assert os.pwrite(fd, b"end", 200_000) == 3
        assert os.pread(fd, 10, 0) == b"start\0\0\0\0\0"
        assert os.fstat(fd).st_size == 200_003
    assert client.read(folder.name, "f") == b"start" + bytes(199_995) + b"end"


@pytest.mark.parametrize("new", [0, 1, CHUNK, 2 * CHUNK + 5, 500_000, 600_000, 3_000_000])
def test_truncate(folder: Path, client: Client, new: int) -> None:
    """truncate(2) to shorter and longer than 500,000 bytes keeps what stays and adds zeros."""
    data = noise(500_000)
    (folder / "f").write_bytes(data)
    os.truncate(folder / "f", new)
    expected = data[:new] + bytes(max(0, new - len(data)))
    assert (folder / "f").stat().st_size == new
    assert (folder / "f").read_bytes() == expected
    assert client.read(folder.name, "f") == expected


def test_truncate_down_and_up_again(folder: Path, client: Client) -> None:
    """What was cut off does not come back when the file grows again."""
    (folder / "f").write_bytes(noise(400_000))
    with opened(folder / "f", os.O_RDWR) as fd:
        os.ftruncate(fd, 100_000)
        os.ftruncate(fd, 300_000)
        os.pwrite(fd, b"x", 250_000)
        os.ftruncate(fd, 200_000)
        os.ftruncate(fd, 260_000)
    expected = noise(400_000)[:100_000] + bytes(160_000)
    assert (folder / "f").read_bytes() == expected
    assert client.read(folder.name, "f") == expected


def test_append(folder: Path, client: Client) -> None:
    """O_APPEND adds at the end, whatever the offset of the handle."""
    (folder / "f").write_bytes(noise(CHUNK + 1))
    with opened(folder / "f", os.O_WRONLY | os.O_APPEND) as fd:
        os.write(fd, b"one")
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"two")
    with (folder / "f").open("ab") as file:
        file.write(b"three")
    assert client.read(folder.name, "f") == noise(CHUNK + 1) + b"onetwothree"


def test_appends_of_two_handles_are_all_kept(folder: Path, client: Client) -> None:
    """Two handles with O_APPEND on one file never write over each other."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    with opened(folder / "f", flags) as one, opened(folder / "f", flags) as two:
        for number in range(50):
            os.write(one, f"a{number}\n".encode())
            os.write(two, f"b{number}\n".encode())
    lines = client.read(folder.name, "f").decode().split()
    assert sorted(lines) == sorted(f"{letter}{number}" for letter in "ab" for number in range(50))


@pytest.mark.parametrize("at", [0, 1, CHUNK - 2, CHUNK, 5 * CHUNK + 17, 10 * CHUNK - 4])
def test_change_in_the_middle(folder: Path, client: Client, at: int) -> None:
    """Four bytes change; all others stay."""
    data = noise(10 * CHUNK)
    (folder / "f").write_bytes(data)
    with opened(folder / "f", os.O_RDWR) as fd:
        os.pwrite(fd, b"!!!!", at)
        assert os.pread(fd, 8, max(0, at - 2)) == (data[:at] + b"!!!!" + data[at + 4 :])[max(0, at - 2) :][:8]
    expected = data[:at] + b"!!!!" + data[at + 4 :]
    assert (folder / "f").read_bytes() == expected
    assert client.read(folder.name, "f") == expected


def test_random_changes_against_a_local_file(folder: Path, client: Client, tmp_path: Path) -> None:
    """The same few hundred writes, truncations, fsyncs and reopenings, on the mount and on the local disk."""
    generator = random.Random(4)
    paths = (folder / "f", tmp_path / "f")
    for path in paths:
        path.write_bytes(noise(700_000))
    handles = [path.open("r+b", buffering=0) for path in paths]
    for step in range(300):
        action = generator.random()
        at, size, cut = (
            generator.randrange(900_000),
            generator.randrange(1, 60_000),
            generator.randrange(900_000),
        )
        data = noise(size, step)
        for number, handle in enumerate(handles):
            if action < 0.7:
                os.pwrite(handle.fileno(), data, at)
            elif action < 0.8:
                handle.truncate(cut)
            elif action < 0.86:
                os.fsync(handle.fileno())
            elif action < 0.9:
                handle.close()
                handles[number] = paths[number].open("r+b", buffering=0)
        contents = [os.pread(handle.fileno(), size, max(0, at - 1000)) for handle in handles]
        assert contents[0] == contents[1], f"after step {step}"
    for handle in handles:
        handle.close()
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert client.read(folder.name, "f") == paths[1].read_bytes()


def test_truncating_open_replaces_everything(folder: Path, client: Client) -> None:
    """O_TRUNC with a shorter content leaves nothing of the longer one."""
    (folder / "f").write_bytes(noise(1_000_000))
    (folder / "f").write_bytes(b"short")
    assert (folder / "f").read_bytes() == b"short"
    assert client.read(folder.name, "f") == b"short"
    with opened(folder / "f", os.O_WRONLY | os.O_TRUNC):
        pass
    assert (folder / "f").read_bytes() == b""
    assert client.stored(folder.name, "f")["size"] == 0


def test_a_new_file_without_a_write_is_stored(folder: Path, client: Client) -> None:
    """creat(2) and close(2) make an empty object."""
    (folder / "f").touch()
    assert client.stored(folder.name, "f")["size"] == 0


@pytest.mark.semantics("own-changes")
def test_reading_while_writing_by_another_handle(folder: Path) -> None:
    """What one handle wrote, another one reads at once, before any close."""
    with (
        opened(folder / "f", os.O_WRONLY | os.O_CREAT) as writer,
        opened(folder / "f", os.O_RDONLY) as reader,
    ):
        os.write(writer, b"first")
        assert os.pread(reader, 100, 0) == b"first"
        os.write(writer, b" second")
        assert os.pread(reader, 100, 0) == b"first second"
        assert (folder / "f").stat().st_size == 12


@pytest.mark.semantics("commit")
def test_fsync_stores(folder: Path, client: Client) -> None:
    """After fsync(2) the content is in the store although the file is still open."""
    with opened(folder / "f", os.O_WRONLY | os.O_CREAT) as fd:
        os.write(fd, noise(300_000))
        os.fsync(fd)
        assert client.read(folder.name, "f") == noise(300_000)
        os.write(fd, b"more")
    assert client.read(folder.name, "f") == noise(300_000) + b"more"


def test_close_of_a_duplicate_stores(folder: Path, client: Client) -> None:
    """Every close(2) of a duplicate commits; the file stays open through the other."""
    with opened(folder / "f", os.O_WRONLY | os.O_CREAT) as fd:
        os.write(fd, b"one")
        os.close(os.dup(fd))
        assert client.read(folder.name, "f") == b"one"
        os.write(fd, b"two")
    assert client.read(folder.name, "f") == b"onetwo"


def test_nothing_is_stored_again_by_reading(folder: Path, client: Client) -> None:
    """Opening for reading and writing without a write leaves the object as it was."""
    (folder / "f").write_bytes(b"data")
    before = client.info(folder.name)["state"]["last_seq"]
    with opened(folder / "f", os.O_RDWR) as fd:
        os.read(fd, 10)
    with opened(folder / "f", os.O_RDONLY) as fd:
        os.read(fd, 10)
    assert client.info(folder.name)["state"]["last_seq"] == before


def test_memory_mapping_for_reading(folder: Path) -> None:
    """mmap(2) of a file shows its content."""
    data = noise(700_000)
    (folder / "f").write_bytes(data)
    with (folder / "f").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == data


def test_unlink_while_open(folder: Path, client: Client, shared: Mount) -> None:
    """An open file without a name is read and written on; nothing of it stays in the store or the spool."""
    (folder / "f").write_bytes(noise(500_000))
    with opened(folder / "f", os.O_RDWR) as fd:
        (folder / "f").unlink()
        assert not (folder / "f").exists()
        assert os.pread(fd, 500_000, 0) == noise(500_000)
        os.pwrite(fd, b"new", 1000)
        assert os.pread(fd, 5, 999) == noise(500_000)[999:1000] + b"new" + noise(500_000)[1003:1004]
        os.fsync(fd)
        assert os.fstat(fd).st_nlink == 0
        assert client.names(folder.name) == set()
    assert client.names(folder.name) == set()
    until(lambda: not shared.spooled(), what="the spool file goes")


def test_unlink_of_a_file_that_was_never_closed(folder: Path, client: Client) -> None:
    """Created, written, removed, closed: the store never shows it."""
    with opened(folder / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, noise(2_000_000))
        (folder / "f").unlink()
        assert os.pread(fd, 10, 0) == noise(10)
    assert client.names(folder.name) == set()
    assert os.listdir(folder) == []


def test_a_name_used_again_after_unlink_while_open(folder: Path, client: Client) -> None:
    """The removed file's handle and the new file of the same name do not touch each other."""
    (folder / "f").write_bytes(b"old")
    with opened(folder / "f", os.O_RDWR) as fd:
        (folder / "f").unlink()
        (folder / "f").write_bytes(b"new")
        os.pwrite(fd, b"OLD", 0)
        assert os.pread(fd, 10, 0) == b"OLD"
        assert (folder / "f").read_bytes() == b"new"
    assert (folder / "f").read_bytes() == b"new"
    assert client.read(folder.name, "f") == b"new"


def test_rename_over_a_file(folder: Path, client: Client) -> None:
    """The target is replaced; who has it open keeps its bytes."""
    (folder / "new").write_bytes(noise(300_000, 1))
    (folder / "old").write_bytes(noise(200_000, 2))
    nuid = client.stored(folder.name, "new")["nuid"]
    with opened(folder / "old", os.O_RDONLY) as fd:
        (folder / "new").rename(folder / "old")
        assert os.pread(fd, 300_000, 0) == noise(200_000, 2)
    assert os.listdir(folder) == ["old"]
    assert (folder / "old").read_bytes() == noise(300_000, 1)
    assert client.names(folder.name) == {"old"}
    assert client.stored(folder.name, "old")["nuid"] == nuid  # nothing was copied
    assert client.read(folder.name, "old") == noise(300_000, 1)


@pytest.mark.semantics("commit")
def test_rename_while_open_and_dirty(folder: Path, client: Client) -> None:
    """What is written before and after the rename is found under the new name."""
    with opened(folder / "a", os.O_WRONLY | os.O_CREAT) as fd:
        os.write(fd, b"before ")
        (folder / "a").rename(folder / "b")
        os.write(fd, b"after")
    assert os.listdir(folder) == ["b"]
    assert client.names(folder.name) == {"b"}
    assert client.read(folder.name, "b") == b"before after"


def test_an_editors_save(folder: Path, client: Client) -> None:
    """Written to a temporary file, synced, renamed over the original: as vim and most programs save."""
    (folder / "text").write_bytes(b"old")
    for number in range(10):
        with opened(folder / ".text.tmp", os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
            os.write(fd, f"version {number}".encode())
            os.fsync(fd)
        (folder / ".text.tmp").rename(folder / "text")
        assert (folder / "text").read_text() == f"version {number}"
    assert client.names(folder.name) == {"text"}
    assert client.read(folder.name, "text") == b"version 9"


def test_exclusive_creation(folder: Path) -> None:
    """O_EXCL refuses an existing file, also one that is open and not committed yet."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with opened(folder / "f", flags), raises(errno.EEXIST):
        os.open(folder / "f", flags)
    with raises(errno.EEXIST):
        os.open(folder / "f", flags)


def test_exclusive_creation_over_a_deleted_name(folder: Path) -> None:
    """A tombstone does not stand in the way of O_EXCL."""
    for _ in range(3):
        with opened(folder / "f", os.O_WRONLY | os.O_CREAT | os.O_EXCL):
            pass
        (folder / "f").unlink()


def test_exclusive_creation_by_many_at_once(folder: Path) -> None:
    """Of eight threads exactly one gets the file."""
    won = []

    def attempt(number: int) -> None:
        try:
            os.close(os.open(folder / "lock", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        won.append(number)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_writing_to_a_handle_for_reading(folder: Path) -> None:
    """EBADF, as everywhere."""
    (folder / "f").write_bytes(b"x")
    with opened(folder / "f", os.O_RDONLY) as fd, raises(errno.EBADF):
        os.write(fd, b"y")


def test_two_tools_write_and_read_at_once(folder: Path, tmp_path: Path) -> None:
    """Two `dd` write 24 MB each while two `cmp` compare files that are there already."""
    source = tmp_path / "source"
    source.write_bytes(noise(24_000_000))
    (folder / "there").write_bytes(source.read_bytes())
    tools = [
        *(
            ["dd", f"if={source}", f"of={folder / name}", "bs=100000", "status=none"]
            for name in ("one", "two")
        ),
        *(["cmp", str(source), str(folder / "there")] for _ in range(2)),
    ]
    running = [subprocess.Popen(tool, stdin=subprocess.DEVNULL) for tool in tools]
    assert [process.wait(100) for process in running] == [0] * 4
    for name in ("one", "two"):
        run("cmp", source, folder / name)


def test_many_writers_of_one_file(folder: Path, client: Client) -> None:
    """Eight threads write interleaved blocks of one file through handles of their own."""
    size, block = 4_000_000, 50_000
    data = noise(size)
    (folder / "f").touch()

    def write(number: int) -> None:
        with opened(folder / "f", os.O_WRONLY) as fd:
            for start in range(number * block, size, 8 * block):
                os.pwrite(fd, data[start : start + block], start)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (folder / "f").read_bytes() == data
    assert client.read(folder.name, "f") == data


def test_reading_at_random_offsets(bucket: str, mount: Mounter, client: Client) -> None:
    """Ranges of an object that another client stored, read without reading the rest first."""
    data = noise(6_000_011)
    client.put(bucket, "f", data)
    root = mount(f"/{bucket}").path
    generator = random.Random(1)
    with opened(root / "f", os.O_RDONLY) as fd:
        for _ in range(200):
            at, size = generator.randrange(len(data) + 100), generator.randrange(1, 300_000)
            assert os.pread(fd, size, at) == data[at : at + size]


def test_the_end_of_a_large_object_costs_little(bucket: str, mount: Mounter, client: Client) -> None:
    """The last kilobyte is a few requests, not a download."""
    client.put(bucket, "f", noise(30_000_000))
    mounted = mount(f"/{bucket}")
    size = (mounted.path / "f").stat().st_size
    before = mounted.server.received()
    with opened(mounted.path / "f", os.O_RDONLY) as fd:
        assert os.pread(fd, 1024, size - 1024) == noise(30_000_000)[-1024:]
    assert mounted.server.received() - before <= 6


def test_the_first_read_after_mounting_fills_the_page_cache(
    bucket: str, mount: Mounter, client: Client
) -> None:
    """What the listing of a bucket brings makes the kernel forget nothing that it has just been told."""
    pages = 64
    client.put(bucket, "f", noise(pages * mmap.PAGESIZE))
    path = mount().path / bucket / "f"
    path.read_bytes()
    with opened(path, os.O_RDWR) as fd, mmap.mmap(fd, 0) as mapped:
        resident = ctypes.create_string_buffer(pages)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        status = ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), resident)
    assert status == 0
    assert resident.raw == b"\1" * pages

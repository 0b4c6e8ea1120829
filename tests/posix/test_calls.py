"""System calls on files, names and directories, made on a local file system and on the mount."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.posix import libc
from tests.posix.actor import Actor
from tests.posix.both import Both, told
from tests.support import Client, Mount, noise, opened, raises, until

BIG = noise(3_000_000, 5)


def drop_pages(path: Path | int) -> None:
    """Make the kernel forget the clean pages of a file."""
    if isinstance(path, int):
        os.posix_fadvise(path, 0, 0, os.POSIX_FADV_DONTNEED)
    else:
        with opened(path, os.O_RDONLY) as fd:
            drop_pages(fd)


# --- reading and writing ------------------------------------------------------------------------------------------


@pytest.mark.semantics("read-and-write")
def test_read_and_write(both: Both) -> None:
    """Positions, short reads at the end, vectors, holes by writing behind the end, and nothing at all."""

    def steps(top: Path) -> list[Any]:
        with opened(top / "f", os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
            return [
                told(os.read, fd, 10),
                told(os.write, fd, b""),
                os.fstat(fd).st_size,
                told(os.write, fd, b"0123456789"),
                told(os.pread, fd, 4, 3),
                told(os.pread, fd, 100, 8),
                told(os.pread, fd, 100, 10),
                told(os.pread, fd, 100, 1000),
                told(os.lseek, fd, 0, os.SEEK_CUR),
                told(os.pwrite, fd, b"AB", 2),
                told(os.lseek, fd, 0, os.SEEK_CUR),
                told(os.pwrite, fd, b"end", 5000),
                os.fstat(fd).st_size,
                told(os.pread, fd, 6000, 0),
                told(os.lseek, fd, 1, os.SEEK_SET),
                told(os.writev, fd, [b"x", b"", b"yz"]),
                told(os.lseek, fd, -2, os.SEEK_CUR),
                told(lambda: (os.readv(fd, buffers := [bytearray(2), bytearray(3)]), buffers)),
                told(os.preadv, fd, [bytearray(3)], 4999),
                told(os.pwritev, fd, [b"1", b"2"], 7),
                told(os.lseek, fd, -1, os.SEEK_SET),
                told(os.lseek, fd, -6000, os.SEEK_END),
                told(os.lseek, fd, 0, os.SEEK_CUR),
                told(os.lseek, fd, 10, os.SEEK_END),
                told(os.write, fd, b"!"),
                (top / "f").read_bytes(),
                told(os.pread, fd, 1, -1),
                told(os.pwrite, fd, b"x", -1),
                told(os.pwrite, fd, b"", 100_000),
                os.fstat(fd).st_size,
            ]

    both.same(steps)


@pytest.mark.semantics("read-and-write")
def test_a_handle_for_one_way_only(both: Both) -> None:
    """Writing through a reading handle and reading through a writing one is EBADF; so is a closed one."""

    def steps(top: Path) -> list[Any]:
        (top / "f").write_bytes(b"data")
        answers = []
        for flags in (os.O_RDONLY, os.O_WRONLY):
            fd = os.open(top / "f", flags)
            answers += [
                told(os.read, fd, 1),
                told(os.write, fd, b"x"),
                told(os.pread, fd, 1, 0),
                told(os.pwrite, fd, b"x", 0),
                told(os.ftruncate, fd, 2),
                told(os.fsync, fd),
                told(mmap.mmap, fd, 2, access=mmap.ACCESS_WRITE) if flags == os.O_RDONLY else None,
            ]
            os.close(fd)
            answers += [told(os.read, fd, 1), told(os.close, fd), (top / "f").read_bytes()]
        return answers

    both.same(steps)


@pytest.mark.semantics("append")
def test_append(both: Both) -> None:
    """O_APPEND writes at the end that is there at that moment, also with pwrite(2), which Linux does so."""

    def steps(top: Path) -> list[Any]:
        (top / "f").write_bytes(b"start ")
        one = os.open(top / "f", os.O_RDWR | os.O_APPEND)
        other = os.open(top / "f", os.O_WRONLY | os.O_APPEND)
        answers = [
            told(os.lseek, one, 0, os.SEEK_CUR),
            os.write(one, b"one "),
            os.write(other, b"other "),
            os.write(one, b"one again "),
            told(os.lseek, one, 0, os.SEEK_CUR),
            os.pwrite(one, b"p ", 0),
            os.lseek(one, 0, os.SEEK_SET),
            os.write(one, b"w "),
            told(os.lseek, one, 0, os.SEEK_CUR),
            told(os.ftruncate, one, 3),
            os.write(other, b"after"),
            os.pread(one, 100, 0),
        ]
        os.close(one)
        os.close(other)
        return [*answers, (top / "f").read_bytes()]

    both.same(steps)


@pytest.mark.semantics("truncate")
@pytest.mark.parametrize("by_handle", [True, False], ids=["ftruncate", "truncate"])
def test_truncate(both: Both, by_handle: bool) -> None:
    """Shorter, longer, to nothing and to the same size; what comes back after a cut is zeros."""

    def steps(top: Path) -> list[Any]:
        content = noise(300_000, 1)
        (top / "f").write_bytes(content)
        answers: list[Any] = []
        for size in (299_999, 131_072, 131_073, 400_000, 5, 5, 200_000, 0, 10, 4096, 100):
            if by_handle:
                with opened(top / "f", os.O_RDWR) as fd:
                    answers.append(told(os.ftruncate, fd, size))
                    answers.append(os.pread(fd, 500_000, 0))
            else:
                answers.append(told(os.truncate, top / "f", size))
            answers += [(top / "f").stat().st_size, (top / "f").read_bytes()]
        with opened(top / "f", os.O_RDWR) as fd:
            answers += [told(os.ftruncate, fd, -1), told(os.pwrite, fd, b"x", 50), told(os.ftruncate, fd, 51)]
        (top / "d").mkdir()
        (top / "l").symlink_to("f")
        answers += [
            told(os.truncate, top / "f", -1),
            told(os.truncate, top / "d", 0),
            told(os.truncate, top / "none", 0),
            told(os.truncate, top / "f" / "x", 0),
            told(os.truncate, top / "l", 20),
            (top / "f").read_bytes(),
        ]
        return answers

    both.same(steps)


@pytest.mark.semantics("truncate")
def test_truncate_under_an_open_handle(both: Both) -> None:
    """A handle sees at once what truncate(2) by path did, and a position behind the end leaves a hole."""

    def steps(top: Path) -> list[Any]:
        (top / "f").write_bytes(b"0123456789" * 1000)
        with opened(top / "f", os.O_RDWR) as fd:
            answers: list[Any] = [os.read(fd, 5), os.lseek(fd, 8000, os.SEEK_SET)]
            os.truncate(top / "f", 3)
            answers += [os.read(fd, 10), os.fstat(fd).st_size, os.pread(fd, 10, 0)]
            answers += [os.write(fd, b"far"), os.fstat(fd).st_size, os.pread(fd, 9000, 0)]
            os.truncate(top / "f", 8010)
            answers += [os.pread(fd, 9000, 7990)]
        return [*answers, (top / "f").read_bytes()]

    both.same(steps)


# --- mappings -----------------------------------------------------------------------------------------------------


@pytest.mark.semantics("mappings")
def test_mappings(both: Both) -> None:
    """Shared and private, read and written, mixed with read(2) and write(2) on the same file."""

    def steps(top: Path) -> list[Any]:
        (top / "f").write_bytes(noise(200_000, 2))
        with opened(top / "f", os.O_RDWR) as fd:
            shared = mmap.mmap(fd, 200_000)
            private = mmap.mmap(fd, 200_000, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            answers: list[Any] = [shared[100_000:100_010], private[:10]]
            shared[10:15] = b"store"
            answers += [os.pread(fd, 20, 5), private[5:25]]
            private[0:4] = b"mine"
            answers += [os.pread(fd, 20, 0), shared[:20]]
            os.pwrite(fd, b"write", 50_000)
            answers += [shared[49_990:50_010]]
            shared.flush()
            answers += [(top / "f").read_bytes()]
            os.ftruncate(fd, 200_500)
            answers += [os.fstat(fd).st_size, private[:4]]
            shared.close()
            private.close()
        return [*answers, (top / "f").read_bytes()]

    both.same(steps)


@pytest.mark.semantics("mappings")
def test_a_mapping_that_outlives_its_descriptor(both: Both, client: Client) -> None:
    """What is stored through a mapping after close(2) is in the file once msync(2) or munmap(2) is through."""

    def steps(top: Path) -> list[Any]:
        answers: list[Any] = []
        for end in ("msync", "munmap"):
            path = top / end
            path.write_bytes(bytes(10_000))
            with opened(path, os.O_RDWR) as fd:
                mapping = libc.Mapping(fd, 10_000, writable=True)
            mapping.store(5_000, b"after")
            if end == "msync":
                mapping.sync()
                answers.append(path.read_bytes())
                mapping.store(0, b"again")
            answers.append(path.read_bytes())
            mapping.close()
            answers.append(path.read_bytes())
            drop_pages(path)
            answers.append(path.read_bytes())
            answers.append(path.stat().st_size)
        return answers

    both.same(steps)
    # The last close comes with the end of a mapping, and nobody waits for its commit.
    for name in ("steps1/msync", "steps1/munmap"):
        data = (both.local / name).read_bytes()
        until(lambda name=name, data=data: client.read(both.mounted.name, name) == data)  # type: ignore[misc]


@pytest.mark.semantics("mappings")
def test_a_mapping_of_a_removed_file(both: Both) -> None:
    """A file that was removed stays readable and writable through its mapping."""

    def steps(top: Path) -> list[Any]:
        (top / "f").write_bytes(noise(100_000, 3))
        with opened(top / "f", os.O_RDWR) as fd:
            mapping = libc.Mapping(fd, 100_000, writable=True)
        os.unlink(top / "f")
        mapping.store(3, b"new")
        answers: list[Any] = [mapping.load(0, 10), mapping.load(90_000, 10_000)]
        mapping.close()
        return [*answers, os.listdir(top)]

    both.same(steps)


# --- descriptors --------------------------------------------------------------------------------------------------


@pytest.mark.semantics("shared-offset")
def test_duplicates_share_their_position(both: Both) -> None:
    """dup(2) and a child process go on where the other stopped; a second open(2) starts anew."""

    def steps(top: Path) -> list[Any]:
        fd = os.open(top / "f", os.O_RDWR | os.O_CREAT)
        duplicate, second = os.dup(fd), os.open(top / "f", os.O_RDWR)
        answers: list[Any] = [os.write(fd, b"one "), os.write(duplicate, b"two "), os.write(second, b"O")]
        with Actor(top, pass_fds=[fd]) as child:
            answers += [child("lseek", fd, 0, os.SEEK_CUR), child("append", f"/dev/fd/{fd}", "three ")]
            answers += [os.lseek(fd, 12, os.SEEK_SET), child("lseek", fd, 0, os.SEEK_CUR)]
            answers += [child("close", fd), os.lseek(fd, 4, os.SEEK_SET), os.read(duplicate, 3)]
        os.close(fd)
        answers += [(top / "f").read_bytes(), os.write(duplicate, b"four"), os.pread(second, 100, 0)]
        os.close(second)
        answers += [(top / "f").read_bytes(), os.fstat(duplicate).st_size]
        os.close(duplicate)
        return [*answers, (top / "f").read_bytes()]

    both.same(steps)


@pytest.mark.semantics("close-in-any-order")
def test_close_in_any_order(both: Both) -> None:
    """Two writers and a reader of one file: nothing is lost, whoever closes first."""

    def steps(top: Path) -> list[Any]:
        answers: list[Any] = []
        for number, order in enumerate([(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]):
            path = top / str(number)
            path.write_bytes(b"." * 30)
            fds = [os.open(path, flags) for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDONLY)]
            os.pwrite(fds[0], b"first", 0)
            os.pwrite(fds[1], b"second", 20)
            for index in order:
                answers += [told(os.close, fds[index]), path.read_bytes()]
                fds[index] = -1
                for fd in fds[:2]:
                    if fd >= 0:
                        os.pwrite(fd, str(index).encode(), 10 + index)
            answers.append(path.read_bytes())
        return answers

    both.same(steps)


@pytest.mark.semantics("fsync")
def test_fsync(both: Both) -> None:
    """Every kind of descriptor takes fsync and fdatasync, as locally."""

    def steps(top: Path) -> list[Any]:
        answers: list[Any] = []
        (top / "f").write_bytes(b"x")
        for path, flags in (
            (top / "f", os.O_RDONLY),
            (top / "f", os.O_WRONLY),
            (top / "new", os.O_WRONLY | os.O_CREAT),
            (top, os.O_RDONLY | os.O_DIRECTORY),
            (top, os.O_PATH),
        ):
            with opened(path, flags) as fd:
                if flags & os.O_ACCMODE:
                    os.write(fd, b"data")
                answers += [told(os.fsync, fd), told(os.fdatasync, fd)]
                answers += [(top / "f").read_bytes(), sorted(os.listdir(top))]
        return answers

    both.same(steps)


# --- files that lose their name -----------------------------------------------------------------------------------


def take_away(path: Path, how: str) -> None:
    if how == "unlink":
        os.unlink(path)
    else:
        (path.parent / "other").write_bytes(b"other")
        os.rename(path.parent / "other", path)


@pytest.mark.semantics("open-files-outlive-their-name")
@pytest.mark.parametrize("how", ["unlink", "rename-over"])
@pytest.mark.parametrize("size", [10, 3_000_000])
def test_an_open_file_outlives_its_name(both: Both, how: str, size: int) -> None:
    """Every handle goes on to the last byte, reading and writing, with nothing left in the page cache."""

    def steps(top: Path) -> list[Any]:
        path = top / "f"
        path.write_bytes(BIG[:size])
        drop_pages(path)
        one, second = os.open(path, os.O_RDWR), os.open(path, os.O_RDONLY)
        answers: list[Any] = [os.read(second, 5)]
        take_away(path, how)
        answers += [os.fstat(one).st_nlink, os.fstat(one).st_size, sorted(os.listdir(top))]
        for fd in (second, one):
            drop_pages(fd)
            answers += [os.pread(fd, size, 0) == BIG[:size], os.pread(fd, 10, size - 3)]
        answers += [os.pwrite(one, b"still", size), os.pread(second, 20, size - 2), told(os.fsync, one)]
        answers += [told(os.ftruncate, one, 7), os.pread(second, 20, 0), os.fstat(second).st_size]
        answers += [told(os.close, one), os.pread(second, 20, 0), told(os.close, second)]
        return [*answers, sorted(os.listdir(top)), told(path.read_bytes)]

    both.same(steps)


@pytest.mark.semantics("open-files-outlive-their-name")
@pytest.mark.parametrize("how", ["unlink", "rename-over"])
def test_a_dirty_file_loses_its_name(both: Both, how: str) -> None:
    """What was written and not closed stays with its handle, and does not come back under the name."""

    def steps(top: Path) -> list[Any]:
        answers: list[Any] = []
        for existed in (True, False):
            path = top / f"existed{existed}" / "f"
            path.parent.mkdir()
            if existed:
                path.write_bytes(b"old content")
            fd = os.open(path, os.O_RDWR | os.O_CREAT)
            os.write(fd, b"dirty")
            take_away(path, how)
            answers += [os.pread(fd, 100, 0), os.write(fd, b" more"), os.pread(fd, 100, 0)]
            answers += [told(path.read_bytes), told(os.fsync, fd), told(os.close, fd), told(path.read_bytes)]
            answers += [sorted(os.listdir(path.parent))]
        return answers

    both.same(steps)


@pytest.mark.semantics("open-files-follow-a-rename")
def test_a_dirty_file_is_renamed(both: Both) -> None:
    """A handle follows its file: to another name, over another file, and with a directory above it."""

    def steps(top: Path) -> list[Any]:
        answers: list[Any] = []
        for existed in (True, False):
            place = top / f"existed{existed}"
            (place / "a").mkdir(parents=True)
            path = place / "a/f"
            if existed:
                path.write_bytes(b"old content")
            (place / "target").write_bytes(b"target")
            with opened(path, os.O_RDWR | os.O_CREAT) as fd:
                os.write(fd, b"1")
                os.rename(path, place / "a/g")
                os.write(fd, b"2")
                answers += [told(path.read_bytes), (place / "a/g").read_bytes()]
                os.rename(place / "a", place / "b")
                os.write(fd, b"3")
                answers += [(place / "b/g").read_bytes()]
                os.rename(place / "b/g", place / "target")
                os.write(fd, b"4")
                answers += [(place / "target").read_bytes(), os.fstat(fd).st_nlink]
                path2 = place / "b/new"
                path2.write_bytes(b"another")
                answers += [os.pread(fd, 20, 0)]
            answers += [(place / "target").read_bytes(), path2.read_bytes(), sorted(os.listdir(place))]
        return answers

    both.same(steps)


@pytest.mark.semantics("removed-directories")
def test_a_directory_removed_under_a_process(both: Both) -> None:
    """Inside a removed directory nothing can be created, it is empty, and `..` still leads out."""

    def steps(top: Path) -> list[Any]:
        (top / "d").mkdir()
        with Actor(top / "d") as process, opened(top / "d", os.O_RDONLY) as fd:
            os.rmdir(top / "d")
            answers = [
                process("getcwd"),
                process("listdir", "."),
                process("create", "f"),
                process("mkdir", "e"),
                process("symlink", "x", "l"),
                process("mkfifo", "p"),
                process("stat", "f"),
                process("rename", "../d", "x"),
                process("access", ".", os.R_OK),
                process("chdir", "."),
                told(os.listdir, fd),
                os.fstat(fd).st_nlink,
                told(os.fchmod, fd, 0o700),
                stat.S_IMODE(os.fstat(fd).st_mode),
                told(os.open, "f", os.O_CREAT | os.O_WRONLY, dir_fd=fd),
            ]
            (top / "d").mkdir()
            (top / "d/new").touch()
            answers += [process("listdir", "."), process("stat", "new"), told(os.listdir, fd)]
            answers += [process("chdir", ".."), process("listdir", ".")]
        return answers

    both.same(steps)


# --- copying in the kernel ----------------------------------------------------------------------------------------


@pytest.mark.semantics("copying-in-the-kernel")
def test_copying_in_the_kernel(both: Both) -> None:
    """copy_file_range, sendfile and splice move the same bytes as read and write."""

    def steps(top: Path) -> list[Any]:
        (top / "f").write_bytes(BIG[:400_000])
        (top / "g").write_bytes(b"-" * 1000)
        answers: list[Any] = []
        with opened(top / "f", os.O_RDWR) as source, opened(top / "g", os.O_RDWR) as target:
            answers += [
                os.copy_file_range(source, target, 300_000, 5, 500),
                told(os.copy_file_range, source, target, 10, 400_000, 0),
                told(os.copy_file_range, source, target, 10, 0, 10),
                told(os.copy_file_range, source, source, 100, 50, 100),
                told(os.copy_file_range, source, source, 1000, 0, 200_000),
                (top / "g").read_bytes(),
                os.lseek(target, 0, os.SEEK_SET),
                os.sendfile(target, source, 1000, 2000),
                os.pread(target, 300, 1900),
            ]
            ends = os.pipe()
            answers += [
                os.splice(source, ends[1], 3000, offset_src=7),
                os.splice(ends[0], target, 3000, offset_dst=100),
                os.pread(target, 10_000, 0),
            ]
            for end in ends:
                os.close(end)
            with opened(top / "g", os.O_WRONLY | os.O_APPEND) as append:
                answers += [
                    told(os.copy_file_range, source, append, 10),
                    told(os.sendfile, append, source, 0, 10),
                ]
        return [*answers, (top / "g").read_bytes(), (top / "f").read_bytes()]

    both.same(steps)


@pytest.mark.semantics("holes")
def test_seek_data_and_hole(both: Both) -> None:
    """Content without holes is all data up to its end, where the one hole is; beyond is ENXIO."""

    def steps(top: Path) -> list[Any]:
        (top / "f").write_bytes(BIG[:20_000])
        (top / "empty").touch()
        answers = []
        for name in ("f", "empty"):
            with opened(top / name, os.O_RDONLY) as fd:
                for offset in (0, 1, 19_999, 20_000, 20_001):
                    for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                        answers.append(told(os.lseek, fd, offset, whence))
        return answers

    both.same(steps)


@pytest.mark.semantics("holes")
def test_holes_are_told_as_data(folder: Path) -> None:
    """A file with a hole has blocks for all of it, and SEEK_HOLE finds only the end."""
    with opened(folder / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 1_000_000)
        os.pwrite(fd, b"x", 500_000)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 1_000_000
    assert (folder / "f").stat().st_blocks == 1954  # of 512 bytes


# --- attributes ---------------------------------------------------------------------------------------------------


@pytest.mark.semantics("stat")
def test_stat(both: Both) -> None:
    """Types, sizes, counts of links; stat(2), fstat(2), lstat(2) and readdir(3) agree on inode and type."""

    def steps(top: Path) -> list[Any]:
        (top / "file").write_bytes(b"x" * 5000)
        (top / "empty").touch()
        (top / "directory/inner").mkdir(parents=True)
        (top / "link").symlink_to("file")
        (top / "dangling").symlink_to("../" * 10 + "nowhere")
        os.mkfifo(top / "fifo")
        os.mknod(top / "socket", stat.S_IFSOCK | 0o600)
        answers: list[Any] = []
        with libc.Directory(top) as listing:
            while (entry := listing.read()) is not None:
                name, ino, kind = entry
                status = os.lstat(top / os.fsdecode(name))
                is_dir = stat.S_ISDIR(status.st_mode)
                answers.append(
                    (
                        name,
                        ino == status.st_ino,
                        kind == stat.S_IFMT(status.st_mode) >> 12,
                        oct(status.st_mode),
                        None if name == b".." else status.st_nlink,
                        None if is_dir else status.st_size,
                        status.st_dev == os.stat(top).st_dev,
                    )
                )
        for entry2 in os.scandir(top):
            answers.append(
                (entry2.name.encode(), 0, entry2.inode() == entry2.stat(follow_symlinks=False).st_ino)
            )
        numbers = [os.lstat(top / name).st_ino for name in os.listdir(top)]
        assert len(set(numbers)) == len(numbers)
        with opened(top / "link", os.O_RDONLY) as fd:
            answers.append((b"fstat", os.fstat(fd).st_ino == os.stat(top / "file").st_ino))
        return sorted(answers)

    both.same(steps)


@pytest.mark.semantics("stat")
def test_blocks(folder: Path) -> None:
    """st_blocks covers the size, and st_blksize is what the store cuts content into."""
    for size in (0, 1, 512, 513, 300_000):
        (folder / "f").write_bytes(BIG[:size])
        status = (folder / "f").stat()
        assert status.st_blocks == (size + 511) // 512
        assert status.st_blksize == 128 * 1024


@pytest.mark.semantics("stat")
def test_inode_numbers_are_not_reused_while_open(both: Both) -> None:
    """A new file under the name of one that is open and removed is another inode."""

    def steps(top: Path) -> list[Any]:
        answers: list[Any] = []
        with opened(top / "f", os.O_RDWR | os.O_CREAT) as fd:
            os.unlink(top / "f")
            (top / "f").write_text("new")
            answers += [os.fstat(fd).st_ino == (top / "f").stat().st_ino, os.fstat(fd).st_size]
        (top / "d").mkdir()
        with opened(top / "d", os.O_RDONLY) as fd:
            os.rmdir(top / "d")
            (top / "d").mkdir()
            answers += [
                os.fstat(fd).st_ino == (top / "d").stat().st_ino,
                os.path.samestat(os.fstat(fd), os.fstat(fd)),
            ]
        return answers

    both.same(steps)


@pytest.mark.semantics("umask")
def test_umask_and_modes(both: Both) -> None:
    """What a process creates has the mode it asked for less its umask."""

    def steps(top: Path) -> list[Any]:
        answers: list[Any] = []
        for umask in (0, 0o022, 0o077, 0o777):
            with Actor(top, umask=umask) as process:
                for number, mode in enumerate((0o777, 0o644, 0o4755, 0o2711, 0o1777, 0)):
                    name = f"{umask:o}-{number}"
                    process("create", f"f{name}", "", mode)
                    process("mkdir", f"d{name}", mode)
                    process("mkfifo", f"p{name}", mode)
                    process("symlink", "x", f"l{name}")
        for name in sorted(os.listdir(top)):
            status = os.lstat(top / name)
            answers.append((name, oct(status.st_mode), status.st_uid, status.st_gid))
        return answers

    both.same(steps)


@pytest.mark.semantics("statvfs")
def test_statvfs(folder: Path, shared: Mount) -> None:
    """df has figures that fit together; the longest name is 255 bytes."""
    for path in (shared.path, folder):
        status = os.statvfs(path)
        assert status.f_namemax == 255
        assert status.f_blocks >= status.f_bfree >= status.f_bavail > 0
        assert status.f_files >= status.f_ffree > 0
        assert status.f_frsize == status.f_bsize == 4096
    with opened(folder, os.O_RDONLY) as fd:
        assert os.fstatvfs(fd).f_namemax == 255


# --- listing directories ------------------------------------------------------------------------------------------


def many(top: Path, count: int = 700) -> set[bytes]:
    names = {f"entry-with-a-longer-name-{number:04}" for number in range(count)}
    for name in names:
        os.symlink("x", top / name)
    return {name.encode() for name in names}


@pytest.mark.semantics("listing-directories")
def test_telldir_and_seekdir(both: Both) -> None:
    """From a position that telldir gave, seekdir goes on with the same entries; rewinddir starts anew."""

    def steps(top: Path) -> list[Any]:
        names = many(top)
        with libc.Directory(top) as listing:
            seen: list[tuple[int, bytes]] = []
            while (entry := listing.read()) is not None:
                seen.append((listing.tell(), entry[0]))
            assert {name for _, name in seen} == names | {b".", b".."}
            assert len(seen) == len(names) + 2
            for index in (0, 1, 2, 3, 100, 350, 500, len(seen) - 2, len(seen) - 1):
                listing.seek(seen[index][0])
                following = []
                while (entry := listing.read()) is not None:
                    following.append(entry[0])
                assert following == [name for _, name in seen[index + 1 :]]
            listing.rewind()
            assert set(listing.rest()) == names
            os.symlink("x", top / "new")
            os.unlink(top / os.fsdecode(min(names)))
            listing.rewind()
            assert set(listing.rest()) == names - {min(names)} | {b"new"}
        return []

    both.same(steps)


@pytest.mark.semantics("listing-directories")
def test_a_listing_while_entries_come_and_go(both: Both) -> None:
    """Each entry that stays is listed exactly once; one that was removed before its turn may be missing."""

    def steps(top: Path) -> list[Any]:
        names = many(top)
        stays = {name for name in names if name[-1] % 2}
        with libc.Directory(top) as listing:
            seen = []
            for _ in range(10):
                entry = listing.read()
                assert entry is not None
                seen.append(entry[0])
            for number, name in enumerate(names - stays):
                os.unlink(top / os.fsdecode(name))
                os.symlink("x", top / f"added-{number}")
            seen += listing.rest()
        assert len(seen) == len(set(seen))
        assert stays <= set(seen)
        assert set(seen) <= names | {b".", b".."} | {f"added-{n}".encode() for n in range(len(names))}
        return sorted(os.listdir(top))

    both.same(steps)


@pytest.mark.semantics("listing-directories")
def test_rm_while_listing(both: Both) -> None:
    """The loop of `rm -r`: whatever a listing gives is removed at once, and the directory is empty then."""

    def steps(top: Path) -> list[Any]:
        many(top)
        with os.scandir(top) as entries:
            for entry in entries:
                os.unlink(entry.path)
        return os.listdir(top)

    both.same(steps)


# --- errors of calls on names -------------------------------------------------------------------------------------

LONG = "n" * 256


def furnish(top: Path) -> None:
    """One of each kind."""
    (top / "file").write_bytes(b"file")
    (top / "file2").write_bytes(b"file2")
    (top / "empty").mkdir()
    (top / "empty2").mkdir()
    (top / "full/inner").mkdir(parents=True)
    (top / "full/file").write_bytes(b"inner")
    (top / "full2/inner").mkdir(parents=True)
    (top / "link").symlink_to("file")
    (top / "dirlink").symlink_to("full")
    (top / "dangling").symlink_to("nowhere")
    (top / "loop").symlink_to("loop")
    os.mkfifo(top / "fifo")


def tree(top: Path) -> list[Any]:
    found: list[Any] = []
    for folder, directories, files in os.walk(top):
        directories.sort()
        for name in sorted(directories + files):
            path = Path(folder, name)
            status = path.lstat()
            data = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
            target = os.readlink(path) if path.is_symlink() else None
            found.append((str(path.relative_to(top)), oct(status.st_mode), data, target))
    return found


PLACES = (
    *("file", "file2", "empty", "empty2", "full", "full2", "full/file", "full/inner", "link", "dirlink"),
    *("dangling", "loop", "fifo", "absent", "absent/x", "file/x", "loop/x", "dirlink/file", "full/.."),
    *(
        ".",
        "full/inner/x",
        LONG,
        f"{LONG}/x",
        "file/",
        "empty/",
        "dirlink/",
        "absent/",
        "link/",
        "",
        "full/.",
    ),
)


@pytest.mark.semantics("rename")
@pytest.mark.parametrize("keep", [False, True], ids=["replace", "noreplace"])
def test_rename_of_anything_onto_anything(both: Both, keep: bool) -> None:
    """rename(2), and with RENAME_NOREPLACE: every pair of kinds gives the same result or errno as locally."""

    def steps(top: Path) -> list[Any]:
        answers: list[Any] = []
        place = top / "0"
        place.mkdir()
        furnish(place)
        before, number = tree(place), 0
        for old in PLACES:
            for new in PLACES:
                names = f"{place}/{old}" if old else "", f"{place}/{new}" if new else ""
                answer = told(libc.renameat2, *names, libc.RENAME_NOREPLACE if keep else 0)
                answers.append((old[:20], new[:20], answer))
                if not isinstance(answer, str) and (after := tree(place)) != before:
                    answers.append(after)
                    number += 1
                    place = top / str(number)
                    place.mkdir()
                    furnish(place)
        assert tree(place) == before
        return answers

    both.same(steps)


CALLS: dict[str, Callable[[str], Any]] = {
    "stat": lambda path: stat.S_IFMT(os.stat(path).st_mode),
    "lstat": lambda path: stat.S_IFMT(os.lstat(path).st_mode),
    "mkdir": os.mkdir,
    "rmdir": os.rmdir,
    "unlink": os.unlink,
    "symlink": lambda path: os.symlink("x", path),
    "readlink": lambda path: os.readlink(path),
    "mkfifo": os.mkfifo,
    "listdir": lambda path: sorted(os.listdir(path)),
    "chmod": lambda path: os.chmod(path, 0o711),
    "lchown": lambda path: os.lchown(path, 1, 2),
    "utime": lambda path: os.utime(path, ns=(1, 2)),
    "truncate": lambda path: os.truncate(path, 2),
    "access": lambda path: [os.access(path, how) for how in (os.F_OK, os.R_OK, os.W_OK, os.X_OK)],
    "chdir": lambda path: os.close(os.open(path, os.O_PATH | os.O_DIRECTORY)),
    "statvfs": lambda path: os.statvfs(path).f_namemax,
    "link": lambda path: os.link(path, os.path.dirname(path) + "/" + LONG),
}


@pytest.mark.semantics("errors-of-names")
@pytest.mark.parametrize("call", CALLS)
def test_calls_on_anything(both: Both, call: str) -> None:
    """ENOENT, ENOTDIR, EISDIR, ENOTEMPTY, EEXIST, ELOOP, ENAMETOOLONG, EINVAL and EBUSY as locally."""

    def steps(top: Path) -> list[Any]:
        answers: list[Any] = []
        place, number = top / "0", 0
        place.mkdir()
        furnish(place)
        before = tree(place)
        for name in PLACES:
            if call == "truncate" and name == "fifo":
                continue
            answers.append((name[:20], told(CALLS[call], f"{place}/{name}" if name else "")))
            if (after := tree(place)) != before:
                answers.append(after)
                number += 1
                place = top / str(number)
                place.mkdir()
                furnish(place)
        return answers

    both.same(steps)


@pytest.mark.semantics("errors-of-names")
def test_long_paths_and_deep_links(both: Both) -> None:
    """A path of 4,096 bytes and a chain of more than 40 links are refused; 39 links are followed."""

    def steps(top: Path) -> list[Any]:
        (top / "l0").symlink_to(".")
        for number in range(1, 45):
            (top / f"l{number}").symlink_to(f"l{number - 1}")
        (top / "file").touch()
        return [
            *(told(os.path.getsize, top / f"l{number}/file") for number in (10, 38, 39, 40, 41, 44)),
            told(os.stat, f"{top}/" + "./" * 2100),
            told(os.symlink, "t" * 4095, top / "long"),
            told(os.symlink, "t" * 4096, top / "longer"),
            told(os.symlink, "", top / "nothing"),
            told(lambda: len(os.readlink(top / "long"))),
            told(os.mkdir, top / ("n" * 255)),
            told(os.mkdir, top / ("ä" * 127)),
            told(os.mkdir, top / ("ä" * 128)),
        ]

    both.same(steps)


@pytest.mark.semantics("errors-of-names")
def test_a_mount_point_is_busy(shared: Mount, folder: Path, tmp_path: Path) -> None:
    """The root can neither be removed nor renamed; between buckets and file systems rename is EXDEV."""
    with raises(errno.EBUSY):
        os.rmdir(shared.path)
    with raises(errno.EBUSY):
        os.rename(shared.path, shared.path.parent / "elsewhere")
    (folder / "f").touch()
    (folder / "d").mkdir()
    (tmp_path / "local").touch()
    for old, new in (
        (folder / "f", tmp_path / "f"),
        (folder / "d", tmp_path / "d"),
        (tmp_path / "local", folder / "new"),
        (folder / "f", shared.path / "f"),
        (folder / "d", shared.path / "d"),
    ):
        with raises(errno.EXDEV):
            os.rename(old, new)


@pytest.mark.semantics("not-supported")
def test_what_is_not_supported(folder: Path) -> None:
    """fallocate and O_TMPFILE are EOPNOTSUPP, hard links EPERM, and nothing has changed then."""
    (folder / "f").write_bytes(b"data")
    with opened(folder / "f", os.O_RDWR) as fd:
        for mode in (0, 1, 3, 0x10):  # all, KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
            with raises(errno.EOPNOTSUPP):
                libc.fallocate(fd, mode, 0, 100)
        assert os.fstat(fd).st_size == 4
    with raises(errno.EOPNOTSUPP):
        os.open(folder, os.O_TMPFILE | os.O_RDWR)
    with raises(errno.EPERM):
        os.link(folder / "f", folder / "g")
    assert os.listdir(folder) == ["f"]
    # posix_fallocate(3) writes instead, where the file system cannot.
    with opened(folder / "f", os.O_RDWR) as fd:
        os.posix_fallocate(fd, 0, 1000)
    assert (folder / "f").read_bytes() == b"data" + bytes(996)


@pytest.mark.semantics("mappings")
def test_stores_after_close_reach_the_store(folder: Path, client: Client) -> None:
    """What is stored through a mapping that outlives its descriptor is committed after munmap(2)."""
    (folder / "f").write_bytes(bytes(10_000))
    with opened(folder / "f", os.O_RDWR) as fd:
        mapping = libc.Mapping(fd, 10_000, writable=True)
    mapping.store(5_000, b"after")
    mapping.close()
    until(lambda: client.read(folder.name, "f")[5_000:5_005] == b"after")

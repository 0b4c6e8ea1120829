"""The spool: files on the local disk that hold what has been written and not yet committed.

Each mount has a folder of its own in the spool directory, readable by its owner only. What could not be committed
is moved to the folder ``failed`` with a manifest beside it. What stays uncommitted for a while has a note beside it in
the mount's own folder, in case that the daemon is killed (`natsfs.files.manifest`).

Small writes that follow on each other are gathered in memory, and written out together: at the latest by `Spool.flush`,
once a second, and before anything else is written to the file. A kill so leaves what was written up to some moment.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from natsfs.catalog.metadata import new_nuid
from natsfs.errors import MountError
from natsfs.files.manifest import Manifest

log = logging.getLogger(__name__)

SPARES = 16  # empty files that are kept for the next ones

SMALL = 128 * 1024  # bytes; a write that has as many goes out at once
TAIL = (
    256 * 1024
)  # bytes of a file that are gathered: one call for 64 writes of 4 KiB, which twice as many hardly betters
PIECES = 1024  # writes that are gathered; IOV_MAX
TAILS = 16 * 1024 * 1024  # bytes of all files together

FAILED = "failed"
MOUNT = "mount-"
DATA = ".data"  # in `failed`; in the folder of a mount the name is a nuid alone
MANIFEST = ".json"
ID_SHOWN = 8  # characters of an id that people see and type
NEW = ".new"  # behind that of a manifest that is being written


class Spool:
    """All spool files of a mount; `limit` is their total size in bytes, 0 for none."""

    def __init__(self, directory: str, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.gathered = 0  # bytes in memory
        self.gathering: set[SpoolFile] = set()
        self._spares: list[tuple[int, Path]] = []
        self._root = Path(directory)
        self.failed = self._root / FAILED
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder, self._lock = _own(self._root)
            self._sweep()
        except OSError as error:
            raise MountError(
                f"cannot use the spool folder {directory}: {error.strerror}; give another with -o spool_dir=DIR"
            ) from None

    def _sweep(self) -> None:
        """Remove the empty files of daemons that were killed, and their folders where nothing else is left."""
        for folder in self._root.glob(f"{MOUNT}*"):
            try:
                with locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    for path in folder.iterdir():
                        if not path.stat().st_size:
                            path.unlink()
                    remove_notes(folder)
                    folder.rmdir()
            except OSError as error:
                # EAGAIN: of a mount that is alive; ENOENT: another one was here; ENOTEMPTY: `recover` tells of it.
                if error.errno not in (errno.EAGAIN, errno.ENOENT, errno.ENOTEMPTY):
                    log.warning("the spool folder %s cannot be removed: %s", folder, error.strerror)

    def create(self) -> SpoolFile:
        """An empty file: one that was used before, if there is one, since making and removing them is dear."""
        fd, path = self._spares.pop() if self._spares else self._make()
        return SpoolFile(self, fd, path)

    def _make(self) -> tuple[int, Path]:
        path = self._folder / new_nuid()
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), path

    def take_back(self, fd: int, path: Path, *, used: bool) -> None:
        """Of a file whose content nobody needs any more; one that was not `used` is empty."""
        if len(self._spares) < SPARES:
            if used:
                os.ftruncate(fd, 0)
            self._spares.append((fd, path))
        else:
            _remove(fd, path)

    def reserve(self, amount: int) -> None:
        """Account for `amount` more bytes. Raises OSError(ENOSPC) over the limit."""
        if self.limit and amount > 0 and self.used + amount > self.limit:
            raise OSError(errno.ENOSPC, "the spool is full")
        self.used += amount

    def flush(self) -> None:
        """Write out what is gathered. Where the disk does not take it, the next write to that file hears of it."""
        for file in list(self.gathering):
            told = file.stuck
            try:
                file.flush()
            except OSError as error:
                if not told:
                    log.warning("the spool folder %s does not take what was written: %s", self._folder, error)

    def close(self) -> None:
        """At the end of the mount; a folder that still holds something is left for the next one to find."""
        while self._spares:
            _remove(*self._spares.pop())
        try:
            self._folder.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOENT,):
                log.warning("the spool folder %s stays: %s", self._folder, error.strerror)
        os.close(self._lock)


@contextmanager
def locked(folder: Path, kind: int) -> Iterator[int]:
    """A lock on the folder of a mount, which its daemon has for as long as it lives."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, kind)
        yield lock
    finally:
        os.close(lock)


def _own(root: Path) -> tuple[Path, int]:
    """Make a folder and lock it; returns it with the descriptor that holds the lock.

    A folder that is there belongs to somebody else: to a daemon with the same number that was killed, or is in another
    container.
    """
    for number in count():
        folder = root / f"{MOUNT}{os.getpid()}{f'-{number}' if number else ''}"
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            continue
        # Before it is locked, somebody who sweeps may take it for one that nobody has.
        with suppress(FileNotFoundError), locked(folder, fcntl.LOCK_EX) as lock:
            if os.fstat(lock).st_nlink:
                return folder, os.dup(lock)
    raise AssertionError


def remove_notes(folder: Path) -> None:
    """Those of content that is not there any more."""
    for path in folder.iterdir():
        if path.suffix and not (folder / path.name.partition(".")[0]).exists():
            path.unlink()


def _remove(fd: int, path: Path) -> None:
    os.close(fd)
    path.unlink(missing_ok=True)


class SpoolFile:
    """One file's uncommitted content, at its own offsets. Holes are real holes.

    The last small writes are in memory: `_tail`, in all the bytes [`_start`, `_end`).
    """

    def __init__(self, spool: Spool, fd: int, path: Path) -> None:
        self._fd = fd
        self._spool = spool
        self._path = path
        self._reserved = 0
        self._used = False  # whether the file on the disk may hold something
        self._tail: list[bytes] = []
        self._start = self._end = 0
        self.stuck = False  # whether the tail could not be written out: then it takes no more
        self.noted: object = None  # what the note beside it says, for whoever makes it; None without one

    def write(self, data: bytes, offset: int, added: int) -> None:
        """`added`: how many of these bytes had not been written before, for the limit.

        Raises OSError, also for what is written out on this occasion; then nothing of `data` counts as written.
        """
        size, spool, tail = len(data), self._spool, self._tail
        gather = size < SMALL and spool.gathered + size <= TAILS
        if tail and not (
            gather
            and offset == self._end
            and offset + size - self._start <= TAIL
            and len(tail) < PIECES
            and not self.stuck
        ):
            self.flush()
        self.account(added)
        if not gather:
            try:
                self._write_out(data, offset)
            except OSError:
                self.account(-added)
                raise
            return
        if not tail:
            self._start = offset
            spool.gathering.add(self)
        tail.append(data)
        self._end = offset + size
        spool.gathered += size

    def _write_out(self, data: bytes, offset: int) -> None:
        self._used = True
        view = memoryview(data)
        while view:
            count = os.pwrite(self._fd, view, offset)
            view = view[count:]
            offset += count

    def flush(self) -> None:
        """Write out what is gathered. Raises OSError; what the disk has not taken stays gathered."""
        tail = self._tail
        try:
            while tail:
                self._used = True
                count = os.pwritev(self._fd, tail, self._start)
                left = self._end - self._start - count
                self._cut(self._start + count, b"".join(tail)[count:] if left else b"")
        except OSError:
            self.stuck = True
            raise

    def _cut(self, start: int, left: bytes) -> None:
        """Of the tail is `left` what begins at `start`."""
        self._spool.gathered -= self._end - self._start - len(left)
        self._start, self._end = start, start + len(left)
        self._tail[:] = [left] if left else []
        if not left:
            self.stuck = False
            self._spool.gathering.discard(self)

    def read(self, start: int, end: int) -> bytes:
        """As os.pread: less than [start, end) where the file ends before."""
        tail, first, last = self._tail, self._start, self._end
        if not tail or start >= last:
            return os.pread(self._fd, end - start, start)
        before = b""
        if start < first:
            stop = min(end, first)
            before = os.pread(self._fd, stop - start, start).ljust(stop - start, b"\0")
            if end <= first:
                return before
        if len(tail) > 1:
            tail[:] = [b"".join(tail)]
        (gathered,) = tail
        if start > first or end < last:
            gathered = gathered[max(start - first, 0) : end - first]
        behind = os.pread(self._fd, end - last, last) if end > last else b""
        return b"".join((before, gathered, behind)) if before or behind else gathered

    def truncate(self, size: int) -> None:
        """Raises OSError; then the file is as it was."""
        if self._tail and size < self._end:
            # What is left of the tail is the end of the file, and is written out later.
            self._set_size(min(size, self._start))
            self._cut(self._start, b"".join(self._tail)[: max(size - self._start, 0)])
        else:
            self.flush()
            self._set_size(size)

    def _set_size(self, size: int) -> None:
        if size or self._used:
            self._used = True
            os.ftruncate(self._fd, size)

    def account(self, amount: int) -> None:
        """For `amount` more bytes, which may be negative. Raises OSError(ENOSPC) over the limit."""
        self._spool.reserve(amount)
        self._reserved += amount

    @property
    def modified_ns(self) -> int:
        return os.fstat(self._fd).st_mtime_ns

    def discard(self) -> None:
        self._cut(0, b"")
        self._spool.reserve(-self._reserved)
        self._reserved = 0
        self._remove_note()
        fd, self._fd = self._fd, -1
        self._spool.take_back(fd, self._path, used=self._used)

    def note(self, manifest: Manifest, noted: object) -> None:
        """Say in the folder of the mount what this file holds; `noted` is kept. A disk that is full is no error."""
        self.noted = noted
        try:
            self._describe(self._path, manifest)
        except OSError as error:
            log.info("no note of %s can be made: %s", manifest.name, error)

    def _remove_note(self) -> None:
        if self.noted is not None:
            self.noted = None
            with suppress(OSError):
                self._path.with_suffix(MANIFEST).unlink(missing_ok=True)

    def _describe(self, content: Path, manifest: Manifest) -> None:
        """Write the manifest beside `content`, where the file is moved."""
        partial = content.with_suffix(MANIFEST + NEW)
        try:
            partial.write_text(manifest.encode())
            partial.chmod(0o600)
            if content != self._path:
                self._path.rename(content)
            partial.rename(content.with_suffix(MANIFEST))
        except OSError:
            if not content.exists() or content == self._path:
                with suppress(OSError):
                    partial.unlink(missing_ok=True)
            raise

    def keep(self, manifest: Manifest) -> Path:
        """Put the data aside for recovery; returns where it is now. On a full disk it stays where it is."""
        try:
            self.flush()
        except OSError as error:
            log.error(
                "bytes %d-%d of %s are lost, the spool does not take them: %s",
                self._start,
                self._end - 1,
                manifest.name,
                error,
            )
            manifest = manifest.without(self._start, self._end)
            self._cut(0, b"")
        failed = self._spool.failed
        target = failed / (self._path.name + DATA)
        try:
            failed.mkdir(mode=0o700, exist_ok=True)
            self._describe(target, manifest)
        except OSError as error:
            log.error("the data of %s cannot be described: %s", manifest.name, error)
        if target.exists():
            self._remove_note()
        else:
            target = self._path
        self._spool.reserve(-self._reserved)
        self._reserved = 0
        fd, self._fd = self._fd, -1
        os.close(fd)
        return target

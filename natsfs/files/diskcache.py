"""Chunks on the local disk, for the next mount and for the time without a server.

A chunk is a file, named by a digest of everything that makes it this chunk: the bucket's name and creation, the
version's nuid, size and digest, and the chunk's place in it. Nothing under such a name ever changes. Behind the content
stand the name and a checksum of both; what does not agree is removed and fetched from the server.

Each mount has a part of the folder to itself, locked for as long as it lives: ``0``, ``1``, ... A mount takes the part
that served its source last, else any that is free, so there are never more parts than there were mounts at a time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import heapq
import json
import logging
import os
import stat
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from natsfs.catalog.metadata import Metadata
from natsfs.errors import MountError
from natsfs.files.diskindex import LEAST, DiskIndex
from natsfs.store.layout import Layout

log = logging.getLogger(__name__)

QUEUE: Final = 16 * 1024 * 1024  # bytes that wait to be written, at most; what comes on top is not kept
RECENT: Final = 60.0  # seconds after which a use is noted in the file's time, for the order after a restart
LARGEST_LAYOUT: Final = 4 * 1024 * 1024  # bytes; that of an irregular object of a few hundred thousand chunks
NAME: Final = 16  # bytes of an entry's name
_TRAILER: Final = NAME + 4
_PARTS: Final = 1000
_CLOSING: Final = 5.0  # seconds for what waits at the end
_LAYOUT: Final = b"layout"


def _end_of(name: bytes, data: bytes) -> bytes:
    """What follows the content in its file."""
    return name + zlib.crc32(name, zlib.crc32(data)).to_bytes(4, "big")


class Names:
    """The names of one version's entries."""

    def __init__(self, meta: Metadata, created: str) -> None:
        """`created`: when the bucket was, in the server's words."""
        identity = (meta.bucket, created, meta.nuid, meta.size, meta.chunks, meta.digest)
        self._version = hashlib.blake2b(json.dumps(identity).encode(), digest_size=NAME)

    def _name(self, part: bytes) -> bytes:
        digest = self._version.copy()
        digest.update(part)
        return digest.digest()

    @property
    def layout(self) -> bytes:
        return self._name(_LAYOUT)

    def chunk(self, index: int) -> bytes:
        return self._name(index.to_bytes(8, "big"))


def pack_layout(layout: Layout) -> bytes:
    """Where the content is cut. Where the chunks lie in the stream is asked anew: a restored store has moved them."""
    return json.dumps([layout.size, layout.count, layout.chunk_size, layout.starts]).encode()


def unpack_layout(data: bytes, meta: Metadata) -> Layout | None:
    try:
        size, count, chunk_size, starts = json.loads(data)
        if size != meta.size or not isinstance(count, int) or count < 1:
            return None
        if starts is None:
            valid = chunk_size > 0 and (count - 1) * chunk_size < size <= count * chunk_size
        else:
            valid = len(starts) == count and starts[0] == 0 and sorted({*starts, size}) == [*starts, size]
    except (ValueError, TypeError):
        return None
    return Layout(size, count, chunk_size, starts=starts) if valid else None


class DiskCache:
    """`limit` is in bytes, for this mount's part.

    Every method may be called in any thread; `put` and `has` never wait for the disk. One thread writes, removes and
    reads the folder in at the start; until it is read in, `has` answers "perhaps".
    """

    def __init__(self, directory: str, limit: int, source: str) -> None:
        """`source` says what is mounted."""
        self._directory = Path(directory)
        self._source = source
        self._folder = self._directory
        self._held = -1  # the descriptor that keeps the part locked
        self._index = DiskIndex(limit)
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._jobs: deque[tuple[bytes, bytes | None]] = deque()  # None: remove
        self._waiting = 0  # bytes
        self._complete = False  # whether the index knows all files
        self._closing = False
        self._complained: set[int] = set()
        self._thread = threading.Thread(target=self._run, name="disk cache", daemon=True)

    def open(self) -> None:
        """Take a part of the folder and begin. Raises `MountError` where the folder cannot be used."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder, self._held = _take_part(self._directory, self._source)
        except OSError as error:
            raise MountError(
                f"cannot use the disk cache {self._directory}: {error.strerror}; "
                "give another with -o disk_cache=DIR"
            ) from None
        self._thread.start()

    def close(self) -> None:
        """Write what waits, for some seconds, and let go of the folder."""
        if self._held < 0:
            return
        with self._work:
            self._closing = True
            self._work.notify()
        self._thread.join(_CLOSING)
        if not self._thread.is_alive():  # else the folder stays locked until the process ends
            os.close(self._held)

    # --- asking -----------------------------------------------------------------------------------------------

    def has(self, name: bytes) -> bool:
        with self._lock:
            return name in self._index or not self._complete

    def read(self, wanted: Iterable[bytes]) -> list[bytes | None]:
        """The contents, None for what is not there or not what it was. Waits for the disk."""
        return [self._read(name) for name in wanted]

    def _read(self, name: bytes) -> bytes | None:
        path = self._path(name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._drop(name)
            return None
        except OSError as error:
            self._complain(error)
            return None
        try:
            status = os.fstat(fd)
            size = status.st_size - _TRAILER
            data = os.read(fd, size) if size > 0 else b""
            good = len(data) == size and os.read(fd, _TRAILER + 1) == _end_of(name, data)
            if good and time.time() - status.st_mtime > RECENT:
                os.utime(fd)
        except OSError as error:
            self._complain(error)
            return None
        finally:
            os.close(fd)
        if not good:
            log.warning("an entry of the disk cache was damaged and is removed: %s", path)
            self._drop(name)
            with contextlib.suppress(OSError):
                os.unlink(path)
            return None
        with self._lock:
            self._index.touch(name)
        return data

    def _drop(self, name: bytes) -> None:
        with self._lock:
            self._index.remove(name)

    # --- telling ----------------------------------------------------------------------------------------------

    def put(self, name: bytes, data: bytes) -> None:
        """Keep it, in a moment, if there is time for it."""
        with self._work:
            if name in self._index or self._waiting + len(data) > QUEUE:
                return
            self._jobs.append((name, data))
            self._waiting += len(data)
            self._work.notify()

    def forget(self, names: Iterable[bytes]) -> None:
        """These turned out to be wrong. `names` is gone through in the thread that calls."""
        with self._work:
            pending = {name for name, _ in self._jobs}
            for name in names:
                if name in self._index or name in pending or not self._complete:
                    self._jobs.append((name, None))
            self._work.notify()

    # --- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._read_in()
        except Exception:
            log.exception("the disk cache could not be read in")
        with self._lock:
            self._complete = True
        deadline: float | None = None
        while True:
            with self._work:
                while not self._jobs and not self._closing:
                    self._work.wait()
                if self._closing and deadline is None:
                    deadline = time.monotonic() + _CLOSING - 1
                if not self._jobs or (deadline is not None and time.monotonic() > deadline):
                    return
                name, data = self._jobs.popleft()
                known = name in self._index
            try:
                if data is None:
                    self._drop(name)
                    self._unlink([name])
                elif not known:
                    self._write(name, data)
            except OSError as error:
                self._complain(error)
            except Exception:
                log.exception("the disk cache could not be changed")
            with self._lock:
                self._waiting -= len(data) if data is not None else 0

    def _write(self, name: bytes, data: bytes) -> None:
        size = len(data) + _TRAILER
        with self._lock:
            gone = self._index.make_room(size)
        if gone is None:
            return
        self._unlink(gone)
        try:
            self._store(name, data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._complain(error)
            # Others need the disk, too: what is there has to do, and the oldest of it makes the room.
            with self._lock:
                gone = self._index.give_up(2 * size)
            self._unlink(gone)
            if not gone:
                return
            self._store(name, data)
        with self._lock:
            self._index.add(name, size)

    def _store(self, name: bytes, data: bytes) -> None:
        """In one step: no other name than a complete file's is ever looked at."""
        path, new = self._path(name), self._folder / "new"
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                end = _end_of(name, data)
                if os.writev(fd, (data, end)) != len(data) + len(end):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # the rest would be told so
            finally:
                os.close(fd)
            try:
                os.rename(new, path)
            except FileNotFoundError:
                os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
                os.rename(new, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(new)
            raise

    def _unlink(self, names: Iterable[bytes]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(name))

    def _read_in(self) -> None:
        """What earlier mounts left, in the order of its last use; as much of it as the index has room for."""
        most = self._index.limit // LEAST
        kept: list[tuple[float, bytes, int]] = []
        for entry in self._files():
            if self._closing:
                return
            heapq.heappush(kept, entry)
            if len(kept) > most:
                self._unlink([heapq.heappop(kept)[1]])
        kept.sort()
        for _, name, size in kept:
            with self._lock:
                gone = self._index.make_room(size)
                if gone is not None:
                    self._index.add(name, size)
            self._unlink([name] if gone is None else gone)

    def _files(self) -> Iterator[tuple[float, bytes, int]]:
        """Time of the last use, name and size of every entry. What is no entry's is left alone."""
        for number in range(256):
            try:
                with os.scandir(self._folder / f"{number:02x}") as files:
                    for file in files:
                        with contextlib.suppress(ValueError, FileNotFoundError):
                            name = bytes([number]) + bytes.fromhex(file.name)
                            status = file.stat(follow_symlinks=False)
                            if len(name) == NAME and stat.S_ISREG(status.st_mode):
                                yield status.st_mtime, name, status.st_size
            except FileNotFoundError:
                continue
            except OSError as error:
                self._complain(error)

    def _path(self, name: bytes) -> str:
        digits = name.hex()
        return f"{self._folder}/{digits[:2]}/{digits[2:]}"

    def _complain(self, error: OSError) -> None:
        """Once for each kind: the cache is a help, and goes on as well as it can."""
        number = error.errno or 0
        if number not in self._complained:
            self._complained.add(number)
            log.warning("the disk cache %s cannot be used as it should: %s", self._folder, error.strerror)


def _take_part(directory: Path, source: str) -> tuple[Path, int]:
    """A part of the cache that no other mount has, and the descriptor that holds its lock."""
    mine = hashlib.blake2b(source.encode(), digest_size=NAME).hexdigest().encode()
    parts = [directory / str(number) for number in range(_PARTS)]
    for folder in parts:
        if folder.is_dir() and (held := _lock(folder)) is not None:
            if os.pread(held, len(mine), 0) == mine:
                return folder, held
            os.close(held)
    for folder in parts:
        folder.mkdir(mode=0o700, exist_ok=True)
        if (held := _lock(folder)) is not None:
            os.pwrite(held, mine, 0)
            return folder, held
    raise OSError(errno.EUSERS, "all of its parts are in use")


def _lock(folder: Path) -> int | None:
    """None if another mount has it, or another user."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        return None
    held = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        return None
    except OSError:
        os.close(held)
        raise
    return held

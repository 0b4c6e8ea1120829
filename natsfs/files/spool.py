"""The spool: files on the local disk that hold what has been written and not yet committed.

Each mount has a folder of its own in the spool directory, readable by its owner only. What could not be committed
is moved to the folder ``failed`` with a manifest beside it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from natsfs.catalog.metadata import new_nuid
from natsfs.errors import MountError

log = logging.getLogger(__name__)

SPARES = 16  # empty files that are kept for the next ones


class Spool:
    """All spool files of a mount; `limit` is their total size in bytes, 0 for none."""

    def __init__(self, directory: str, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._spares: list[tuple[int, Path]] = []
        self._root = Path(directory)
        self._folder = self._root / f"mount-{os.getpid()}"
        self.failed = self._root / "failed"
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _own(self._folder)
            self._sweep()
        except OSError as error:
            raise MountError(
                f"cannot use the spool folder {directory}: {error.strerror}; give another with -o spool_dir=DIR"
            ) from None

    def _sweep(self) -> None:
        """Remove the empty files of daemons that were killed, and their folders where nothing else is left."""
        for folder in self._root.glob("mount-*"):
            try:
                with _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    for path in folder.iterdir():
                        if not path.stat().st_size:
                            path.unlink()
                    folder.rmdir()
            except OSError as error:
                # BlockingIOError: of a mount that is alive; FileNotFoundError: swept by another one.
                if error.errno not in (errno.EAGAIN, errno.ENOENT, errno.ENOTEMPTY):
                    log.warning("the spool folder %s cannot be removed: %s", folder, error.strerror)

    def create(self) -> SpoolFile:
        """An empty file: one that was used before, if there is one, since making and removing them is dear."""
        fd, path = self._spares.pop() if self._spares else self._make()
        return SpoolFile(self, fd, path)

    def _make(self) -> tuple[int, Path]:
        path = self._folder / new_nuid()
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), path

    def take_back(self, fd: int, path: Path) -> None:
        """Of a file whose content nobody needs any more."""
        if len(self._spares) < SPARES:
            os.ftruncate(fd, 0)
            self._spares.append((fd, path))
        else:
            _remove(fd, path)

    def reserve(self, amount: int) -> None:
        """Account for `amount` more bytes. Raises OSError(ENOSPC) over the limit."""
        if self.limit and amount > 0 and self.used + amount > self.limit:
            raise OSError(errno.ENOSPC, "the spool is full")
        self.used += amount

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
def _locked(folder: Path, kind: int) -> Iterator[int]:
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, kind)
        yield lock
    finally:
        os.close(lock)


def _own(folder: Path) -> int:
    """Make a folder and lock it; returns the descriptor that holds the lock."""
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        # Before it is locked, somebody who sweeps may take it for one that nobody has.
        with suppress(FileNotFoundError), _locked(folder, fcntl.LOCK_EX) as lock:
            if os.fstat(lock).st_nlink:
                return os.dup(lock)


def _remove(fd: int, path: Path) -> None:
    os.close(fd)
    path.unlink(missing_ok=True)


class SpoolFile:
    """One file's uncommitted content, at its own offsets. Holes are real holes."""

    def __init__(self, spool: Spool, fd: int, path: Path) -> None:
        self.fd = fd
        self._spool = spool
        self._path = path
        self._reserved = 0

    def write(self, data: bytes, offset: int, written_before: int, written_after: int) -> None:
        """`written_*`: the overlay's count of written bytes around this write, for the limit."""
        self._account(written_after - written_before)
        view = memoryview(data)
        while view:
            count = os.pwrite(self.fd, view, offset)
            view = view[count:]
            offset += count

    def truncate(self, size: int, written_before: int, written_after: int) -> None:
        os.ftruncate(self.fd, size)
        self._account(written_after - written_before)

    def _account(self, amount: int) -> None:
        self._spool.reserve(amount)
        self._reserved += amount

    def discard(self) -> None:
        self._spool.reserve(-self._reserved)
        self._reserved = 0
        self._spool.take_back(self.fd, self._path)

    def keep(self, manifest: dict[str, Any]) -> Path:
        """Put the data aside for recovery; returns where it is now. On a full disk it stays where it is."""
        failed = self._spool.failed
        target = failed / (self._path.name + ".data")
        try:
            failed.mkdir(mode=0o700, exist_ok=True)
            partial = failed / (self._path.name + ".json.new")
            partial.write_text(json.dumps(manifest, indent=1))
            partial.chmod(0o600)
            self._path.rename(target)
            partial.rename(failed / (self._path.name + ".json"))
        except OSError as error:
            log.error("the data of %s cannot be described: %s", manifest.get("name"), error)
            if not target.exists():
                target = self._path
        self._spool.reserve(-self._reserved)
        self._reserved = 0
        os.close(self.fd)
        return target

"""What a spool directory holds that no daemon is working on any more, and its way into local files."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from natsfs.catalog.attributes import Attributes, Defaults
from natsfs.files.manifest import Content, Manifest, Range, content_of, join
from natsfs.files.spool import DATA, FAILED, MANIFEST, MOUNT, NEW, locked, remove_notes
from natsfs.store.segments import Spooled

BLOCK = 1024 * 1024  # bytes that are copied at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptFile:
    """Content of a failed commit, or what a daemon that was `killed` had in its folder.

    `manifest` is None where nothing tells what the content is of.
    """

    id: str
    path: Path
    manifest: Manifest | None
    killed: bool
    content: Content
    time_ns: int
    # Whether the store has the content: a daemon can be killed after the commit and before the last close.
    saved: bool

    @property
    def _manifests(self) -> tuple[Path, Path]:
        return self.path.with_suffix(MANIFEST), self.path.with_suffix(MANIFEST + NEW)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        for path in self._manifests:
            path.unlink(missing_ok=True)
        if self.killed:
            remove_notes(self.path.parent)
            with suppress(OSError):
                self.path.parent.rmdir()


def find(root: Path, locks: ExitStack) -> list[KeptFile]:
    """All that is kept, oldest first. The folders of killed daemons stay locked until `locks` is left.

    Raises OSError if `root` cannot be read; one that does not exist holds nothing.
    """
    failed, killed = _paths(root, locks)
    found = [_kept(path, killed=True) for path in killed]
    for path in failed:
        with suppress(FileNotFoundError):  # somebody else drops it
            found.append(_kept(path, killed=False))
    return sorted(found, key=lambda kept: (kept.time_ns, kept.id))


def count(root: Path) -> tuple[int, int]:
    """How many files `find` gives, and what they take of the disk, in bytes. Raises OSError as `find` does."""
    with ExitStack() as locks:
        failed, killed = _paths(root, locks)
        return len(failed) + len(killed), room([*failed, *killed])


def room(paths: Iterable[Path]) -> int:
    """What files take of the disk, in bytes."""
    total = 0
    for path in paths:
        with suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


def _paths(root: Path, locks: ExitStack) -> tuple[list[Path], list[Path]]:
    """The content of failed commits, and of killed daemons."""
    failed: list[Path] = []
    killed: list[Path] = []
    with suppress(FileNotFoundError):
        failed = [path for path in (root / FAILED).iterdir() if path.suffix == DATA]
    for folder in sorted(root.glob(f"{MOUNT}*")):
        try:
            locks.enter_context(locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB))
            killed += [path for path in folder.iterdir() if not path.suffix and path.stat().st_size]
        except OSError as error:
            # Of a mount that is alive, or removed in this moment.
            if error.errno not in (errno.EAGAIN, errno.ENOENT):
                raise
    return failed, killed


def _kept(path: Path, *, killed: bool) -> KeptFile:
    manifest = None
    for place in (path.with_suffix(MANIFEST), path.with_suffix(MANIFEST + NEW)):
        with suppress(OSError, ValueError):
            manifest = Manifest.decode(place.read_text())
            break
    status = path.stat()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        content = content_of(
            manifest,
            note=killed,
            size=status.st_size,
            modified_ns=status.st_mtime_ns,
            extents=extents(fd, 0, status.st_size),
        )
    finally:
        os.close(fd)
    return KeptFile(
        id=path.stem,
        path=path,
        manifest=manifest,
        killed=killed,
        content=content,
        time_ns=status.st_mtime_ns if killed or manifest is None else manifest.time_ns,
        saved=killed and manifest is not None and manifest.saved and manifest.fits(status.st_mtime_ns),
    )


def extents(fd: int, start: int, end: int) -> list[Range]:
    """What of [start, end) is no hole."""
    found: list[Range] = []
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole follows
                break
            raise
        stop = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        if start < stop:
            found.append((start, stop))
        start = stop
    return found


@contextmanager
def new_file(path: Path, *, replace: bool) -> Iterator[int]:
    """A descriptor of a file that appears under `path`; if something fails there is none, or the old one is left.

    Raises FileExistsError unless it may `replace` one.
    """
    partial = path.with_name(f".natsfs-recover-{os.getpid()}") if replace else path
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
        if replace:
            partial.rename(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def copy(kept: KeptFile, target: int) -> None:
    """Write what is here, holes as holes. Raises OSError also where bytes are missing that ought to be here."""
    source = os.open(kept.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.ftruncate(target, kept.content.size)
        written = join((s.start, s.end) for s in kept.content.segments if isinstance(s, Spooled))
        if written and os.fstat(source).st_size < written[-1][1]:
            raise OSError(errno.EIO, f"{kept.path} is shorter than it was")
        for start, end in written:
            for first, stop in extents(source, start, end):
                _copy_range(source, target, first, stop)
    finally:
        os.close(source)


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    while start < end:
        data = os.pread(source, min(BLOCK, end - start), start)
        if not data:
            raise OSError(errno.EIO, "the kept file became shorter while it was copied")
        write_at(target, data, start)
        start += len(data)


def write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def set_attributes(kept: KeptFile, target: int) -> None:
    """Permissions and times, as far as they are known. Who owns the copy is the affair of whoever makes it."""
    values = kept.manifest.attributes if kept.manifest is not None else None
    known = Attributes.decode(values, stat.S_IFREG, kept.time_ns, Defaults(0, 0, 0o600, 0o700))
    os.fchmod(target, known.mode & 0o777)
    os.utime(target, ns=(known.atime_ns, known.mtime_ns))

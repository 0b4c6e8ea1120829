"""The open files of a mount, and the handles that lead to them."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio

from natsfs.catalog.inodes import Inode
from natsfs.errors import BucketGone, ChunksGone, Conflict, StoreError
from natsfs.files.file import ATTEMPTS, File
from natsfs.files.reader import Sequence
from natsfs.volume import Volume

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Handle:
    """What open(2) returned. `flags` are open(2)'s."""

    file: File
    flags: int
    failures: int  # of the file's commits that this handle has reported or that were before its time
    sequence: Sequence = field(default_factory=Sequence)

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY


class Files:
    def __init__(self, volume: Volume, nursery: trio.Nursery) -> None:
        self.volume = volume
        self.nursery = nursery
        self.unsaved: list[str] = []
        self._files: dict[int, File] = {}
        self._handles: dict[int, Handle] = {}
        self._next = 0

    # --- life of a file ---------------------------------------------------------------------------------------

    def get(self, inode: Inode) -> File | None:
        """The file of an inode that is open or dirty."""
        return self._files.get(inode.ino)

    def _acquire(self, inode: Inode) -> File:
        file = self._files.get(inode.ino)
        if file is None:
            file = self._files[inode.ino] = File(self, inode)
            inode.pins += 1
        file.handles += 1
        return file

    async def _release(self, file: File) -> None:
        """Give back one use of a file; the last one commits what is dirty and drops the rest."""
        try:
            # Again if there was a write through another handle, which is gone by now, while the commit was under way.
            while file.handles == 1 and file.needs_commit:
                await file.commit()
        except StoreError:
            pass  # reported, and the data put aside, by the file; nobody is left to return an error to
        file.handles -= 1
        if file.handles == 0 and self._files.get(file.inode.ino) is file:
            del self._files[file.inode.ino]
            await file.close()
            inode = file.inode
            reopened = inode.ino in self._files
            if inode.meta is None and inode.node is not None and inode.bucket is not None and not reopened:
                inode.bucket.drop_node(inode.node)  # of a file that could not even be opened
            file.inode.pins -= 1
            self.volume.inodes.release(file.inode)

    @asynccontextmanager
    async def using(self, inode: Inode) -> AsyncIterator[File]:
        """A file for the time of one call that comes without a handle."""
        file = self._acquire(inode)
        try:
            yield file
        finally:
            await self._release(file)

    # --- calls ------------------------------------------------------------------------------------------------

    async def open(self, inode: Inode, flags: int) -> int:
        """A handle. O_TRUNC is the caller's, by `truncate`.

        Raises `ChunksGone` (ESTALE) for content that was replaced in this moment: the kernel then looks the name up
        again, and opens what is there now.
        """
        file = self._acquire(inode)
        self._next += 1
        handle = Handle(file, flags, file.failures)
        self._handles[self._next] = handle
        # Taken by writers, too: chunks of a version that somebody has open are not purged.
        version = file.version()
        number = self._next
        if handle.writable:
            file.writers += 1
        elif version is not None:
            try:
                await self.volume.reader.opened(version)
            except ChunksGone:
                await self.release(number)
                if inode.meta is not None and inode.bucket is not None:
                    await self.volume.refresh(inode.bucket, inode.meta.subject)
                raise
            except BaseException:
                await self.release(number)
                raise
        return number

    def handle(self, fh: int) -> Handle:
        return self._handles[fh]

    async def read(self, fh: int, offset: int, size: int) -> bytes:
        handle = self._handles[fh]
        return await handle.file.read(offset, size, handle.sequence)

    async def write(self, fh: int, offset: int, data: bytes) -> int:
        handle = self._handles[fh]
        return await handle.file.write(offset, data, append=bool(handle.flags & os.O_APPEND))

    async def flush(self, fh: int) -> None:
        """close(2) of one descriptor. Raises what the commit raised."""
        handle = self._handles[fh]
        if handle.writable:
            await self._commit(handle)

    async def fsync(self, fh: int) -> None:
        await self._commit(self._handles[fh])

    async def _commit(self, handle: Handle) -> None:
        """Each handle hears once of a failed commit: what it wrote may have gone with a commit of another handle."""
        file = handle.file
        try:
            if file.needs_commit:
                await file.commit()
        except StoreError:
            handle.failures = file.failures
            raise
        if handle.writable and handle.failures < file.failures and file.last_error is not None:
            handle.failures = file.failures
            raise file.last_error

    async def release(self, fh: int) -> None:
        handle = self._handles.pop(fh)
        if handle.writable:
            handle.file.writers -= 1
        await self._release(handle.file)

    # --- attributes -------------------------------------------------------------------------------------------

    async def publish_attributes(self, inode: Inode) -> None:
        """Store the inode's attributes in the metadata of the version it shows."""
        catalog = inode.bucket
        assert catalog is not None
        volume = self.volume
        async with volume.mounted_of(catalog).names.shared():
            for _ in range(ATTEMPTS):
                meta = inode.meta
                if inode.node is None or meta is None:
                    if inode.unlinked:
                        return
                    raise Conflict(f"{inode.name!r} was replaced by somebody else meanwhile", 0)
                async with volume.operation(catalog) as operation:
                    try:
                        stored = await operation.publish(
                            replace(meta, attributes=inode.attributes.encode(meta.attributes)),
                            catalog.last_seq(meta.subject),
                        )
                    except Conflict:
                        await volume.refresh(catalog, meta.subject)
                        continue
                    operation.apply(stored, inode)
                return
        raise Conflict(f"{inode.name!r} is changed by others all the time", 0)

    async def attributes_changed(self, inode: Inode) -> None:
        """chmod, chown or utimensat on a file: with the content where that is still being written, else now."""
        file = self.get(inode)
        if inode.unlinked:
            return
        inode.uncommitted = True
        if file is not None and (file.writers or file.dirty or inode.meta is None):
            file.attributes_dirty = True
            return
        async with self.using(inode) as used:
            used.attributes_dirty = True
            await used.commit()

    # --- the end ----------------------------------------------------------------------------------------------

    def report_unsaved(self, inode: Inode, error: StoreError, where: Path | None) -> None:
        bucket = inode.bucket.name if inode.bucket is not None else "?"
        name = f"{bucket}/{inode.name}"
        if where is None:
            line = f"attributes of {name} could not be stored: {error}"
        else:
            line = f"{name} could not be committed: {error}; its data is kept in {where}"
        log.error("%s", line)
        if where is not None:
            self.unsaved.append(line)

    async def commit_all(self) -> None:
        """Commit every file, as at the end of the mount. Failures are reported and put aside.

        Side by side: without a server each waits for its time limit.
        """
        limiter = trio.CapacityLimiter(64)

        async def commit(file: File) -> None:
            async with limiter:
                with contextlib.suppress(StoreError):
                    await file.commit()

        async with trio.open_nursery() as nursery:
            for file in list(self._files.values()):
                if file.needs_commit:
                    nursery.start_soon(commit, file)

    async def close(self) -> None:
        """After the last request of the kernel: commit, and drop everything."""
        await self.commit_all()
        for file in list(self._files.values()):
            try:
                await file.close()
            except Exception:
                log.exception("closing %s failed", file.inode.name)
        self._files.clear()
        self._handles.clear()


def error_number(error: StoreError | OSError) -> int:
    """The errno a system call returns for a failure of the store or of the spool."""
    if isinstance(error, BucketGone):
        return errno.ENOENT
    return error.errno or errno.EIO

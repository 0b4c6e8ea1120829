"""The open files of a mount, and the handles that lead to them."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter

import trio

from natsfs.catalog.inodes import Inode
from natsfs.catalog.metadata import Metadata
from natsfs.catalog.xattrs import Edit, add
from natsfs.errors import BucketGone, ChunksGone, Conflict, StoreError
from natsfs.files.ahead import Ahead
from natsfs.files.file import ATTEMPTS, File
from natsfs.files.reader import SMALL, SMALL_AHEAD, Sequence, Version
from natsfs.files.spool import DATA, ID_SHOWN
from natsfs.holders import open_for_writing
from natsfs.options import recover_command
from natsfs.volume import Volume

log = logging.getLogger(__name__)

LOOK = 1.0  # seconds between two looks at the files that are open and dirty
NOTING = 0.01  # seconds at one look for notes of what is dirty, some 200 us each
SMALL_READ = 32 * 1024  # bytes; the kernel asks for more at a time where a program reads from start to end


@dataclass(slots=True)
class Handle:
    """What open(2) returned. `flags` are open(2)'s."""

    file: File
    flags: int
    failures: int  # of the file's commits that this handle has reported or that were before its time
    sequence: Sequence = field(default_factory=Sequence)
    flushed: bool = False  # whether a descriptor of it was closed: then it has, or had, duplicates

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY


class Files:
    def __init__(self, volume: Volume, nursery: trio.Nursery) -> None:
        self.volume = volume
        self.nursery = nursery
        self.mount = secrets.token_hex(4)  # what was appended here is known by it
        self.unsaved: list[str] = []
        self._files: dict[int, File] = {}
        self._handles: dict[int, Handle] = {}
        self._next = 0
        self._ahead = Ahead(SMALL, min(SMALL_AHEAD, volume.config.options.cache_size // 8))

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
        self.volume.store.courtesy.asked()
        file = self._acquire(inode)
        self._next += 1
        handle = Handle(file, flags, file.failures)
        self._handles[self._next] = handle
        # Taken by writers, too: chunks of a version that somebody has open are not purged.
        version = file.version()
        number = self._next
        if handle.writable:
            file.writers += 1
        if version is not None and flags & os.O_ACCMODE != os.O_WRONLY and not flags & os.O_TRUNC:
            catalog = inode.bucket
            mounted = self.volume.buckets.get(catalog.name) if catalog is not None else None
            forgets = mounted is not None and mounted.info is not None and mounted.info.forgets
            if not handle.writable:
                self._fetch_ahead(inode)
            try:
                await self.volume.reader.opened(version, prove=forgets)
            except ChunksGone:
                await self.release(number)
                if inode.meta is not None and catalog is not None:
                    self._refuse_hollow(
                        inode, version, await self.volume.refresh(catalog, inode.meta.subject)
                    )
                raise
            except BaseException:
                await self.release(number)
                raise
        return number

    def _fetch_ahead(self, inode: Inode) -> None:
        nodes = self._ahead.opened(inode.node) if inode.node is not None else []
        metas = [node.meta for node in nodes if node.meta is not None and not node.is_dir and node.parent]
        if metas:
            self.nursery.start_soon(self.volume.reader.prepare, metas)

    def _refuse_hollow(self, inode: Inode, version: Version, meta: Metadata | None) -> None:
        """Chunks of `version` are gone. Raises if its name still leads to it, by the leader's word, which is `meta`."""
        assert inode.bucket is not None
        if meta is None or meta.deleted or meta.nuid != version.meta.nuid:
            return
        mounted = self.volume.buckets.get(inode.bucket.name)
        if mounted is not None and mounted.info is not None and mounted.info.forgets:
            # A chmod renews the age of the metadata and not that of the chunks, which are older anyway.
            raise OSError(errno.ENOENT, "the content has expired", inode.name)
        log.error(
            "%s/%s has lost its content: chunks of %s are gone", inode.bucket.name, inode.name, meta.nuid
        )
        raise OSError(errno.EIO, "chunks are gone", inode.name)

    def handle(self, fh: int) -> Handle:
        return self._handles[fh]

    async def read(self, fh: int, offset: int, size: int) -> bytes:
        handle = self._handles[fh]
        if size <= SMALL_READ:
            self.volume.store.courtesy.asked()
        return await handle.file.read(offset, size, handle.sequence)

    async def write(self, fh: int, offset: int, data: bytes) -> int:
        handle = self._handles[fh]
        return await handle.file.write(offset, data, append=bool(handle.flags & os.O_APPEND))

    async def flush(self, fh: int) -> None:
        """close(2) of one descriptor. Raises what the commit raised.

        Each duplicate's close comes here and none says whether it is the last one. A commit that is not worth its
        upload waits for another only where another is sure to come: while somebody is seen to have a descriptor.
        """
        handle = self._handles[fh]
        if not handle.writable:
            return
        file, seen = handle.file, handle.flushed
        handle.flushed = True
        wasteful = seen and file.dirty and file.writers == 1 and not file.pace.affordable(file.inode.size)
        if wasteful and await trio.to_thread.run_sync(open_for_writing, int(file.inode.ino)):
            log.debug("the commit of %s waits for the close of another descriptor", file.inode.name)
            return
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
        finally:
            await file.shown()
        if handle.writable and handle.failures < file.failures and file.last_error is not None:
            handle.failures = file.failures
            raise file.last_error

    async def release(self, fh: int) -> None:
        handle = self._handles.pop(fh)
        self.volume.reader.turned(handle.sequence)
        if handle.writable:
            handle.file.writers -= 1
        await self._release(handle.file)

    async def commit_what_stays_open(self) -> None:
        """A file that nobody closes is committed now and then; whoever it fails for hears of it at a close or fsync."""
        while True:
            await trio.sleep(LOOK)
            now = time.monotonic()
            for file in list(self._files.values()):
                inode = file.inode
                mounted = self.volume.buckets.get(inode.bucket.name) if inode.bucket is not None else None
                if mounted is None or not mounted.followed or not file.needs_commit:
                    continue
                file.publish_what_rests(now)
                if file.pace.due(inode.size, now):
                    with contextlib.suppress(StoreError):
                        async with self.using(inode):
                            await file.commit(tentative=True)

    async def note_what_stays_open(self) -> None:
        """What is not committed for more than a moment is on the disk, and described there, for `natsfs recover`.

        A file that is closed at once costs nothing.
        """
        waiting: list[File] = []
        while True:
            await trio.sleep(LOOK)
            try:
                self.volume.spool.flush()
            except Exception:
                log.exception("the spool was not written out")
            # Those that had no turn at the last look come first.
            waiting = waiting or list(self._files.values())
            end = perf_counter() + NOTING
            while waiting and perf_counter() < end:
                file = waiting.pop()
                try:
                    file.note()
                except Exception:
                    log.exception("no note of %s", file.inode.name)

    # --- attributes -------------------------------------------------------------------------------------------

    async def publish_attributes(self, inode: Inode, more: tuple[Edit, ...] = ()) -> None:
        """Store the inode's attributes, with the edits that wait and `more`, in the metadata of its version."""
        catalog = inode.bucket
        assert catalog is not None
        volume = self.volume
        async with volume.mounted_of(catalog).names.shared():
            for _ in range(ATTEMPTS):
                meta = inode.meta
                if inode.node is None or meta is None:
                    if inode.unlinked or not more:
                        return  # the name leads to something else: nobody could ever see them
                    raise Conflict(f"{inode.name!r} was replaced by somebody else meanwhile", 0)
                edits = inode.edits
                async with volume.operation(catalog) as operation:
                    try:
                        stored = await operation.publish(
                            inode.describe(meta, more), catalog.last_seq(meta.subject)
                        )
                    except Conflict:
                        await volume.refresh(catalog, meta.subject)
                        continue
                    operation.apply(stored, inode)
                    inode.edits_stored(edits)
                return
        raise Conflict(f"{inode.name!r} is changed by others all the time", 0)

    async def attributes_changed(self, inode: Inode) -> None:
        """chmod, chown or utimensat on a file: stored with its content, with a rename, at fsync, or in a moment.

        Where the last message was refused nothing is left for later: then the error is the call's.
        """
        catalog = inode.bucket
        if inode.unlinked or catalog is None:
            return
        self.volume.check_writable(catalog)
        inode.uncommitted = True
        file = self._acquire(inode)
        file.attributes_dirty = True
        if not file.writers and not self.volume.mounted_of(catalog).takes:
            try:
                if inode.meta is not None:
                    await file.commit()
            finally:
                await self._release(file)
            return
        if file.settling:
            file.handles -= 1
        else:
            file.settling = True
            self.volume.deferred.later(partial(self._settle, file))

    async def _settle(self, file: File) -> None:
        file.settling = False
        try:
            # A commit that is under way may have described the file before the change, and be the last one.
            async with file.lock:
                pass
            if not (file.dirty and file.writers):
                with contextlib.suppress(StoreError):
                    await file.commit()
        finally:
            await self._release(file)

    async def edit(self, inode: Inode, edit: Edit) -> None:
        """setxattr or removexattr on a file: with the content where that waits for its commit, else now.

        Now means that the error is the call's, and that nothing has changed then.
        """
        if inode.bucket is not None:
            self.volume.check_writable(inode.bucket)
        # A commit under way may be the last that anybody asks for: whether the edit is still due is known after it.
        async with self.using(inode) as file, file.lock:
            attributes = inode.attributes
            before, attributes.ctime_ns = attributes.ctime_ns, time.time_ns()
            if inode.unlinked or file.dirty or inode.meta is None:
                inode.edits = add(inode.edits, edit)
                file.attributes_dirty = inode.uncommitted = True
                return
            waiting, file.attributes_dirty = file.attributes_dirty, False
            inode.uncommitted = True
            try:
                async with file.publishing:
                    await self.publish_attributes(inode, (edit,))
            except BaseException:
                attributes.ctime_ns = before
                file.attributes_dirty |= waiting
                raise
            finally:
                inode.uncommitted = file.needs_commit

    # --- the end ----------------------------------------------------------------------------------------------

    def report_unsaved(self, inode: Inode, error: StoreError, where: Path | None) -> None:
        bucket = inode.bucket.name if inode.bucket is not None else "?"
        name = f"{bucket}/{inode.name}"
        if where is None and isinstance(error, BucketGone):
            return  # there is nothing left that could have them
        if where is None:
            line = f"attributes of {name} could not be stored: {error}"
        else:
            line = f"{name} could not be committed: {error}; its data is kept in {where}"
            if where.suffix == DATA:
                command = recover_command(
                    self.volume.config.options.spool_dir, where.stem[:ID_SHOWN], "--to", "DIR"
                )
                line += f", to copy it out: {command}"
        log.error("%s", line)
        if where is not None:
            self.unsaved.append(line)

    async def commit_all(self) -> None:
        """Commit every file, as at the end of the mount. Failures are reported and put aside.

        Side by side: without a server each waits for its time limit.
        """
        limiter = trio.CapacityLimiter(64)
        await self.volume.deferred.settle()

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

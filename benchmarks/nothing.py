"""A pyfuse3 mount whose handlers do nothing: `python -m benchmarks.nothing DIR`. It is the ceiling for Python.

Names and sizes are kept in a dictionary, what is written is dropped, and reading gives zeros.
"""

from __future__ import annotations

import errno
import signal
import stat
import sys
from collections.abc import Sequence

import pyfuse3
import trio
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    ModeT,
    ReaddirToken,
    RequestContext,
    SetattrFields,
)

FOREVER = 1e6


class Entry:
    """A name with what stat(2) tells of it."""

    def __init__(self, ino: int, mode: int) -> None:
        self.children: dict[bytes, Entry] = {}
        self.attributes = attributes = EntryAttributes()
        attributes.st_ino = InodeT(ino)
        attributes.st_mode = ModeT(mode)
        attributes.st_nlink = 1
        attributes.st_size = 0
        attributes.entry_timeout = attributes.attr_timeout = FOREVER


class Nothing(pyfuse3.Operations):
    enable_writeback_cache = False

    def __init__(self) -> None:
        super().__init__()
        self._entries = {1: Entry(1, stat.S_IFDIR | 0o755)}
        self._zeros = bytes(4 << 20)

    def _child(self, parent: int, name: bytes) -> Entry:
        try:
            return self._entries[parent].children[name]
        except KeyError:
            raise FUSEError(errno.ENOENT) from None

    def _add(self, parent: int, name: bytes, mode: int) -> Entry:
        ino = len(self._entries) + 1
        entry = self._entries[parent].children[name] = self._entries[ino] = Entry(ino, mode)
        return entry

    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> EntryAttributes:
        return self._child(parent_inode, name).attributes

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        pass

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return self._entries[inode].attributes

    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        own = self._entries[inode].attributes
        if fields.update_size:
            own.st_size = attr.st_size
        if fields.update_mtime:
            own.st_mtime_ns = attr.st_mtime_ns
        if fields.update_mode:
            own.st_mode = attr.st_mode
        return own

    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext
    ) -> EntryAttributes:
        return self._add(parent_inode, name, stat.S_IFDIR | mode).attributes

    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: FlagT, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        entry = self._add(parent_inode, name, stat.S_IFREG | mode)
        return FileInfo(fh=FileHandleT(entry.attributes.st_ino), keep_cache=True), entry.attributes

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        return FileInfo(fh=FileHandleT(inode), keep_cache=True)

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        return self._zeros[: max(0, min(size, self._entries[fh].attributes.st_size - off))]

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        own = self._entries[fh].attributes
        own.st_size = max(own.st_size, off + len(buf))
        return len(buf)

    async def flush(self, fh: FileHandleT) -> None:
        pass

    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        pass

    async def release(self, fh: FileHandleT) -> None:
        pass

    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        del self._entries[parent_inode].children[name]

    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        del self._entries[parent_inode].children[name]

    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> None:
        moved = self._entries[parent_inode_old].children.pop(name_old)
        self._entries[parent_inode_new].children[name_new] = moved

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        return FileHandleT(inode)

    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        entries = list(self._entries[fh].children.items())
        for number, (name, entry) in enumerate(entries[start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, FileNameT(name), entry.attributes, number):
                return

    async def releasedir(self, fh: FileHandleT) -> None:
        pass


async def _serve() -> None:
    async with trio.open_nursery() as nursery:

        async def end() -> None:
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                async for _ in signals:
                    pyfuse3.terminate()
                    return

        nursery.start_soon(end)
        await pyfuse3.main(min_tasks=4, max_tasks=16)
        nursery.cancel_scope.cancel()


def main(mountpoint: str) -> None:
    pyfuse3.init(Nothing(), mountpoint, {"fsname=nothing", "default_permissions"})
    try:
        trio.run(_serve)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main(sys.argv[1])

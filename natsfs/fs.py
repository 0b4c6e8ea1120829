"""The FUSE handlers: decode the request, call, reply. No policy lives here.

Every handler answers with a reply or an errno, whatever happens: pyfuse3 ends the mount when a handler raises
anything but FUSEError, and no foreign message may do that.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ParamSpec, TypeVar

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
    StatvfsData,
    XAttrNameT,
)

from natsfs.catalog.attributes import Attributes
from natsfs.catalog.inodes import Inode, Node
from natsfs.catalog.xattrs import PREFIX
from natsfs.errors import ChunksGone, StoreError
from natsfs.files.files import Files, error_number
from natsfs.names import NAME_MAX
from natsfs.namespace import Caller, Namespace
from natsfs.volume import Volume
from natsfs.workers import answering
from natsfs.xattrs import ExtendedAttributes

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

FOREVER = 365 * 86400  # seconds; the watcher tells the kernel what is no longer true
DIRECTORY_SIZE = 4096
KEPT = 4096  # entries of listings that are kept as they were answered, some 400 bytes each
UNLIMITED = 1 << 50  # bytes that statfs(2) shows as the size of a bucket without a limit


def answered(handler: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Turn every exception of a handler into the errno of its call."""

    @functools.wraps(handler)
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await answering(handler(*args, **kwargs))
        except FUSEError:
            raise
        except StoreError as error:
            log.warning("%s: %s", handler.__name__, error)
            raise FUSEError(error_number(error)) from None
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from None
        except Exception:
            log.exception("%s failed", handler.__name__)
            raise FUSEError(errno.EIO) from None

    return wrapper


def fill(entry: EntryAttributes, ino: int, attributes: Attributes, size: int) -> None:
    """As of a regular file with one name."""
    entry.st_ino = InodeT(ino)
    entry.st_mode = ModeT(attributes.mode)
    entry.st_nlink = 1
    entry.st_uid = attributes.uid
    entry.st_gid = attributes.gid
    entry.st_rdev = attributes.rdev
    entry.st_atime_ns = attributes.atime_ns
    entry.st_mtime_ns = attributes.mtime_ns
    entry.st_ctime_ns = attributes.ctime_ns
    entry.st_size = size
    entry.st_blocks = (size + 511) // 512


class _Listing:
    """An open directory: its entries as they were at the start of the listing."""

    __slots__ = ("entries", "inode")

    def __init__(self, inode: Inode) -> None:
        self.inode = inode
        self.entries: list[Node] | None = None


class FileSystem(pyfuse3.Operations):
    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, volume: Volume, namespace: Namespace, files: Files) -> None:
        super().__init__()
        self._volume = volume
        self._names = namespace
        self._files = files
        self._xattrs = ExtendedAttributes(volume, namespace)
        self._listings: dict[int, _Listing] = {}
        # By inode number, with the packed message that each was made of.
        self._kept: dict[int, tuple[bytes, EntryAttributes]] = {}
        self._next_listing = 0

    # --- helpers ----------------------------------------------------------------------------------------------

    def _inode(self, ino: int) -> Inode:
        try:
            return self._volume.inodes.get(ino)
        except KeyError:
            raise FUSEError(errno.ESTALE) from None

    def _named(self, ino: int) -> Inode:
        """The inode of a call that may have come by path.

        The kernel hears of what others do a moment later than this mount. After ESTALE it looks again at a name that it
        took for one that is gone: otherwise what is written or set now would go to nobody.
        """
        inode = self._inode(ino)
        if inode.gone and not inode.pins:
            raise FUSEError(errno.ESTALE)
        return inode

    def _blank(self) -> EntryAttributes:
        entry = EntryAttributes()
        entry.generation = 0
        entry.entry_timeout = entry.attr_timeout = FOREVER
        entry.st_blksize = self._volume.config.options.chunk_size
        return entry

    def _attributes(self, inode: Inode) -> EntryAttributes:
        entry = self._blank()
        fill(entry, inode.ino, inode.attributes, self._volume.notifier.size_of(inode.ino, inode.size))
        if inode.is_dir:
            entry.st_nlink = 2 + inode.node.subdirs if inode.node is not None else 0
            entry.st_size = DIRECTORY_SIZE
            entry.st_blocks = 0
        else:
            entry.st_nlink = 0 if inode.unlinked or inode.node is None else 1
            mode = inode.attributes.mode
            if stat.S_ISLNK(mode):
                entry.st_size = len(self._names.link_text(inode))
            if not stat.S_ISREG(mode):
                entry.st_blocks = 0
        return entry

    def _entry(self, inode: Inode) -> EntryAttributes:
        """A reply that gives the kernel one reference to the inode."""
        inode.nlookup += 1
        return self._attributes(inode)

    @staticmethod
    def _caller(ctx: RequestContext) -> Caller:
        return Caller(ctx.uid, ctx.gid, ctx.pid)

    # --- names ------------------------------------------------------------------------------------------------

    @answered
    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> EntryAttributes:
        inode = await self._names.lookup(self._inode(parent_inode), name)
        if inode is None:
            # An entry without an inode tells the kernel to remember that there is none.
            absent = EntryAttributes()
            absent.st_ino = InodeT(0)
            absent.entry_timeout = FOREVER
            return absent
        return self._entry(inode)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for ino, count in inode_list:
            self._volume.inodes.forget(ino, count)

    @answered
    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(await self._names.mkdir(self._inode(parent_inode), name, mode, self._caller(ctx)))

    @answered
    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        parent = self._inode(parent_inode)
        return self._entry(await self._names.make_node(parent, name, mode, rdev, self._caller(ctx)))

    @answered
    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(
            await self._names.symlink(self._inode(parent_inode), name, target, self._caller(ctx))
        )

    @answered
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        return FileNameT(await self._names.readlink(self._inode(inode)))

    @answered
    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        # Two names on one nuid lose their data when another client deletes one of them.
        raise FUSEError(errno.EPERM)

    @answered
    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        await self._names.unlink(self._inode(parent_inode), name)

    @answered
    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        await self._names.rmdir(self._inode(parent_inode), name)

    @answered
    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> None:
        if flags & ~(pyfuse3.RENAME_NOREPLACE | pyfuse3.RENAME_EXCHANGE):
            raise FUSEError(errno.EINVAL)  # RENAME_WHITEOUT: only overlayfs asks for it
        await self._names.rename(
            self._inode(parent_inode_old),
            name_old,
            self._inode(parent_inode_new),
            name_new,
            self._caller(ctx),
            replace_target=not flags & pyfuse3.RENAME_NOREPLACE,
            exchange=bool(flags & pyfuse3.RENAME_EXCHANGE),
        )

    # --- attributes -------------------------------------------------------------------------------------------

    @answered
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return self._attributes(self._inode(inode))

    @answered
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        node = self._inode(inode) if fh is not None else self._named(inode)
        if fields.update_size:
            if fh is not None:
                await self._files.handle(fh).file.truncate(attr.st_size)
                self._names.truncated(node, self._caller(ctx))
            else:
                async with self._files.using(node) as file:
                    await file.truncate(attr.st_size)
                    self._names.truncated(node, self._caller(ctx))
                    if not file.writers:
                        await file.commit()
                        await file.shown()
        changes = {
            "mode": attr.st_mode if fields.update_mode else None,
            "uid": attr.st_uid if fields.update_uid else None,
            "gid": attr.st_gid if fields.update_gid else None,
            "atime_ns": attr.st_atime_ns if fields.update_atime else None,
            "mtime_ns": attr.st_mtime_ns if fields.update_mtime else None,
        }
        # A chown that names nobody comes without any field; it changes ctime all the same. So does what a write of
        # somebody else than root takes away of a mode (see `handshake`).
        if not fields.update_size or any(value is not None for value in changes.values()):
            await self._names.set_attributes(node, **changes)
        return self._attributes(node)

    # --- extended attributes ----------------------------------------------------------------------------------

    @answered
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        # First of all, since the kernel asks for security.capability before the first write of each file.
        if not name.startswith(PREFIX):
            raise FUSEError(errno.EOPNOTSUPP)
        return await self._xattrs.get(self._inode(inode), name)

    @answered
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        return [XAttrNameT(name) for name in self._xattrs.list(self._inode(inode))]

    @answered
    async def setxattr(self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext) -> None:
        # XATTR_CREATE and XATTR_REPLACE: pyfuse3 asks getxattr first, while the kernel holds the inode's lock.
        if not name.startswith(PREFIX):
            raise FUSEError(errno.EOPNOTSUPP)
        await self._xattrs.set(self._named(inode), name, value)

    @answered
    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        if not name.startswith(PREFIX):
            raise FUSEError(errno.EOPNOTSUPP)
        await self._xattrs.remove(self._named(inode), name)

    # --- directories ------------------------------------------------------------------------------------------

    @answered
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        self._next_listing += 1
        self._listings[self._next_listing] = _Listing(self._inode(inode))
        return FileHandleT(self._next_listing)

    @answered
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        listing = self._listings[fh]
        if start_id == 0 or listing.entries is None:
            try:
                listing.entries = await self._names.entries(listing.inode)
            except FileNotFoundError:
                listing.entries = []  # removed under its reader: an empty directory, as on a local file system
        position = start_id
        dots = ((b".", listing.inode), (b"..", self._names.parent_of(listing.inode)))
        for name, inode in dots[position:]:
            if not pyfuse3.readdir_reply(token, FileNameT(name), self._attributes(inode), position + 1):
                return
            position += 1
        again = len(listing.entries) <= KEPT
        entry = self._blank()
        # By number, not by a slice: of a million entries that would be a copy for each of some thousand calls.
        for number in range(max(0, start_id - 2), len(listing.entries)):
            node = listing.entries[number]
            position += 1
            parent = node.parent
            if parent is None or (parent.children or {}).get(node.name) is not node:
                continue  # removed since
            found = self._listed(node, None if again else entry)
            if found is not None:
                if not pyfuse3.readdir_reply(token, FileNameT(node.name), found, position):
                    return
                self._volume.inodes.doze(node)
                continue
            inode = self._names.inode_of(node)
            if not pyfuse3.readdir_reply(token, FileNameT(node.name), self._attributes(inode), position):
                self._volume.inodes.release(inode)
                return
            inode.nlookup += 1

    def _listed(self, node: Node, entry: EntryAttributes | None) -> EntryAttributes | None:
        """What a listing tells of a regular file without an inode; None of anything else.

        It is kept, to make it only once for listings that come again, unless there is an `entry` to fill.
        """
        packed = node.packed
        kept = None if packed is None else self._kept.get(node.ino)
        if kept is not None and kept[0] is packed and self._volume.inodes.has_number(node):
            return kept[1]
        glance = None if node.bucket is None else node.bucket.glance(node)
        if glance is None:
            return None
        filled = entry or self._blank()
        fill(filled, node.ino, *glance)
        if packed is not None and entry is None:
            if len(self._kept) >= KEPT:
                self._kept.clear()
            self._kept[node.ino] = packed, filled
        return filled

    @answered
    async def releasedir(self, fh: FileHandleT) -> None:
        del self._listings[fh]

    @answered
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """Every change of a name was acknowledged by the server before its call returned; attributes may wait."""
        await self._volume.deferred.settle()

    # --- files ------------------------------------------------------------------------------------------------

    @answered
    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: FlagT, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        inode = await self._names.create(self._inode(parent_inode), name, mode, flags, self._caller(ctx))
        was_there = inode.meta is not None and not flags & os.O_EXCL
        handle = await self._open(inode, flags)
        if was_there and flags & os.O_TRUNC:
            self._names.truncated(inode, self._caller(ctx))
        return FileInfo(fh=handle, keep_cache=True), self._entry(inode)

    @answered
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        node = self._named(inode)
        handle = await self._open(node, flags)
        if flags & os.O_TRUNC:
            self._names.truncated(node, self._caller(ctx))
        return FileInfo(fh=handle, keep_cache=True)

    async def _open(self, inode: Inode, flags: int) -> FileHandleT:
        if flags & os.O_ACCMODE != os.O_RDONLY and inode.bucket is not None:
            self._volume.check_writable(inode.bucket)
        try:
            fh = await self._files.open(inode, flags)
        except ChunksGone as error:
            log.info("open: %s; the kernel looks again", error)
            raise FUSEError(errno.ESTALE) from None
        if flags & os.O_TRUNC or (inode.meta is None and not inode.unlinked):
            # A new file has to be committed even if nothing is ever written to it.
            try:
                await self._files.handle(fh).file.truncate(0 if flags & os.O_TRUNC else inode.size)
            except BaseException:
                await self._files.release(fh)  # the kernel gets no handle that it could release
                raise
        return FileHandleT(fh)

    @answered
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        return await self._files.read(fh, off, size)

    @answered
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        try:
            return await self._files.write(fh, off, buf)
        except OSError as error:
            # Of the local disk, which nobody would think of who sees the program's error alone.
            log.warning(
                "nothing can be written in %s: %s", self._volume.config.options.spool_dir, error.strerror
            )
            raise

    @answered
    async def flush(self, fh: FileHandleT) -> None:
        await self._files.flush(fh)

    @answered
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        await self._files.fsync(fh)

    @answered
    async def release(self, fh: FileHandleT) -> None:
        await self._files.release(fh)

    # --- the whole --------------------------------------------------------------------------------------------

    @answered
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        volume = self._volume
        if volume.config.bucket is not None:
            info = await volume.info(volume.buckets[volume.config.bucket])
            used, limit = info.bytes, info.max_bytes
        else:
            used, limit = await volume.account_use()
        block = 4096
        total = limit if limit > 0 else used + UNLIMITED
        data = StatvfsData()
        data.f_bsize = data.f_frsize = block
        data.f_blocks = total // block
        data.f_bfree = data.f_bavail = max(0, total - used) // block
        # Objects are not limited in number; a million is what programs like to see free.
        data.f_files = len(volume.inodes) + 1_000_000
        data.f_ffree = data.f_favail = 1_000_000
        data.f_namemax = NAME_MAX
        return data

    def stacktrace(self) -> None:
        """Asked for by ``setfattr -n fuse_stacktrace`` on the root, to find what hangs."""
        for task in _all_tasks(trio.lowlevel.current_root_task()):
            log.error("task %s", task.name)


def _all_tasks(task: Any) -> list[Any]:
    if task is None:
        return []
    found = [task]
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            found += _all_tasks(child)
    return found

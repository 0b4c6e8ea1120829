"""The calls that work on names: look up, create, remove, rename, link, and change attributes.

Every change is one or two metadata messages with compare-and-swap, then the same change in the catalog. The errors
are OSErrors with the errno that a local file system gives, or `StoreError`s.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

import trio

from natsfs.catalog.attributes import SYMLINK_KEY, Attributes, renamed_at, same_inode
from natsfs.catalog.bucket import Bucket
from natsfs.catalog.inodes import AttributesChanged, EntryChanged, Ino, Inode, Node
from natsfs.catalog.metadata import Link, Metadata, new_nuid, tombstone
from natsfs.catalog.xattrs import Edit, add, edited
from natsfs.errors import BucketExists, BucketFull, BucketGone, Conflict, StoreError, Unreachable
from natsfs.files.file import ATTEMPTS, EMPTY_DIGEST
from natsfs.files.files import Files
from natsfs.names import (
    BUCKET_NAME,
    NAME_MAX,
    SELF,
    NameRefused,
    Path,
    encode_subject,
    marker_of,
    name_of,
    path_of,
)
from natsfs.volume import Mounted, Operation, Sent, Volume

log = logging.getLogger(__name__)

PIPELINE = 64  # messages of one directory rename under way at a time


@dataclass(frozen=True, slots=True)
class Caller:
    uid: int
    gid: int
    pid: int  # of the thread


class _WasThere(Exception):
    """A name that must be free was somebody's until `seq`, a moment ago."""

    def __init__(self, seq: int) -> None:
        super().__init__(seq)
        self.seq = seq


@dataclass(eq=False, slots=True)
class _Step:
    """What a directory's rename does with one entry: `new` is published, then `grave` where `old` was."""

    entry: Node
    old: Metadata
    new: Metadata
    grave: Metadata | None = None
    left: bool = False  # others have used the old name since
    # Somebody else makes the same rename: the new name is not ours to remove, nor what follows under the old one, which
    # may have been free by then, ours to move.
    shared: bool = False


def refuse(number: int, name: bytes = b"") -> OSError:
    return OSError(number, os.strerror(number), name)


class Namespace:
    def __init__(self, volume: Volume, files: Files) -> None:
        self._volume = volume
        self._files = files
        self._settling: set[Inode] = set()  # directories whose attributes are to be stored in a moment
        self._refused: set[tuple[int, Ino, bytes]] = set()  # who was told to look at a name again

    # --- finding ----------------------------------------------------------------------------------------------

    async def directory(self, inode: Inode) -> Node:
        """The node of a directory's inode, its bucket loaded. Raises ENOENT if it was removed."""
        node = inode.node
        if not inode.is_dir:
            raise refuse(errno.ENOTDIR)
        if node is None:
            raise refuse(errno.ENOENT)
        catalog = node.bucket
        if catalog is None:
            if node is self._volume.root:
                return node
            catalog = await self._volume.load(self._volume.buckets[node.name.decode()])
            return catalog.root
        if not catalog.loaded:
            # Somebody else came first, a purge perhaps: what is there so far is a part of it.
            await self._volume.load(self._volume.mounted_of(catalog))
            return await self.directory(inode)
        return node

    def inode_of(self, node: Node) -> Inode:
        """The inode of a node; of a bucket that nobody has used yet, too."""
        if node.bucket is not None:
            return node.bucket.inode_of(node)
        if node.inode is None:
            volume = self._volume
            mounted = volume.buckets[node.name.decode()]
            assert mounted.info is not None
            defaults = volume.defaults
            # The same key as `Bucket.inode_of` uses for the root of the catalog that will take this node's place.
            ino = volume.inodes.number(mounted.name, mounted.info.created, "D", "")
            born = volume.created_ns(mounted)
            mode = stat.S_IFDIR | defaults.dir_mode
            attributes = Attributes(mode, defaults.uid, defaults.gid, 0, born, born, born, born)
            node.inode = Inode(ino, None, node, attributes)
            node.ino = ino
            # Its attributes are stored nowhere else: they have to stay when the kernel forgets it.
            node.inode.pins += 1
            volume.inodes.add(node.inode)
        return node.inode

    async def lookup(self, parent: Inode, name: bytes) -> Inode | None:
        if len(name) > NAME_MAX:
            raise refuse(errno.ENAMETOOLONG, name)
        self._volume.store.courtesy.asked()
        node = await self.directory(parent)
        assert node.children is not None
        found = node.children.get(name)
        return None if found is None else self.inode_of(found)

    async def entries(self, parent: Inode) -> list[Node]:
        self._volume.store.courtesy.asked()
        node = await self.directory(parent)
        assert node.children is not None
        return list(node.children.values())

    def parent_of(self, inode: Inode) -> Inode:
        node = inode.node
        if node is None or node is self._volume.root or node.parent is None:
            return inode
        return self.inode_of(node.parent)

    # --- helpers ----------------------------------------------------------------------------------------------

    async def _place(self, parent: Inode, name: bytes, *, marker: bool = False) -> tuple[Bucket, Node, str]:
        """Where a new entry goes: its catalog, its directory and the name of its object, or of its marker."""
        node = await self.directory(parent)
        if len(name) > NAME_MAX:
            raise refuse(errno.ENAMETOOLONG, name)
        if node.bucket is None:
            raise refuse(errno.EPERM, name)  # the root of all buckets holds buckets only
        path = (*node.path(), name)
        return node.bucket, node, marker_name(path) if marker else object_name(path)

    @staticmethod
    def _name(directory: Node, name: bytes) -> str:
        return object_name((*directory.path(), name))

    @staticmethod
    def _child(directory: Node, name: bytes) -> Node | None:
        assert directory.children is not None
        return directory.children.get(name)

    def _new_attributes(self, parent: Inode, mode: int, caller: Caller, rdev: int = 0) -> Attributes:
        """Of something new: a set-group-ID directory hands its group down, and directories the bit (inode(7))."""
        now = time.time_ns()
        gid = caller.gid
        if parent.attributes.mode & stat.S_ISGID:
            gid = parent.attributes.gid
            if stat.S_ISDIR(mode):
                mode |= stat.S_ISGID
        return Attributes(mode, caller.uid, gid, rdev, now, now, now, now, self._volume.inodes.fresh())

    def _empty(self, catalog: Bucket, name: str, attributes: dict[str, str]) -> Metadata:
        return Metadata(
            name=name,
            bucket=catalog.name,
            nuid=new_nuid(),
            chunk_size=self._volume.config.options.chunk_size,
            digest=EMPTY_DIGEST,
            attributes=attributes,
            subject=catalog.subject_prefix() + encode_subject(name),
        )

    @asynccontextmanager
    async def _changing(self, catalog: Bucket) -> AsyncIterator[Operation]:
        self._volume.check_writable(catalog)
        async with (
            self._volume.mounted_of(catalog).names.shared(),
            self._volume.operation(catalog) as operation,
        ):
            yield operation

    async def _create(
        self, catalog: Bucket, parent: Inode, name: bytes, meta: Metadata, caller: Caller
    ) -> Metadata:
        """Publish an object that must not exist yet, against everybody else's attempts. Raises EEXIST.

        Whoever has it sees all that was done before it was free, by who had it as a lock for one.
        """
        again = self._came_again(caller, parent, name)
        self._check_free(caller, parent, name, again)
        for _ in range(ATTEMPTS):
            expected = catalog.last_seq(meta.subject)
            async with self._changing(catalog) as operation:
                # Looked at again: somebody's object may have arrived while the lock was waited for, and its
                # sequence must not be the one that is expected.
                if catalog.live(meta.subject) is not None:
                    raise refuse(errno.EEXIST)
                try:
                    # A lock file that nobody knows to have made would stay for ever.
                    async with self._all_or_nothing(operation, catalog):
                        stored = await operation.publish(meta, catalog.last_seq(meta.subject))
                except Conflict:
                    pass
                else:
                    operation.apply(stored)
                    return stored
            await self._volume.refresh(catalog, meta.subject)
            there = catalog.live(meta.subject)
            if there is not None and there.nuid == meta.nuid:
                return there  # the answer was lost, and somebody has changed its attributes since
            seq = catalog.last_seq(meta.subject)
            if there is not None:
                raise refuse(errno.EEXIST)
            if seq > expected:
                await self._hear_of(catalog, seq, parent, name)
                self._check_free(caller, parent, name, again)
        raise refuse(errno.EEXIST)

    async def _hear_of(self, catalog: Bucket, seq: int, parent: Inode, name: bytes) -> None:
        """Somebody had a name, and `seq` is its removal: of what they did before that nothing may have been heard."""
        await self._volume.hear(catalog, seq)
        self._volume.notifier.send([EntryChanged(parent.ino, name)])  # behind the news of the directory

    def _check_free(self, caller: Caller, parent: Inode, name: bytes, again: bool) -> None:
        """Raise ESTALE, or if the call came `again` EEXIST, where the kernel has not heard of who had the name last."""
        if self._volume.notifier.owes(parent.ino, name):
            if again:
                raise refuse(errno.EEXIST, name)
            self._send_again(caller, parent, name)

    def _marker(self, catalog: Bucket, node: Node) -> Metadata:
        """The marker that says about a directory what is known of it now."""
        meta = node.meta or self._empty(catalog, marker_name(node.path()), {})
        if node.inode is not None:
            return node.inode.describe(meta)
        return replace(meta, attributes=catalog.attributes(node).encode(meta.attributes))

    def _is_top(self, node: Node) -> bool:
        """Whether a directory exists without a marker: a bucket, or the mount's root."""
        return node is self._volume.root or (node.bucket is not None and node is node.bucket.root)

    async def _mark(self, catalog: Bucket, node: Node, edits: tuple[Edit, ...] = ()) -> None:
        """Write a directory's marker, with its attributes, and with `edits` made to what is stored."""
        for _ in range(ATTEMPTS):
            async with self._changing(catalog) as operation:
                if catalog.find(node.path()) is not node:
                    return  # removed while the lock was waited for
                # Built on what is there now: while the lock was waited for, another client's message may have come.
                marker = edited(self._marker(catalog, node), edits)
                try:
                    stored = await operation.publish(marker, catalog.last_seq(marker.subject))
                except Conflict:
                    pass
                else:
                    attributes = node.inode.attributes if node.inode is not None else None
                    operation.apply(stored)
                    if node.inode is not None and attributes is not None:
                        node.inode.attributes = attributes
                    return
            await self._volume.refresh(catalog, marker.subject)
        raise refuse(errno.EBUSY)

    async def _keep_directory(self, catalog: Bucket, node: Node, leaving: Node) -> None:
        """A directory that loses its last entry gets a marker, so that it stays until rmdir."""
        assert node.children is not None
        if node.meta is None and not self._is_top(node) and not others(node, leaving):
            await self._mark(catalog, node)

    # --- creating ---------------------------------------------------------------------------------------------

    async def create(self, parent: Inode, name: bytes, mode: int, flags: int, caller: Caller) -> Inode:
        """open(2) with O_CREAT. With O_EXCL the object is published at once, so that it is exclusive everywhere."""
        catalog, directory, full_name = await self._place(parent, name)
        self._volume.check_writable(catalog)
        found = self._child(directory, name)
        if found is not None:
            if flags & os.O_EXCL:
                raise refuse(errno.EEXIST, name)
            if found.is_dir:
                raise refuse(errno.EISDIR, name)
            return self.inode_of(found)
        if full_name.endswith("/"):
            raise refuse(errno.EINVAL, name)  # its object would be the directory's marker
        attributes = self._new_attributes(parent, stat.S_IFREG | stat.S_IMODE(mode), caller)
        if flags & os.O_EXCL and self._volume.config.options.excl == "cluster":
            meta = self._empty(catalog, full_name, attributes.encode(None))
            await self._create(catalog, parent, name, meta, caller)
            node = self._child(directory, name)
            if node is None:
                raise refuse(errno.EIO, name)  # somebody else removed it already
            return self.inode_of(node)
        node = catalog.add_node(directory, name, directory=False)
        node.ino = attributes.ino
        inode = Inode(Ino(node.ino), catalog, node, attributes)
        inode.name = full_name
        node.inode = inode
        self._volume.inodes.add(inode)
        catalog.touch(directory, attributes.btime_ns)
        return inode

    async def mkdir(self, parent: Inode, name: bytes, mode: int, caller: Caller) -> Inode:
        node = await self.directory(parent)
        if node.bucket is None:
            return await self._make_bucket(name)
        catalog, directory, full_name = await self._place(parent, name, marker=True)
        if self._child(directory, name) is not None:
            raise refuse(errno.EEXIST, name)
        attributes = self._new_attributes(parent, stat.S_IFDIR | stat.S_IMODE(mode), caller)
        meta = self._empty(catalog, full_name, attributes.encode(None))
        await self._create(catalog, parent, name, meta, caller)
        made = self._child(directory, name)
        if made is None:
            raise refuse(errno.EIO, name)
        return self.inode_of(made)

    async def _make_bucket(self, name: bytes) -> Inode:
        if BUCKET_NAME.fullmatch(os.fsdecode(name)) is None:
            raise refuse(errno.EINVAL, name)
        self._volume.making.add(name.decode())
        try:
            info = await self._volume.store.create_bucket(name.decode())
        except BucketExists:
            raise refuse(errno.EEXIST, name) from None
        finally:
            self._volume.making.discard(name.decode())
        mounted = self._volume.buckets.get(info.name)
        node = mounted.node if mounted is not None else self._volume.add_bucket(info)
        assert node is not None
        return self.inode_of(node)

    async def make_node(self, parent: Inode, name: bytes, mode: int, rdev: int, caller: Caller) -> Inode:
        """mknod(2): regular files, fifos, sockets and devices, all of them empty objects with a mode."""
        return await self._make_special(parent, name, mode, rdev, caller, {})

    async def symlink(self, parent: Inode, name: bytes, target: bytes, caller: Caller) -> Inode:
        """A link to an object or a bucket of the mount is one that every NATS client follows; the text is kept, too."""
        link = await self._linked(await self.directory(parent), target)
        text = target.decode("utf-8", "surrogateescape")
        return await self._make_special(
            parent, name, stat.S_IFLNK | 0o777, 0, caller, {SYMLINK_KEY: text}, link
        )

    async def _linked(self, directory: Node, target: bytes) -> Link | None:
        """The object or bucket that `target` leads to from `directory`, without any other link on the way."""
        volume = self._volume
        node = directory
        if target.startswith(b"/"):
            inside = os.fsencode(volume.config.mountpoint).rstrip(b"/") + b"/"
            if not (target + b"/").startswith(inside):
                return None
            node, target = volume.root, target[len(inside) :]
        for part in target.split(b"/"):
            if not node.is_dir:
                return None
            if part in (b"", b"."):
                continue
            found = node.parent if part == b".." else self._child(node, part)
            if found is None or (part == b".." and node is volume.root):
                return None
            node = found
            if node.bucket is None and node is not volume.root:
                node = (await volume.load(volume.buckets[node.name.decode()])).root
        if node.is_dir:
            return (
                Link(node.bucket.name, "") if node.bucket is not None and node is node.bucket.root else None
            )
        assert node.bucket is not None
        meta = node.meta
        if meta is None or not stat.S_ISREG(node.bucket.attributes(node).mode):
            return None
        return Link(meta.bucket, meta.name)

    async def _make_special(
        self,
        parent: Inode,
        name: bytes,
        mode: int,
        rdev: int,
        caller: Caller,
        more: dict[str, str],
        link: Link | None = None,
    ) -> Inode:
        catalog, directory, full_name = await self._place(parent, name)
        if self._child(directory, name) is not None:
            raise refuse(errno.EEXIST, name)
        if full_name.endswith("/"):
            raise refuse(errno.EINVAL, name)
        attributes = self._new_attributes(parent, mode, caller, rdev)
        meta = self._empty(catalog, full_name, attributes.encode(None) | more)
        if link is not None:
            meta = replace(meta, link=link, digest=None)
        await self._create(catalog, parent, name, meta, caller)
        made = self._child(directory, name)
        if made is None:
            raise refuse(errno.EIO, name)
        return self.inode_of(made)

    async def readlink(self, inode: Inode) -> bytes:
        """The text of a symbolic link; of another client's link the way to its target inside the mount."""
        meta = inode.meta
        if meta is None or not stat.S_ISLNK(inode.attributes.mode):
            raise refuse(errno.EINVAL)
        mounted = (
            self._volume.buckets.get(meta.link.bucket) if self._may_be_whole(meta) and meta.link else None
        )
        if mounted is not None:
            with suppress(StoreError):
                await self._volume.load(mounted)
        return self.link_text(inode)

    @staticmethod
    def _may_be_whole(meta: Metadata) -> bool:
        """The .NET client writes the link's own name into a link to a whole bucket."""
        return meta.link is not None and meta.link.name == meta.name

    def link_text(self, inode: Inode) -> bytes:
        """What `readlink` gives, as far as it is known without waiting."""
        meta = inode.meta
        text = (meta.attributes or {}).get(SYMLINK_KEY) if meta is not None else None
        if meta is None or text is not None or meta.link is None:
            return (text or "").encode("utf-8", "surrogateescape")
        link = meta.link
        mounted = self._volume.buckets.get(link.bucket)
        catalog = mounted.catalog if mounted is not None else None
        found = catalog.file_node(link.name) if catalog is not None and link.name else None
        if not link.name or (self._may_be_whole(meta) and (found is None or found.inode is inode)):
            target: Path = ()
        else:
            target = path_of(link.name) if found is None else found.path()
        here = inode.node.path()[:-1] if inode.node is not None else ()
        if link.bucket != meta.bucket:
            # Only where all buckets are mounted does this lead to another one.
            parts: Path = (*[b".."] * (len(here) + 1), link.bucket.encode(), *target)
        else:
            common = 0
            while common < min(len(here), len(target) - 1) and here[common] == target[common]:
                common += 1
            parts = (*[b".."] * (len(here) - common), *target[common:])
        return b"/".join(parts) or b"."

    # --- removing ---------------------------------------------------------------------------------------------

    async def unlink(self, parent: Inode, name: bytes) -> None:
        node = await self.directory(parent)
        found = self._child(node, name)
        if found is None:
            raise refuse(errno.ENOENT, name)
        if found.is_dir:
            raise refuse(errno.EISDIR, name)
        catalog = node.bucket
        assert catalog is not None
        self._volume.check_writable(catalog)
        async with self._publishing(found):
            await self._keep_directory(catalog, node, found)
            await self._remove(catalog, found)

    @asynccontextmanager
    async def _publishing(self, *nodes: Node | None) -> AsyncIterator[None]:
        """No commit of the file publishes its metadata meanwhile; also not of one that is opened only now."""
        inodes = {node.inode.ino: node.inode for node in nodes if node is not None and node.inode is not None}
        async with AsyncExitStack() as stack:
            # In the order of their numbers, so that two renames cannot wait for each other.
            for ino in sorted(inodes):
                file = await stack.enter_async_context(self._files.using(inodes[ino]))
                await stack.enter_async_context(file.publishing)
            yield

    async def _remove(self, catalog: Bucket, node: Node) -> None:
        """Publish the tombstone of a name, and take it out of the tree."""
        for _ in range(ATTEMPTS):
            meta = node.meta
            if meta is None:
                # Nothing of it was ever committed; or it is gone already, which is what was asked for.
                if node.parent is not None and self._child(node.parent, node.name) is node:
                    catalog.drop_node(node)
                    catalog.touch(node.parent, time.time_ns())
                return
            inode = node.inode
            async with self._changing(catalog) as operation:
                try:
                    stored = await self._tombstone(operation, catalog, meta)
                except Unreachable:
                    ops = {one.op for one in operation.sent}
                    work = partial(self._discard_if_removed, catalog, meta, ops)
                    self._volume.until_done(f"removing in bucket {catalog.name}", work)
                    raise
                except Conflict as conflict:
                    doubtful = conflict.doubtful
                else:
                    operation.apply(stored)
                    if inode is not None:
                        inode.unlinked, inode.gone = True, False
                    return
            await self._volume.refresh(catalog, meta.subject)
            if doubtful and self._is_past(catalog, meta):
                self._volume.discard(catalog, meta, catalog.last_seq(meta.subject))
                if inode is not None and inode.node is None:
                    inode.unlinked, inode.gone = True, False
                return
            path = node.path()
            if catalog.find(path) is not node:
                raise refuse(errno.ENOENT, node.name)
        raise refuse(errno.EBUSY, node.name)

    @staticmethod
    def _is_past(catalog: Bucket, meta: Metadata) -> bool:
        """Whether `meta`, the answer to whose removal was lost, is there no more.

        If it was removed somebody may have made something new under the name at once, a lock for one, which is not to
        be removed. If it was replaced instead the removal came before that.
        """
        there = catalog.live(meta.subject)
        return there is None or there.nuid != meta.nuid

    async def _discard_if_removed(self, catalog: Bucket, meta: Metadata, ops: set[str]) -> None:
        """Whether one of the tombstones `ops` was stored was not known: then the content goes as well."""
        found = await self._volume.store.metadata(catalog.name, meta.subject)
        if found is not None and found.op in ops:
            self._volume.discard(catalog, meta, found.seq)

    async def _tombstone(self, operation: Operation, catalog: Bucket, meta: Metadata) -> Metadata:
        """On a full bucket not even a tombstone has room: then the chunks that it would free go first."""
        expected = self._still(catalog, meta)
        try:
            return await operation.publish(tombstone(meta, time.time_ns()), expected)
        except BucketFull:
            if not meta.size or catalog.subjects_of_nuid(meta.nuid) != [meta.subject]:
                raise
            stored = await self._volume.store.metadata(catalog.name, meta.subject)
            if stored is None or stored.nuid != meta.nuid:
                raise Conflict("the name was changed meanwhile", stored.seq if stored else 0) from None
            await self._volume.store.purge_chunks(catalog.name, meta.nuid)
            return await operation.publish(tombstone(meta, time.time_ns()), expected)

    @staticmethod
    def _still(catalog: Bucket, meta: Metadata) -> int:
        """The sequence to expect of a subject that must hold just this message: nothing newer may be buried."""
        there = catalog.live(meta.subject)
        if there is None or there.seq != meta.seq or there.nuid != meta.nuid:
            raise Conflict("the name was changed meanwhile", catalog.last_seq(meta.subject))
        return meta.seq

    async def rmdir(self, parent: Inode, name: bytes) -> None:
        node = await self.directory(parent)
        found = self._child(node, name)
        if found is None:
            raise refuse(errno.ENOENT, name)
        if not found.is_dir:
            raise refuse(errno.ENOTDIR, name)
        if node is self._volume.root and self._volume.config.bucket is None:
            await self._remove_bucket(self._volume.buckets[name.decode()])
            return
        if found.children:
            raise refuse(errno.ENOTEMPTY, name)
        catalog = node.bucket
        assert catalog is not None
        self._volume.check_writable(catalog)
        await self._keep_directory(catalog, node, found)
        if found.meta is not None:
            await self._remove_marker(catalog, found)

    async def _remove_marker(self, catalog: Bucket, node: Node) -> None:
        for _ in range(ATTEMPTS):
            meta = node.meta
            if meta is None:
                return
            async with self._changing(catalog) as operation:
                try:
                    grave = tombstone(meta, time.time_ns())
                    stored = await operation.publish(grave, catalog.last_seq(meta.subject))
                except Conflict as conflict:
                    doubtful = conflict.doubtful
                else:
                    operation.apply(stored)
                    return
            await self._volume.refresh(catalog, meta.subject)
            if doubtful and self._is_past(catalog, meta):
                return
        raise refuse(errno.EBUSY, node.name)

    async def _remove_bucket(self, mounted: Mounted) -> None:
        volume = self._volume
        catalog = await volume.load(mounted)
        await volume.refresh_all(catalog)
        # What somebody has put in this moment, and the watch has not delivered, counts as well.
        stored = await volume.store.subjects(mounted.name, catalog.subject_prefix() + ">")
        await pipelined(partial(volume.refresh, catalog, subject) for subject in stored)
        if not catalog.is_empty() or catalog.root.children:
            raise refuse(errno.ENOTEMPTY, mounted.name.encode())
        await volume.store.delete_bucket(mounted.name)
        if volume.buckets.get(mounted.name) is mounted:  # else an advisory of it was faster
            volume.drop_bucket(mounted)
        await volume.store.unwatch(mounted.name)

    # --- renaming ---------------------------------------------------------------------------------------------

    async def rename(
        self,
        old_parent: Inode,
        old_name: bytes,
        new_parent: Inode,
        new_name: bytes,
        caller: Caller,
        *,
        replace_target: bool = True,
        exchange: bool = False,
    ) -> None:
        """renameat2(2) inside a bucket, without copying. Raises EXDEV between buckets, and mv(1) copies then."""
        source_dir, target_dir = await self.directory(old_parent), await self.directory(new_parent)
        catalog = source_dir.bucket
        if catalog is None or target_dir.bucket is not catalog:
            raise refuse(errno.EXDEV, old_name)
        if len(new_name) > NAME_MAX:
            raise refuse(errno.ENAMETOOLONG, new_name)
        source = self._child(source_dir, old_name)
        if source is None:
            raise refuse(errno.ENOENT, old_name)
        target = self._child(target_dir, new_name)
        if exchange and target is None:
            raise refuse(errno.ENOENT, new_name)
        notifier = self._volume.notifier
        places = [(old_parent, old_name), *([(new_parent, new_name)] if exchange else [])]
        again = self._came_again(caller, new_parent, new_name)
        if not again and any(notifier.owes(place.ino, one) for place, one in places):
            # The kernel would have what it takes the name for under the new one, until it can be told. It asks for what
            # a rename replaces anyway.
            self._send_again(caller, new_parent, new_name)
        if target is source:
            return
        meant = [(node, node.inode) for node in (source, target if exchange else None) if node is not None]

        def check_meant() -> None:
            """Raise ESTALE where others have replaced what the kernel has looked up for this call, and will move.

            It looks again then. Where that happens once more what is there now is moved.
            """
            if not again and any(node.inode is not inode for node, inode in meant):
                self._send_again(caller, new_parent, new_name)

        self._volume.check_writable(catalog)
        if target_dir.is_below(source):
            raise refuse(errno.EINVAL, new_name)
        if exchange:
            assert target is not None
            if source_dir.is_below(target):
                raise refuse(errno.EINVAL, new_name)
            if source.is_dir or target.is_dir:
                await self._exchange_directories(catalog, source, target)
            else:
                await self._exchange_files(catalog, source, target, check_meant)
            self._remind(meant, (old_parent, old_name), (new_parent, new_name))
            return
        if not replace_target:
            self._check_free(caller, new_parent, new_name, again)
        if target is not None:
            if not replace_target:
                raise refuse(errno.EEXIST, new_name)
            if source.is_dir and not target.is_dir:
                raise refuse(errno.ENOTDIR, new_name)
            if target.is_dir and not source.is_dir:
                raise refuse(errno.EISDIR, new_name)
            if target.children:
                raise refuse(errno.ENOTEMPTY, new_name)
        if source.is_dir:
            await self._rename_directory(catalog, source, target_dir, new_name, target, replace_target)
        else:
            try:
                await self._rename_file(
                    catalog, source, target_dir, new_name, replace_target, check_meant=check_meant
                )
            except _WasThere as there:
                await self._hear_of(catalog, there.seq, new_parent, new_name)
                self._check_free(caller, new_parent, new_name, again)
                raise refuse(errno.EEXIST, new_name) from None
        self._remind(meant, (old_parent, old_name), (new_parent, new_name))

    def _send_again(self, caller: Caller, parent: Inode, name: bytes) -> None:
        """Raise ESTALE where the kernel may take names for what they led to before others changed them.

        Only when the call has let go of its directory the kernel can be told. It comes again then, once, and asks what
        the names lead to.
        """
        self._refused.add((caller.pid, parent.ino, name))
        raise refuse(errno.ESTALE, name)

    def _came_again(self, caller: Caller, parent: Inode, name: bytes) -> bool:
        key = (caller.pid, parent.ino, name)
        again = key in self._refused
        self._refused.discard(key)
        return again

    def _remind(self, meant: list[tuple[Node, Inode | None]], *places: tuple[Inode, bytes]) -> None:
        """After a rename the kernel has what it knew of one name under the other.

        That others had changed it is told only now, since the kernel takes nothing while a rename goes on in the
        directory, and by the name that it had before. Whoever opens by such a name what nobody has any more, before the
        kernel has heard of it, is to look again: it never was there.
        """
        notifier = self._volume.notifier
        lost = [inode for _, inode in meant if inode is not None and inode.node is None]
        for inode in lost:
            inode.gone = True
        if lost or any(notifier.owes(parent.ino, name) for parent, name in places):
            notifier.send(EntryChanged(parent.ino, name) for parent, name in places)

    @staticmethod
    def _renamed(
        catalog: Bucket, node: Node, meta: Metadata, name: str, subject: str, now: int | None
    ) -> Metadata:
        """The message under the new name; `now` is the time of the rename, None for what merely lies below it."""
        attributes = meta.attributes
        if node.inode is not None or node.is_dir:
            # What tombstones say of a directory's times lies under its old name; an object without a number gets one.
            current = catalog.attributes(node)
            if now is not None:
                current = replace(current, ctime_ns=now, named_ns=now)
            attributes = current.encode(attributes)
        return replace(meta, name=name, subject=subject, attributes=attributes, nuid=meta.nuid or new_nuid())

    @staticmethod
    def _stamp(node: Node, now: int) -> None:
        """What `_renamed` has stored."""
        if node.inode is not None:
            node.inode.attributes.ctime_ns = node.inode.attributes.named_ns = now

    async def _commit(self, *nodes: Node) -> None:
        """A name that changes leads to what was written under it so far."""
        for node in nodes:
            file = self._files.get(node.inode) if node.inode is not None else None
            if file is not None and file.dirty and file.needs_commit:
                await file.commit()

    @asynccontextmanager
    async def _carrying(self, *nodes: Node) -> AsyncIterator[None]:
        """The messages that are published meanwhile carry the attributes that wait to be stored."""
        files = [file for node in nodes if node.inode and (file := self._files.get(node.inode)) is not None]
        waiting = [file for file in files if file.attributes_dirty]
        for file in waiting:
            file.attributes_dirty = False
        try:
            yield
        except BaseException:
            for file in waiting:
                file.attributes_dirty = True
            raise
        for file in waiting:
            file.inode.uncommitted = file.needs_commit

    @asynccontextmanager
    async def _all_or_nothing(
        self,
        operation: Operation,
        catalog: Bucket,
        log: list[Sent] | None = None,
        *,
        side_by_side: bool = False,
    ) -> AsyncIterator[None]:
        """If not all that is published meanwhile can be, none of it stays: the last message is taken back first.

        Where the store does not answer that happens as soon as it does; and then all messages in `log`, those of the
        steps before, are taken back too, and it is empty. Else what was published is added to it. `side_by_side`:
        the order matters only between tombstones and other messages.
        """
        start = len(operation.sent)
        try:
            yield
        except (StoreError, OSError) as error:
            sent = operation.sent[start:]
            mine, left = {one.op for one in sent}, set[str]()
            if not isinstance(error, Unreachable):
                try:
                    # Of the entries of a directory nothing tells what somebody else's same rename has brought.
                    at_once = not side_by_side
                    await self._take_back(
                        operation, sent, mine, left, at_once=at_once, side_by_side=side_by_side
                    )
                except StoreError:
                    pass
                else:
                    raise
            if log is not None:
                sent = log + sent
                mine |= {one.op for one in log}
                log.clear()

            async def later() -> None:
                async with self._changing(catalog) as anew:
                    await self._take_back(anew, sent, mine, left, at_once=False, side_by_side=side_by_side)

            self._volume.until_done(f"taking back a change in bucket {catalog.name}", later)
            raise
        if log is not None:
            log += operation.sent[start:]

    @staticmethod
    async def _take_back(
        operation: Operation,
        sent: list[Sent],
        mine: set[str],
        left: set[str],
        *,
        at_once: bool,
        side_by_side: bool,
    ) -> None:
        """What could be taken back is not in `sent` any more, also after an error."""
        new_subjects = {one.meta.nuid: one.meta.subject for one in sent if not one.meta.deleted}
        while sent:
            last = 1
            while side_by_side and last < len(sent) and sent[-last - 1].meta.deleted == sent[-1].meta.deleted:
                last += 1
            await pipelined(
                partial(
                    operation.take_back,
                    one,
                    mine,
                    left,
                    new_subjects.get(one.before.nuid) if one.meta.deleted and one.before else None,
                    at_once=at_once,
                )
                for one in sent[-last:]
            )
            del sent[-last:]

    async def _rename_file(
        self,
        catalog: Bucket,
        node: Node,
        directory: Node,
        name: bytes,
        replace_target: bool,
        log: list[Sent] | None = None,
        check_meant: Callable[[], None] = lambda: None,
    ) -> None:
        new_name = self._name(directory, name)
        if new_name.endswith("/"):
            raise refuse(errno.EINVAL, name)
        await self._commit(node)
        source_dir = node.parent
        assert source_dir is not None
        async with self._publishing(node, self._child(directory, name)), self._carrying(node):
            await self._keep_directory(catalog, source_dir, node)
            for _ in range(ATTEMPTS):
                old, inode = node.meta, node.inode
                if self._child(source_dir, node.name) is not node or old is None or node.is_dir:
                    raise refuse(errno.ENOENT, node.name)
                check_meant()
                target = self._child(directory, name)
                if target is not None and (target.is_dir or not replace_target):
                    raise refuse(errno.EISDIR if target.is_dir else errno.EEXIST, name)
                subject = catalog.subject_of(new_name, target)
                now = time.time_ns()
                async with self._changing(catalog) as operation:
                    expected, replaced = catalog.last_seq(subject), catalog.live(subject)
                    if replaced is not None and not replace_target:
                        raise refuse(errno.EEXIST, name)
                    renamed = self._renamed(catalog, node, old, new_name, subject, now)
                    try:
                        async with self._all_or_nothing(operation, catalog, log):
                            moved = await operation.publish(renamed, expected)
                            buried = await self._bury(operation, catalog, old, now)
                    except Conflict as conflict:
                        doubtful = conflict.doubtful
                    else:
                        replaced = catalog.live(subject)
                        if buried is not None and catalog.rename(
                            node, directory, name, moved, old.subject, buried.seq
                        ):
                            self._stamp(node, now)
                            catalog.touch(source_dir, now)
                            catalog.touch(directory, now)
                            if replaced is not None and replaced.nuid != moved.nuid:
                                self._volume.discard(catalog, replaced, moved.seq)
                        else:
                            self._reapply(operation, inode, moved)
                            if buried is not None:
                                operation.apply(buried)
                            self._forget(directory, name)
                        return
                await self._volume.refresh(catalog, subject)
                if doubtful and await self._was_replaced_since(catalog, node, old):
                    await self._remove(catalog, node)
                    return
                seq = catalog.last_seq(subject)
                if not replace_target and not doubtful and catalog.live(subject) is None and seq > expected:
                    raise _WasThere(seq)
            raise refuse(errno.EBUSY, name)

    async def _was_replaced_since(self, catalog: Bucket, node: Node, old: Metadata) -> bool:
        """Whether a rename that met a conflict was stored all the same, before its answer was lost.

        Then somebody has replaced the object under its new name, and removed the chunks: to promise them again would
        bury what is there now under a name without content.
        """
        if await self._volume.is_whole(catalog, old):
            return False
        await self._volume.refresh(catalog, old.subject)
        return node.meta is not None and node.meta.nuid == old.nuid and catalog.find(node.path()) is node

    @staticmethod
    def _reapply(operation: Operation, inode: Inode | None, moved: Metadata) -> None:
        """Somebody else's news came between: the tree follows the messages, and `inode` the one that is its own."""
        if inode is not None and inode.node is not None:
            inode.node.inode = None
            inode.node = None
        operation.apply(moved, inode)

    async def _exchange_files(
        self, catalog: Bucket, one: Node, two: Node, check_meant: Callable[[], None]
    ) -> None:
        """Each name gets the other's object; a third name holds one of them meanwhile, so that none is ever without.

        Whoever reads one of the names, here or elsewhere, finds one of the two objects at any time.
        """
        await self._commit(one, two)
        async with self._publishing(one, two), self._carrying(one, two):
            for _ in range(ATTEMPTS):
                first, second = one.meta, two.meta
                inodes = one.inode, two.inode
                for node, meta in ((one, first), (two, second)):
                    if meta is None or node.is_dir or catalog.find(node.path()) is not node:
                        raise refuse(errno.ENOENT, node.name)
                check_meant()
                assert first is not None
                assert second is not None
                if first.name.endswith("/") or second.name.endswith("/"):
                    raise refuse(errno.EINVAL, two.name)  # without content it would be a directory's marker
                assert one.parent is not None
                now = time.time_ns()
                aside = self._aside(catalog, one.parent, second)
                async with self._changing(catalog) as operation:
                    try:
                        async with self._all_or_nothing(operation, catalog):
                            parked = await operation.publish(aside, 0)
                            renamed = self._renamed(catalog, one, first, second.name, second.subject, now)
                            to_two = await self._unless_replaced_since(operation, catalog, renamed, second)
                            renamed = self._renamed(catalog, two, second, first.name, first.subject, now)
                            to_one = await self._unless_replaced_since(operation, catalog, renamed, first)
                    except Conflict:
                        pass
                    else:
                        await self._unpark(operation, catalog, parked)
                        if to_two and to_one and catalog.exchange(one, two, to_two, to_one):
                            self._stamp(one, now)
                            self._stamp(two, now)
                            for node in (one, two):
                                assert node.parent is not None
                                catalog.touch(node.parent, now)
                        else:
                            for inode, meta in zip(inodes, (to_two, to_one), strict=True):
                                if meta is not None:
                                    self._reapply(operation, inode, meta)
                        return
                await self._volume.refresh(catalog, second.subject)
                await self._volume.refresh(catalog, first.subject)
            raise refuse(errno.EBUSY, two.name)

    async def _unless_replaced_since(
        self, operation: Operation, catalog: Bucket, renamed: Metadata, there: Metadata
    ) -> Metadata | None:
        """Publish `renamed` in place of `there`, for an exchange; None if it was stored, and has been replaced since.

        The object is lost then, as somebody wanted it, and with it its content: its old name must not promise it, but
        has to get the other object.
        """
        try:
            return await operation.publish(renamed, self._still(catalog, there))
        except Conflict as conflict:
            if not conflict.doubtful or await self._volume.is_whole(catalog, renamed):
                raise
        await self._volume.refresh(catalog, there.subject)
        return None

    async def _unpark(self, operation: Operation, catalog: Bucket, parked: Metadata) -> None:
        """The exchange is made: its third name goes, by and by if the store does not answer."""
        grave, sent = tombstone(parked), operation.sent[:1]
        mine = {one.op for one in sent}
        try:
            operation.apply(await operation.publish(grave, parked.seq))
        except Conflict:
            pass
        except StoreError:

            async def later() -> None:
                async with self._changing(catalog) as anew:
                    await anew.take_back(sent[0], mine, set(), at_once=False)

            self._volume.until_done(f"the end of an exchange in bucket {catalog.name}", later)

    @staticmethod
    def _aside_name() -> bytes:
        return b".natsfs-exchange-" + new_nuid().encode()

    def _aside(self, catalog: Bucket, directory: Node, meta: Metadata) -> Metadata:
        """`meta` under a name that nobody has."""
        name = self._name(directory, self._aside_name())
        return replace(meta, name=name, subject=catalog.subject_prefix() + encode_subject(name))

    async def _exchange_directories(self, catalog: Bucket, one: Node, two: Node) -> None:
        """Where a directory takes part there are many names to change: three renames, taken back if one fails."""
        assert one.parent is not None
        assert two.parent is not None
        here, there = (one.parent, one.name), (two.parent, two.name)
        steps = [(one, here, (one.parent, self._aside_name())), (two, there, here), (one, here, there)]
        done: list[tuple[Node, Node, bytes]] = []
        log: list[Sent] = []
        try:
            for node, origin, place in steps:
                await self._move(catalog, node, *place, log)
                done.append((node, *origin))
        except (OSError, StoreError):
            with suppress(OSError, StoreError):  # of these two the first says why
                for node, directory, name in reversed(done):
                    if log:  # else all of it is being taken back
                        await self._move(catalog, node, directory, name, log)
            raise

    async def _move(self, catalog: Bucket, node: Node, directory: Node, name: bytes, log: list[Sent]) -> None:
        if node.is_dir:
            await self._rename_directory(catalog, node, directory, name, None, log=log)
        else:
            await self._rename_file(catalog, node, directory, name, False, log)

    async def _bury(
        self,
        operation: Operation,
        catalog: Bucket,
        old: Metadata,
        now: int,
    ) -> Metadata | None:
        """The new name is published: now the old one gets its tombstone, if it is still the version that was moved.

        None if somebody else has used the name since: the object is renamed back already, or the name had its tombstone
        and the answer to that was lost. Raises ESTALE or ENOENT if another client has replaced or removed the object in
        this moment, and purged its chunks.
        """
        for _ in range(ATTEMPTS):
            current = catalog.live(old.subject)
            if current is None or current.nuid != old.nuid:
                break
            if renamed_at(current.attributes) != renamed_at(old.attributes):
                return None  # somebody has renamed it back already: that is not the name which was to end
            # Of another sequence if its attributes have changed meanwhile.
            try:
                return await operation.publish(tombstone(old, now), current.seq)
            except Conflict as conflict:
                await self._volume.refresh(catalog, old.subject)
                current = catalog.live(old.subject)
                if (
                    conflict.doubtful
                    and (current is None or current.nuid != old.nuid)
                    and await self._volume.is_whole(catalog, old)
                ):
                    return None
        raise refuse(errno.ESTALE if catalog.live(old.subject) is not None else errno.ENOENT)

    def _forget(self, directory: Node, name: bytes) -> None:
        if directory.inode is not None:
            self._volume.notifier.send([EntryChanged(directory.inode.ino, name)])

    async def _rename_directory(
        self,
        catalog: Bucket,
        node: Node,
        directory: Node,
        name: bytes,
        target: Node | None,
        replace_target: bool = True,
        log: list[Sent] | None = None,
    ) -> None:
        """Every entry below gets its new name, then every old name its tombstone; each step is pipelined.

        A reader elsewhere sees entries under both names for a moment, never under none. What others put into the
        directory meanwhile, or replace there, comes along, as far as this mount has heard of it.
        """
        volume = self._volume
        source_dir = node.parent
        assert source_dir is not None
        async with volume.mounted_of(catalog).names.exclusive(), volume.operation(catalog) as operation:
            if not replace_target and self._child(directory, name) is not None:
                raise refuse(errno.EEXIST, name)  # somebody made it while the lock was waited for
            await self._keep_directory_locked(operation, catalog, source_dir, node)
            old_path, new_path = node.path(), (*directory.path(), name)
            now = time.time_ns()
            if node.meta is None:
                marker = self._marker(catalog, node)
                operation.apply(await operation.publish(marker, catalog.last_seq(marker.subject)))
            steps: dict[str, _Step] = {}  # by the subject of the old name
            seen: dict[Node, _Step] = {}
            made: dict[str, Metadata] = {}  # what each new name holds, by its subject
            doubtful: list[_Step] = []

            def next_steps() -> list[_Step]:
                found: list[_Step] = []
                for entry in catalog.files_below(node):
                    step = seen.get(entry)
                    if step is not None and catalog.last_seq(step.old.subject) == step.old.seq:
                        continue
                    old = entry.meta
                    assert old is not None
                    step = steps.get(old.subject)
                    if step is not None and (
                        step.grave is not None
                        or step.left
                        or step.old.seq == old.seq
                        or (step.shared and not is_same_file(step.old, old))
                    ):
                        continue  # what came after the tombstone is not what was renamed
                    to = (*new_path, *entry.path()[len(old_path) :])
                    new_name = marker_name(to) if entry.is_dir else object_name(to)
                    subject = catalog.subject_prefix() + encode_subject(new_name)
                    new = self._renamed(
                        catalog, entry, old, new_name, subject, now if entry is node else None
                    )
                    found.append(_Step(entry, old, new, shared=step is not None and step.shared))
                return found

            async def announce(step: _Step) -> None:
                new = step.new
                before = made.get(new.subject)
                there = catalog.live(new.subject) if before is None else None
                if there is not None and there.nuid == new.nuid:
                    step.shared = True
                elif there is not None and not (step.entry is node and replace_target):
                    raise Conflict(f"{new.name} is there already", there.seq)
                expected = catalog.last_seq(new.subject) if before is None else before.seq
                try:
                    stored = await operation.publish(new, expected)
                except Conflict as conflict:
                    if conflict.doubtful:
                        doubtful.append(step)
                        raise
                    await volume.refresh(catalog, new.subject)
                    there = catalog.live(new.subject)
                    if there is None or (
                        there.nuid != new.nuid and not same_inode(there.attributes, new.attributes)
                    ):
                        raise
                    step.shared = True
                    stored = await operation.publish(new, there.seq)
                made[new.subject] = stored
                if before is not None and before.nuid != stored.nuid:
                    volume.discard(catalog, before, stored.seq)

            async def bury(step: _Step) -> None:
                old = step.old
                try:
                    grave = tombstone(old, now if step.entry is node else None)
                    step.grave = await operation.publish(grave, self._still(catalog, old))
                except Conflict as conflict:
                    if conflict.doubtful and await volume.is_whole(catalog, old):
                        step.left = True
                    else:
                        # Somebody changed it in this moment: what is there now is the next round's.
                        await volume.refresh(catalog, old.subject)

            try:
                async with self._all_or_nothing(operation, catalog, log, side_by_side=True):
                    for _ in range(ATTEMPTS):
                        batch = next_steps()
                        if not batch:
                            break
                        await pipelined(partial(announce, step) for step in batch)
                        steps.update((step.old.subject, step) for step in batch)
                        seen.update((step.entry, step) for step in batch)
                        await pipelined(partial(bury, step) for step in batch)
            except Conflict:
                for step in doubtful:
                    if await self._was_replaced_since(catalog, step.entry, step.old):
                        grave = tombstone(step.old, now)
                        operation.apply(await operation.publish(grave, step.old.seq))
                target = self._child(directory, name)
                if target is not None and not replace_target:
                    raise refuse(errno.EEXIST, name) from None
                if target is not None and target.children:
                    raise refuse(errno.ENOTEMPTY, name) from None
                raise
            moved = [step for step in steps.values() if step.grave or step.left or step.shared]
            kept = {step.new.subject for step in moved}
            for meta in made.values():
                if meta.subject not in kept:
                    # Whoever changed the old name has purged the chunks that the new one would lead to.
                    with suppress(Conflict):
                        grave = await operation.publish(tombstone(meta), meta.seq)
                        operation.apply(grave)
                        volume.discard(catalog, meta, grave.seq)
            target = self._child(directory, name)
            if (
                {step.entry for step in moved} == set(catalog.files_below(node))
                and all(
                    step.grave is not None
                    and catalog.can_restate(made[step.new.subject], step.old.subject, step.grave.seq)
                    for step in moved
                )
                and catalog.find(directory.path()) is directory
                and catalog.find(old_path) is node
                and (target is None or not target.children)
            ):
                if target is not None:
                    catalog.drop_node(target)
                catalog.move(node, directory, name)
                for step in moved:
                    assert step.grave is not None
                    stored = made[step.new.subject]
                    catalog.restate(step.entry, stored, step.old.subject, step.grave.seq)
                for entry in local_only(node):
                    assert entry.inode is not None
                    entry.inode.name = object_name(entry.path())
                self._stamp(node, now)
                catalog.touch(source_dir, now)
                catalog.touch(directory, now)
                await self._told_below(node, source_dir is directory)
                return
            # Somebody else changed something below one of the two names: entry by entry, as if others had renamed them.
            top = node.inode
            held = list(directories_held(node))
            for step in moved:
                entry, shown = step.entry, step.entry.meta
                inode = None
                if not entry.is_dir and shown is not None and shown.seq == step.old.seq:
                    inode = entry.inode
                if inode is not None and not volume.inodes.has(inode):
                    inode = None  # others have removed the old name, and the kernel has forgotten it
                if inode is not None:
                    entry.inode = inode.node = None
                operation.apply(made[step.new.subject], inode)
            # Before the old names go: a directory that is found empty is gone for the kernel, too.
            carried = [self._carry(catalog, inode, (*new_path, *path)) for path, inode in held]
            for step in moved:
                if step.grave is not None:
                    operation.apply(step.grave)
            for inode, old in carried:
                if inode.node is None:
                    continue
                names = {*(old.children or {})} if old is not None else set()
                names |= {child.name for child in (inode.node.children or {}).values() if child.inode is None}
                volume.notifier.send(EntryChanged(inode.ino, one) for one in names if one != SELF)
            there = catalog.find(new_path)
            await self._told_below(there, source_dir is directory)
            self._forget(source_dir, old_path[-1])
            there = catalog.find(new_path)
            if there is None or top is None or there.inode is not top:
                self._forget(directory, name)

    async def _told_below(self, node: Node | None, same_directory: bool) -> None:
        """Wait until the kernel has heard of what others have changed in a directory that it is going to move.

        It takes no news of one that comes into another directory (since Linux 6.8) before it has moved it.
        """
        if node is not None and same_directory:
            await self._volume.notifier.told_in(inode.ino for _, inode in directories_held(node))

    @staticmethod
    def _carry(catalog: Bucket, inode: Inode, path: Path) -> tuple[Inode, Node | None]:
        """Let a directory that the kernel has moved to `path` lead to what is there now; the other is where it was.

        Else a call by the new path would be for the old name, until the kernel has heard that it is another directory.
        """
        there, old = catalog.find(path), inode.node
        if there is not None and there.children is not None and there is not old:
            if there.inode is not None:
                there.inode.node, there.inode.unlinked = None, True
            if old is not None:
                for child in list((old.children or {}).values()):
                    # Never committed: it goes with the directory.
                    if (
                        not child.has_meta
                        and not child.is_dir
                        and child.inode
                        and child.name not in there.children
                    ):
                        catalog.move(child, there, child.name)
                        child.inode.name = object_name(child.path())
                old.inode, old.ino = None, 0
            there.inode, there.ino = inode, inode.ino
            inode.node, inode.unlinked = there, False
        return inode, old

    async def _keep_directory_locked(
        self, operation: Operation, catalog: Bucket, node: Node, leaving: Node
    ) -> None:
        """`_keep_directory` where the lock on names is held already."""
        assert node.children is not None
        if node.meta is None and not self._is_top(node) and not others(node, leaving):
            marker = self._marker(catalog, node)
            operation.apply(await operation.publish(marker, catalog.last_seq(marker.subject)))

    # --- attributes -------------------------------------------------------------------------------------------

    def truncated(self, inode: Inode, caller: Caller) -> None:
        """Only root may change content without taking the set-id bits away.

        The kernel goes by CAP_FSETID, and at writes asks for it itself; of a truncation only the user is told.
        """
        if caller.uid:
            inode.attributes.drop_privileges()

    async def set_attributes(
        self,
        inode: Inode,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
    ) -> None:
        """chmod(2), chown(2) and utimensat(2); who may do it is the kernel's decision."""
        attributes = inode.attributes
        if mode is not None:
            attributes.mode = stat.S_IFMT(attributes.mode) | stat.S_IMODE(mode)
        if uid is not None or gid is not None:
            attributes.uid = attributes.uid if uid is None else uid
            attributes.gid = attributes.gid if gid is None else gid
        # Without any field: a chown that names nobody, or a write by somebody whose writes take these bits away.
        if mode is None and atime_ns is None and mtime_ns is None:
            attributes.drop_privileges()
        if atime_ns is not None:
            attributes.atime_ns = atime_ns
        if mtime_ns is not None:
            attributes.mtime_ns = mtime_ns
        attributes.ctime_ns = time.time_ns()
        if not inode.is_dir:
            await self._files.attributes_changed(inode)
            return
        node = inode.node
        if node is None or self._is_top(node) or node.bucket is None:
            return  # of a bucket's root there is nowhere to store them: they hold until the unmount
        catalog = node.bucket
        self._volume.check_writable(catalog)
        if not self._volume.mounted_of(catalog).takes:
            await self._mark(catalog, node)
        elif inode not in self._settling:
            self._settling.add(inode)
            inode.uncommitted = True
            inode.pins += 1
            self._volume.deferred.later(partial(self._settle, catalog, inode))

    async def _settle(self, catalog: Bucket, inode: Inode) -> None:
        """Store what was changed of a directory's attributes, unless it has been removed meanwhile."""
        self._settling.discard(inode)
        try:
            if inode.node is not None:
                await self._mark(catalog, inode.node)
        except BucketGone:
            pass  # and with it what could have them
        except (StoreError, OSError) as error:
            log.error("attributes of %s/%s could not be stored: %s", catalog.name, _shown(inode), error)
            catalog.restore_attributes(inode)
            self._volume.notifier.send([AttributesChanged(inode.ino)])
        finally:
            inode.uncommitted = inode in self._settling
            inode.pins -= 1
            self._volume.inodes.release(inode)

    async def edit(self, inode: Inode, edit: Edit) -> None:
        """setxattr or removexattr. An error means that nothing has changed."""
        if not inode.is_dir:
            await self._files.edit(inode, edit)
            return
        node = inode.node
        if node is None:
            inode.edits = add(inode.edits, edit)  # removed: for whoever has it open
            return
        catalog = node.bucket
        if catalog is None or node is catalog.root:
            raise refuse(errno.EOPNOTSUPP)  # a bucket has no marker that could hold them
        self._volume.check_writable(catalog)
        before, inode.attributes.ctime_ns = inode.attributes.ctime_ns, time.time_ns()
        try:
            await self._mark(catalog, node, (edit,))
        except BaseException:
            inode.attributes.ctime_ns = before
            raise


def others(node: Node, leaving: Node) -> bool:
    """Whether entries other than `leaving` make a directory of `node`; the object of its own name does not."""
    return any(child is not leaving and name != SELF for name, child in (node.children or {}).items())


def is_same_file(one: Metadata, other: Metadata) -> bool:
    """Whether `other` is what became of `one` under its name: the file was not renamed, nor another put there."""
    is_same = one.nuid == other.nuid or same_inode(one.attributes, other.attributes)
    return is_same and renamed_at(one.attributes) == renamed_at(other.attributes)


def _shown(inode: Inode) -> str:
    return b"/".join(inode.node.path()).decode("utf-8", "backslashreplace") if inode.node is not None else "?"


def object_name(path: Path) -> str:
    try:
        return name_of(path)
    except NameRefused as refused:
        raise refuse(refused.errno, path[-1] if path else b"") from None


def marker_name(path: Path) -> str:
    try:
        return marker_of(path)
    except NameRefused as refused:
        raise refuse(refused.errno, path[-1] if path else b"") from None


def directories_held(node: Node, path: Path = ()) -> Iterator[tuple[Path, Inode]]:
    """The directories from `node` down that the kernel knows, each before those below it, with the path from `node`."""
    if node.is_dir:
        if node.inode is not None:
            yield path, node.inode
        for child in (node.children or {}).values():
            yield from directories_held(child, (*path, child.name))


def local_only(node: Node) -> list[Node]:
    """Files at or below `node` that were never committed."""
    found = [] if node.is_dir or node.meta is not None or node.inode is None else [node]
    for child in (node.children or {}).values():
        found += local_only(child)
    return found


async def pipelined(calls: Iterable[Callable[[], Awaitable[object]]]) -> None:
    """Run calls side by side, `PIPELINE` at a time; the first error ends it once those under way are done."""
    errors: list[StoreError] = []
    waiting = iter(calls)

    async def worker() -> None:
        for call in waiting:
            if errors:
                return
            try:
                await call()
            except StoreError as error:
                errors.append(error)

    async with trio.open_nursery() as nursery:
        for _ in range(PIPELINE):
            nursery.start_soon(worker)
    if errors:
        raise errors[0]

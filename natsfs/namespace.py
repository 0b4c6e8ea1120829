"""The calls that work on names: look up, create, remove, rename, link, and change attributes.

Every change is one or two metadata messages with compare-and-swap, then the same change in the catalog. The errors
are OSErrors with the errno that a local file system gives, or `StoreError`s.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

import trio

from natsfs.catalog.attributes import SYMLINK_KEY, Attributes
from natsfs.catalog.bucket import Bucket
from natsfs.catalog.inodes import EntryChanged, Ino, Inode, Node
from natsfs.catalog.metadata import Metadata, new_nuid, tombstone
from natsfs.errors import BucketExists, BucketFull, Conflict, StoreError
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
from natsfs.volume import Mounted, Operation, Volume

PIPELINE = 64  # messages of one directory rename under way at a time


@dataclass(frozen=True, slots=True)
class Caller:
    uid: int
    gid: int


def refuse(number: int, name: bytes = b"") -> OSError:
    return OSError(number, os.strerror(number), name)


class Namespace:
    def __init__(self, volume: Volume, files: Files) -> None:
        self._volume = volume
        self._files = files

    # --- finding ----------------------------------------------------------------------------------------------

    async def directory(self, inode: Inode) -> Node:
        """The node of a directory's inode, its bucket loaded. Raises ENOENT if it was removed."""
        node = inode.node
        if not inode.is_dir:
            raise refuse(errno.ENOTDIR)
        if node is None:
            raise refuse(errno.ENOENT)
        if node.bucket is None and node is not self._volume.root:
            catalog = await self._volume.load(self._volume.buckets[node.name.decode()])
            return catalog.root
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
        node = await self.directory(parent)
        assert node.children is not None
        found = node.children.get(name)
        return None if found is None else self.inode_of(found)

    async def entries(self, parent: Inode) -> list[Node]:
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
        return Attributes(mode, caller.uid, gid, rdev, now, now, now, now)

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

    async def _create(self, catalog: Bucket, meta: Metadata) -> Metadata:
        """Publish an object that must not exist yet, against everybody else's attempts. Raises EEXIST."""
        for _ in range(ATTEMPTS):
            async with self._changing(catalog) as operation:
                # Looked at again: somebody's object may have arrived while the lock was waited for, and its
                # sequence must not be the one that is expected.
                if catalog.live(meta.subject) is not None:
                    raise refuse(errno.EEXIST)
                try:
                    stored = await operation.publish(meta, catalog.last_seq(meta.subject))
                except Conflict:
                    pass
                else:
                    operation.apply(stored)
                    return stored
            await self._volume.refresh(catalog, meta.subject)
            if catalog.live(meta.subject) is not None:
                raise refuse(errno.EEXIST)
        raise refuse(errno.EEXIST)

    def _marker(self, catalog: Bucket, node: Node) -> Metadata:
        """The marker that says about a directory what is known of it now."""
        attributes = self.inode_of(node).attributes
        if node.meta is not None:
            return replace(node.meta, attributes=attributes.encode(node.meta.attributes))
        return self._empty(catalog, marker_name(node.path()), attributes.encode(None))

    def _is_top(self, node: Node) -> bool:
        """Whether a directory exists without a marker: a bucket, or the mount's root."""
        return node is self._volume.root or (node.bucket is not None and node is node.bucket.root)

    async def _mark(self, catalog: Bucket, node: Node) -> None:
        """Write a directory's marker, with its attributes."""
        for _ in range(ATTEMPTS):
            marker = self._marker(catalog, node)
            async with self._changing(catalog) as operation:
                try:
                    stored = await operation.publish(marker, catalog.last_seq(marker.subject))
                except Conflict:
                    pass
                else:
                    attributes = node.inode.attributes if node.inode is not None else None
                    operation.apply(stored)
                    if node.inode is not None and attributes is not None:
                        node.inode.attributes = attributes
                    node.event_ns = 0  # the marker's times include what happened before it
                    return
            await self._volume.refresh(catalog, marker.subject)
        raise refuse(errno.EBUSY)

    async def _keep_directory(self, catalog: Bucket, node: Node, leaving: Node) -> None:
        """A directory that loses its last entry gets a marker, so that it stays until rmdir."""
        assert node.children is not None
        if node.meta is None and not self._is_top(node) and not others(node, leaving):
            await self._mark(catalog, node)

    def _touched(self, node: Node) -> None:
        if node.bucket is not None:
            node.bucket.touch(node, time.time_ns())

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
            await self._create(catalog, self._empty(catalog, full_name, attributes.encode(None)))
            node = self._child(directory, name)
            if node is None:
                raise refuse(errno.EIO, name)  # somebody else removed it already
            self._touched(directory)
            return self.inode_of(node)
        node = catalog.add_node(directory, name, directory=False)
        node.ino = self._volume.inodes.number(
            catalog.name, catalog.identity.created, "F", "/".join(map(os.fsdecode, node.path()))
        )
        inode = Inode(Ino(node.ino), catalog, node, attributes)
        inode.name = full_name
        node.inode = inode
        self._volume.inodes.add(inode)
        self._touched(directory)
        return inode

    async def mkdir(self, parent: Inode, name: bytes, mode: int, caller: Caller) -> Inode:
        node = await self.directory(parent)
        if node.bucket is None:
            return await self._make_bucket(name)
        catalog, directory, full_name = await self._place(parent, name, marker=True)
        if self._child(directory, name) is not None:
            raise refuse(errno.EEXIST, name)
        attributes = self._new_attributes(parent, stat.S_IFDIR | stat.S_IMODE(mode), caller)
        await self._create(catalog, self._empty(catalog, full_name, attributes.encode(None)))
        made = self._child(directory, name)
        if made is None:
            raise refuse(errno.EIO, name)
        self._touched(directory)
        return self.inode_of(made)

    async def _make_bucket(self, name: bytes) -> Inode:
        if BUCKET_NAME.fullmatch(os.fsdecode(name)) is None:
            raise refuse(errno.EINVAL, name)
        self._volume.making.add(name.decode())
        try:
            info = await self._volume.store.create_bucket(name.decode())
        except BucketExists:
            raise refuse(errno.EEXIST, name) from None
        except BucketFull as error:
            raise OSError(errno.EDQUOT, str(error)) from None
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
        text = target.decode("utf-8", "surrogateescape")
        return await self._make_special(parent, name, stat.S_IFLNK | 0o777, 0, caller, {SYMLINK_KEY: text})

    async def _make_special(
        self, parent: Inode, name: bytes, mode: int, rdev: int, caller: Caller, more: dict[str, str]
    ) -> Inode:
        catalog, directory, full_name = await self._place(parent, name)
        if self._child(directory, name) is not None:
            raise refuse(errno.EEXIST, name)
        if full_name.endswith("/"):
            raise refuse(errno.EINVAL, name)
        attributes = self._new_attributes(parent, mode, caller, rdev)
        await self._create(catalog, self._empty(catalog, full_name, attributes.encode(None) | more))
        made = self._child(directory, name)
        if made is None:
            raise refuse(errno.EIO, name)
        self._touched(directory)
        return self.inode_of(made)

    def readlink(self, inode: Inode) -> bytes:
        """The text of a symbolic link; of another client's link the way to its target inside the mount."""
        meta = inode.meta
        if meta is None or not stat.S_ISLNK(inode.attributes.mode):
            raise refuse(errno.EINVAL)
        text = (meta.attributes or {}).get(SYMLINK_KEY)
        if text is not None or meta.link is None:
            return (text or "").encode("utf-8", "surrogateescape")
        depth = len(inode.node.path()) - 1 if inode.node is not None else 0
        target = path_of(meta.link.name) if meta.link.name else ()
        if self._volume.config.bucket is None:
            parts: Path = (*[b".."] * (depth + 1), meta.link.bucket.encode(), *target)
        elif meta.link.bucket == self._volume.config.bucket:
            parts = (*[b".."] * depth, *target)
        else:
            parts = (b"..",) * (depth + 1) + (meta.link.bucket.encode(), *target)
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
            self._touched(node)

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
                return
            inode = node.inode
            async with self._changing(catalog) as operation:
                try:
                    stored = await self._tombstone(operation, catalog, meta)
                except Conflict:
                    pass
                else:
                    operation.apply(stored)
                    if inode is not None:
                        inode.unlinked = True
                    return
            await self._volume.refresh(catalog, meta.subject)
            path = node.path()
            if catalog.find(path) is not node:
                raise refuse(errno.ENOENT, node.name)
        raise refuse(errno.EBUSY, node.name)

    async def _tombstone(self, operation: Operation, catalog: Bucket, meta: Metadata) -> Metadata:
        """On a full bucket not even a tombstone has room: then the chunks that it would free go first."""
        expected = self._still(catalog, meta)
        try:
            return await operation.publish(tombstone(meta), expected)
        except BucketFull:
            if not meta.size or catalog.subjects_of_nuid(meta.nuid) != [meta.subject]:
                raise
            stored = await self._volume.store.metadata(catalog.name, meta.subject)
            if stored is None or stored.nuid != meta.nuid:
                raise Conflict("the name was changed meanwhile", stored.seq if stored else 0) from None
            await self._volume.store.purge_chunks(catalog.name, meta.nuid)
            return await operation.publish(tombstone(meta), expected)

    @staticmethod
    def _still(catalog: Bucket, meta: Metadata) -> int:
        """The sequence to expect of a subject that must hold just this message: nothing newer may be buried."""
        if catalog.last_seq(meta.subject) != meta.seq:
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
        self._touched(node)

    async def _remove_marker(self, catalog: Bucket, node: Node) -> None:
        for _ in range(ATTEMPTS):
            meta = node.meta
            if meta is None:
                return
            async with self._changing(catalog) as operation:
                try:
                    stored = await operation.publish(tombstone(meta), catalog.last_seq(meta.subject))
                except Conflict:
                    pass
                else:
                    operation.apply(stored)
                    return
            await self._volume.refresh(catalog, meta.subject)
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
        self, old_parent: Inode, old_name: bytes, new_parent: Inode, new_name: bytes, *, replace_target: bool
    ) -> None:
        """rename(2) inside a bucket, without copying. Raises EXDEV between buckets, and mv(1) copies then."""
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
        if target is source:
            return
        if target is not None:
            if not replace_target:
                raise refuse(errno.EEXIST, new_name)
            if source.is_dir and not target.is_dir:
                raise refuse(errno.ENOTDIR, new_name)
            if target.is_dir and not source.is_dir:
                raise refuse(errno.EISDIR, new_name)
            if target.children:
                raise refuse(errno.ENOTEMPTY, new_name)
        self._volume.check_writable(catalog)
        if source.is_dir:
            if target_dir.is_below(source):
                raise refuse(errno.EINVAL, new_name)
            await self._rename_directory(catalog, source, target_dir, new_name, target)
        else:
            await self._rename_file(catalog, source, target_dir, new_name, replace_target)
        self._touched(source_dir)
        self._touched(target_dir)

    def _renamed(
        self, node: Node, meta: Metadata, name: str, subject: str, *, touch: bool = True
    ) -> Metadata:
        attributes = meta.attributes
        if node.inode is not None and touch:
            node.inode.attributes.ctime_ns = time.time_ns()
            attributes = node.inode.attributes.encode(attributes)
        return replace(meta, name=name, subject=subject, attributes=attributes, nuid=meta.nuid or new_nuid())

    async def _rename_file(
        self, catalog: Bucket, node: Node, directory: Node, name: bytes, replace_target: bool
    ) -> None:
        new_name = self._name(directory, name)
        if new_name.endswith("/"):
            raise refuse(errno.EINVAL, name)
        file = self._files.get(node.inode) if node.inode is not None else None
        if file is not None and file.needs_commit:
            await file.commit()
        source_dir = node.parent
        assert source_dir is not None
        async with self._publishing(node, self._child(directory, name)):
            await self._keep_directory(catalog, source_dir, node)
            for _ in range(ATTEMPTS):
                old = node.meta
                if self._child(source_dir, node.name) is not node or old is None:
                    raise refuse(errno.ENOENT, node.name)
                target = self._child(directory, name)
                if target is not None and (target.is_dir or not replace_target):
                    raise refuse(errno.EISDIR if target.is_dir else errno.EEXIST, name)
                subject = catalog.subject_of(new_name, target)
                async with self._changing(catalog) as operation:
                    replaced = catalog.live(subject)
                    if replaced is not None and not replace_target:
                        raise refuse(errno.EEXIST, name)
                    try:
                        moved = await operation.publish(
                            self._renamed(node, old, new_name, subject), catalog.last_seq(subject)
                        )
                    except Conflict:
                        pass
                    else:
                        buried = await self._bury(operation, catalog, old, moved, replaced)
                        self._move_file(operation, catalog, node, directory, name, old, moved, buried)
                        return
                await self._volume.refresh(catalog, subject)
            raise refuse(errno.EBUSY, name)

    async def _bury(
        self, operation: Operation, catalog: Bucket, old: Metadata, moved: Metadata, replaced: Metadata | None
    ) -> Metadata:
        """The new name is published: now the old one gets its tombstone, if it is still the version that was moved.

        Otherwise the other client that replaced or removed it in this moment has purged its chunks: the new name is
        taken back, and leads to what it led to before.
        """
        expected = old.seq
        for _ in range(ATTEMPTS):
            try:
                buried = await operation.publish(tombstone(old), expected)
            except Conflict:
                await self._volume.refresh(catalog, old.subject)
            except StoreError:
                operation.apply(moved)  # both names stand until somebody removes one
                raise
            else:
                return buried
            now = catalog.live(old.subject)
            if now is None or now.nuid != old.nuid:
                break
            expected = now.seq  # only its attributes have changed
        try:
            back = await operation.publish(tombstone(moved) if replaced is None else replaced, moved.seq)
        except StoreError:
            operation.apply(moved)
            raise
        operation.apply(back)
        raise refuse(errno.ESTALE if catalog.live(old.subject) is not None else errno.ENOENT)

    def _move_file(
        self,
        operation: Operation,
        catalog: Bucket,
        node: Node,
        directory: Node,
        name: bytes,
        old: Metadata,
        moved: Metadata,
        buried: Metadata,
    ) -> None:
        """Both messages of a rename are stored: the tree follows, unless somebody else's news for it came between."""
        target, replaced = self._child(directory, name), catalog.live(moved.subject)
        if (
            catalog.can_restate(moved, old.subject, buried.seq)
            and catalog.find(directory.path()) is directory
            and catalog.find(node.path()) is node
            and (target is None or not target.is_dir)
        ):
            if target is not None:
                catalog.drop_node(target)
            catalog.move(node, directory, name)
            catalog.restate(node, moved, old.subject, buried.seq)
            if replaced is not None and replaced.nuid != moved.nuid:
                self._volume.discard(catalog, replaced, moved.seq)
            return
        inode, node.inode = node.inode, None
        if inode is not None:
            inode.node = None
        operation.apply(moved, inode)
        operation.apply(buried)
        self._forget(directory, name)

    def _forget(self, directory: Node, name: bytes) -> None:
        if directory.inode is not None:
            self._volume.notifier.send([EntryChanged(directory.inode.ino, name)])

    async def _rename_directory(
        self, catalog: Bucket, node: Node, directory: Node, name: bytes, target: Node | None
    ) -> None:
        """Every entry below gets its new name, then every old name its tombstone; each step is pipelined.

        A reader elsewhere sees entries under both names for a moment, never under none.
        """
        volume = self._volume
        source_dir = node.parent
        assert source_dir is not None
        async with volume.mounted_of(catalog).names.exclusive(), volume.operation(catalog) as operation:
            await self._keep_directory_locked(operation, catalog, source_dir, node)
            old_path, new_path = node.path(), (*directory.path(), name)
            if node.meta is None:
                marker = self._marker(catalog, node)
                operation.apply(await operation.publish(marker, catalog.last_seq(marker.subject)))
            moves: list[tuple[Node, Metadata, Metadata]] = []
            for entry in catalog.files_below(node):
                old = entry.meta
                assert old is not None
                to = (*new_path, *entry.path()[len(old_path) :])
                new_name = marker_name(to) if entry.is_dir else object_name(to)
                subject = catalog.subject_prefix() + encode_subject(new_name)
                new = self._renamed(entry, old, new_name, subject, touch=entry is node)
                moves.append((entry, old, new))

            published: dict[Node, Metadata] = {}

            async def announce(entry: Node, old: Metadata, new: Metadata) -> None:
                published[entry] = await operation.publish(new, catalog.last_seq(new.subject))

            try:
                await pipelined(partial(announce, *move) for move in moves)
            except StoreError:
                # Back to where it was: the new names that were made go away again.
                for entry, _old, _new in moves:
                    if entry in published:
                        made = published[entry]
                        operation.apply(await operation.publish(tombstone(made), made.seq))
                raise

            buried: dict[Node, Metadata] = {}

            async def bury(entry: Node, old: Metadata) -> None:
                # On a conflict somebody changed the old name in this moment: it stays, as theirs.
                with suppress(Conflict):
                    buried[entry] = await operation.publish(tombstone(old), self._still(catalog, old))

            await pipelined(partial(bury, entry, old) for entry, old, _ in moves)
            target = self._child(directory, name)
            if (
                {entry for entry, _, _ in moves} == set(catalog.files_below(node))
                and all(
                    entry in buried and catalog.can_restate(published[entry], old.subject, buried[entry].seq)
                    for entry, old, _ in moves
                )
                and catalog.find(directory.path()) is directory
                and catalog.find(old_path) is node
                and (target is None or not target.children)
            ):
                if target is not None:
                    catalog.drop_node(target)
                catalog.move(node, directory, name)
                for entry, old, _ in moves:
                    catalog.restate(entry, published[entry], old.subject, buried[entry].seq)
                for entry in local_only(node):
                    assert entry.inode is not None
                    entry.inode.name = object_name(entry.path())
                return
            # Somebody else changed something below one of the two names: entry by entry, as if others had renamed them.
            for entry, _old, _ in moves:
                made = published[entry]
                if entry not in buried:
                    # Whoever changed the old name has purged the chunks that the new one would lead to.
                    made = await operation.publish(tombstone(made), made.seq)
                inode = None if entry.is_dir or made.deleted else entry.inode
                if inode is not None:
                    entry.inode = inode.node = None
                operation.apply(made, inode)
                if entry in buried:
                    operation.apply(buried[entry])
            self._forget(source_dir, old_path[-1])
            self._forget(directory, name)

    async def _keep_directory_locked(
        self, operation: Operation, catalog: Bucket, node: Node, leaving: Node
    ) -> None:
        """`_keep_directory` where the lock on names is held already."""
        assert node.children is not None
        if node.meta is None and not self._is_top(node) and not others(node, leaving):
            marker = self._marker(catalog, node)
            operation.apply(await operation.publish(marker, catalog.last_seq(marker.subject)))

    # --- attributes -------------------------------------------------------------------------------------------

    async def attributes_changed(self, inode: Inode) -> None:
        """Store what chmod, chown or utimensat changed in `inode.attributes`."""
        if not inode.is_dir:
            await self._files.attributes_changed(inode)
            return
        node = inode.node
        if node is None or self._is_top(node) or node.bucket is None:
            return  # of a bucket's root there is nowhere to store them: they hold until the unmount
        self._volume.check_writable(node.bucket)
        await self._mark(node.bucket, node)


def others(node: Node, leaving: Node) -> bool:
    """Whether entries other than `leaving` make a directory of `node`; the object of its own name does not."""
    return any(child is not leaving and name != SELF for name, child in (node.children or {}).items())


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


def local_only(node: Node) -> list[Node]:
    """Files at or below `node` that were never committed."""
    found = [] if node.is_dir or node.meta is not None or node.inode is None else [node]
    for child in (node.children or {}).values():
        found += local_only(child)
    return found


async def pipelined(calls: Iterable[Callable[[], Awaitable[None]]]) -> None:
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

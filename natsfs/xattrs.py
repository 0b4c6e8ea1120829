"""The calls for extended attributes: of files and directories, and of buckets, which show what their stream is."""

from __future__ import annotations

import errno
import os

from natsfs.catalog import xattrs
from natsfs.catalog.inodes import Inode
from natsfs.catalog.metadata import encode
from natsfs.catalog.xattrs import PREFIX, Edit
from natsfs.errors import TooLarge
from natsfs.namespace import Namespace
from natsfs.store.store import BucketInfo
from natsfs.volume import Mounted, Volume

# Bytes of a metadata message that no attribute may take: a rename, a chmod and a commit must still fit.
RESERVE = 16 * 1024
_TIME = "0000-00-00T00:00:00.000000000Z"
_SHOWN = PREFIX + b"nats."


def refuse(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class ExtendedAttributes:
    """All of them in the namespace ``user``; the kernel lets them through for files and directories only."""

    def __init__(self, volume: Volume, names: Namespace) -> None:
        self._volume = volume
        self._names = names

    async def get(self, inode: Inode, name: bytes) -> bytes:
        mounted = self._bucket_of(inode)
        if mounted is None:
            return xattrs.get(name, inode.current(), inode.stored)
        if not name.startswith(_SHOWN):
            raise refuse(errno.ENODATA)
        shown = bucket_attributes(await self._volume.info(mounted)).get(name.removeprefix(_SHOWN))
        if shown is None:
            raise refuse(errno.ENODATA)
        return shown

    def list(self, inode: Inode) -> list[bytes]:
        return xattrs.names(inode.current()) if inode.can_have_xattrs else []

    async def set(self, inode: Inode, name: bytes, value: bytes) -> None:
        await self._change(inode, name, value)

    async def remove(self, inode: Inode, name: bytes) -> None:
        await self._change(inode, name, None)

    async def _change(self, inode: Inode, name: bytes, value: bytes | None) -> None:
        if self._is_top(inode):
            if name.startswith(_SHOWN):
                raise refuse(errno.EPERM)
            raise refuse(errno.ENODATA if value is None else errno.EOPNOTSUPP)
        edit = xattrs.change(name, value, inode.current())
        self._check_room(inode, edit)
        try:
            await self._names.edit(inode, edit)
        except TooLarge as error:
            raise OSError(errno.ENOSPC, str(error)) from None

    def _check_room(self, inode: Inode, edit: Edit) -> None:
        """Raises ENOSPC, as ext4 does where attributes do not fit, for what would make the message too long."""
        before, after = (
            len(encode(inode.describe(inode.current(), edits), mtime=_TIME)) for edits in ((), (edit,))
        )
        if after > before and after > self._volume.store.limit_of_metadata - RESERVE:
            raise refuse(errno.ENOSPC)

    def _is_top(self, inode: Inode) -> bool:
        """A bucket, or the root of all of them: neither has an object that could hold attributes."""
        node = inode.node
        return node is not None and (node.bucket is None or node is node.bucket.root)

    def _bucket_of(self, inode: Inode) -> Mounted | None:
        node = inode.node
        if node is None or not self._is_top(inode):
            return None
        if node.bucket is not None:
            return self._volume.mounted_of(node.bucket)
        return self._volume.buckets.get(node.name.decode())


def bucket_attributes(info: BucketInfo) -> dict[bytes, bytes]:
    """What a bucket shows as ``user.nats.NAME``, by NAME."""
    status: dict[str, object] = {
        "sealed": info.sealed,
        "replicas": info.replicas,
        "storage": info.storage,
        "bytes": info.bytes,
        "max_bytes": info.max_bytes,
        "ttl": int(info.ttl) if info.ttl.is_integer() else info.ttl,
        "compression": info.compression,
        "description": info.description,
        "messages": info.messages,
    }
    shown = {
        name.encode(): value.encode("utf-8", "surrogatepass")
        if isinstance(value, str)
        else xattrs.to_json(value)
        for name, value in status.items()
        if value != ""
    }
    return shown | {b"status": xattrs.to_json(status)}

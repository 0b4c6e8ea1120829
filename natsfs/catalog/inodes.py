"""Inodes (what the kernel holds on to) and nodes (the dentries of a bucket's tree)."""

from __future__ import annotations

import hashlib
import secrets
import stat
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NewType

from natsfs.catalog.attributes import Attributes
from natsfs.catalog.metadata import Metadata, unpack
from natsfs.catalog.xattrs import Edit, edited

if TYPE_CHECKING:
    from natsfs.catalog.bucket import Bucket

Ino = NewType("Ino", int)
ROOT_INO: Final = Ino(1)
INO_BYTES: Final = 7  # of a new number: Python keeps one of eight in half as much memory again


class Node:
    """A name in the tree. A directory has `children` (and `meta` is its marker, if there is one); a file has none.

    `ino` is the inode number once somebody asked for it, so that a name keeps its number when the kernel forgets
    the inode. `event_ns` is the time of the newest creation or removal of an entry in a directory that its marker
    does not know of.

    A listing gives the kernel a reference to each entry, and of most of them nothing more is heard. Such a file dozes:
    `ino` is in use, `dozing` counts the references, and the inode is made as soon as anybody asks for it.
    """

    __slots__ = (
        "_inode",
        "_meta",
        "bucket",
        "children",
        "dozing",
        "event_ns",
        "ino",
        "name",
        "parent",
        "subdirs",
    )

    def __init__(self, bucket: Bucket | None, parent: Node | None, name: bytes, *, directory: bool) -> None:
        self.bucket = bucket
        self.parent = parent
        self.name = name
        self.children: dict[bytes, Node] | None = {} if directory else None
        self._meta: Metadata | bytes | None = None
        self._inode: Inode | None = None
        self.dozing = 0
        self.ino = 0
        self.subdirs = 0
        self.event_ns = 0

    @property
    def inode(self) -> Inode | None:
        if self.dozing:
            assert self.bucket is not None
            return self.bucket.wake(self)
        return self._inode

    @inode.setter
    def inode(self, inode: Inode | None) -> None:
        assert not self.dozing
        self._inode = inode

    @property
    def meta(self) -> Metadata | None:
        meta = self._meta
        if isinstance(meta, bytes):
            assert self.bucket is not None
            return unpack(meta, self.bucket.name)
        return meta

    @meta.setter
    def meta(self, meta: Metadata | None) -> None:
        self._meta = meta

    @property
    def has_meta(self) -> bool:
        return self._meta is not None

    @property
    def packed(self) -> bytes | None:
        """The message of a file in the form of `metadata.pack`, if it is kept so and the file has no inode."""
        meta = self._meta
        return meta if type(meta) is bytes and self._inode is None else None

    def pack(self, packed: bytes) -> None:
        """Keep the message in this form; whoever asks for it gets it made anew."""
        self._meta = packed

    @property
    def is_dir(self) -> bool:
        return self.children is not None

    def path(self) -> tuple[bytes, ...]:
        """File names from the bucket's root down to this node; empty for the root itself."""
        parts = []
        node = self
        while node.parent is not None and node.parent.bucket is not None:
            parts.append(node.name)
            node = node.parent
        return tuple(reversed(parts))

    def is_below(self, other: Node) -> bool:
        node: Node | None = self
        while node is not None:
            if node is other:
                return True
            node = node.parent
        return False


class Inode:
    """A file or directory as the kernel knows it, for as long as the kernel or an open file needs it.

    `node` is None once the name is gone or belongs to another version. `meta` is the version whose content a file
    shows, None before the first commit. `pins` counts open files and uncommitted data; the inode lives while the
    kernel's lookup count or the pins are above zero. `uncommitted` says that content or attributes differ from what
    is stored; `unlinked` that this mount removed the name (or nobody has the file open), so that nothing of it will be
    committed; `gone` that somebody else has removed the name, so that only who has the file open still means it.
    `layered` says that what was written here lies over its version, which must stay the one below then.
    `edits` are changes of extended attributes that wait for the commit of a file's content.
    """

    __slots__ = (
        "attributes",
        "bucket",
        "edits",
        "gone",
        "ino",
        "layered",
        "meta",
        "name",
        "nlookup",
        "node",
        "pins",
        "size",
        "uncommitted",
        "unlinked",
    )

    def __init__(self, ino: Ino, bucket: Bucket | None, node: Node | None, attributes: Attributes) -> None:
        self.ino = ino
        self.bucket = bucket
        self.node = node
        self.name = ""  # the object's name, for files; kept when another version takes the node
        self.meta: Metadata | None = None
        self.attributes = attributes
        self.edits: tuple[Edit, ...] = ()
        self.size = 0
        self.nlookup = 0
        self.pins = 0
        self.unlinked = False
        self.uncommitted = False
        self.layered = False
        self.gone = False

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.attributes.mode)

    @property
    def can_have_xattrs(self) -> bool:
        """Attributes of users, that is; on anything else the kernel refuses them (xattr(7))."""
        return stat.S_ISDIR(self.attributes.mode) or stat.S_ISREG(self.attributes.mode)

    @property
    def stored(self) -> Metadata | None:
        """The newest known message that describes it: the object's own, or the directory's marker."""
        if self.is_dir:
            return self.node.meta if self.node is not None else None
        return self.meta

    def current(self) -> Metadata:
        """What the extended attributes show: what is stored, with the edits that wait."""
        return edited(self.stored or Metadata(name=self.name, bucket="", nuid=""), self.edits)

    def describe(self, meta: Metadata, edits: tuple[Edit, ...] = ()) -> Metadata:
        """What a message built on `meta` has to say: the attributes of now, the waiting edits, and `edits`."""
        meta = edited(meta, (*self.edits, *edits))
        return replace(meta, attributes=self.attributes.encode(meta.attributes))

    def edits_stored(self, stored: tuple[Edit, ...]) -> None:
        """Those that a message had; what was edited while it was under way goes on waiting."""
        self.edits = tuple(edit for edit in self.edits if edit not in stored)


@dataclass(frozen=True, slots=True)
class EntryChanged:
    """The kernel has to forget what it knows of `name` in the directory `parent`.

    `gone` is the inode that was removed, for inotify watchers on it, or 0.
    """

    parent: Ino
    name: bytes
    gone: int = 0


@dataclass(frozen=True, slots=True)
class AttributesChanged:
    ino: Ino


@dataclass(frozen=True, slots=True)
class ContentChanged:
    """The kernel's pages of `ino` show something that is no longer, or never became, its content.

    Until now its size was `before` to the kernel; it is `size`.
    """

    ino: Ino
    before: int
    size: int


Effect = EntryChanged | AttributesChanged | ContentChanged


class InodeTable:
    """All inodes that are alive, by number."""

    def __init__(self) -> None:
        self._inodes: dict[int, Inode | Node] = {}  # a node that dozes is there in place of its inode

    def __len__(self) -> int:
        return len(self._inodes)

    def get(self, ino: int) -> Inode:
        found = self._inodes[ino]
        if isinstance(found, Node):
            inode = found.inode
            assert inode is not None
            return inode
        return found

    def all(self) -> list[Inode]:
        """Those that have been made; not of nodes that doze."""
        return [inode for inode in self._inodes.values() if isinstance(inode, Inode)]

    def doze(self, node: Node) -> None:
        """The kernel gets a reference to a file that it may never ask about."""
        assert node.dozing or node.ino not in self._inodes
        self._inodes[node.ino] = node
        node.dozing += 1

    def wake(self, node: Node) -> int:
        """The references that the kernel has to `node`, whose inode is made now."""
        assert self._inodes.pop(node.ino) is node
        count, node.dozing = node.dozing, 0
        return count

    def number(self, *key: str) -> Ino:
        """A free inode number that is a stable function of `key`."""
        text = "\0".join(key)
        while True:
            data = text.encode("utf-8", "surrogatepass")
            number = int.from_bytes(hashlib.blake2b(data, digest_size=INO_BYTES).digest(), "big")
            if number > ROOT_INO and number not in self._inodes:
                return Ino(number)
            text += "\0"

    def fresh(self) -> Ino:
        """A number for something new."""
        while True:
            number = secrets.randbits(8 * INO_BYTES)
            if number > ROOT_INO and number not in self._inodes:
                return Ino(number)

    def add(self, inode: Inode) -> None:
        assert inode.ino not in self._inodes
        self._inodes[inode.ino] = inode

    def has_number(self, node: Node) -> bool:
        """Whether the number of a node without an inode is its own: it dozes under it, or could."""
        return node.dozing > 0 or (node.ino > 0 and node.ino not in self._inodes)

    def knows(self, ino: int) -> bool:
        return ino in self._inodes

    def has(self, inode: Inode) -> bool:
        """Whether somebody still needs this very inode."""
        return self._inodes.get(inode.ino) is inode

    def forget(self, ino: int, count: int) -> None:
        """The kernel gives back `count` of its references."""
        inode = self._inodes.get(ino)
        if isinstance(inode, Node):
            inode.dozing = max(0, inode.dozing - count)
            if not inode.dozing:
                del self._inodes[ino]
        elif inode is not None:
            inode.nlookup -= count
            self.release(inode)

    def release(self, inode: Inode) -> None:
        """Drop `inode` if nobody needs it any more; to be called after lowering `nlookup` or `pins`."""
        if inode.nlookup > 0 or inode.pins > 0 or inode.ino == ROOT_INO:
            return
        self._inodes.pop(inode.ino, None)
        node = inode.node
        if node is not None and node.inode is inode:
            node.inode = None
            if node.bucket is not None:
                node.bucket.put_by(node)

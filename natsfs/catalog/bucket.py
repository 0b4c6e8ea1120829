"""One bucket's tree: every object's metadata, and the rules by which messages change it.

Pure and synchronous. The watcher's messages and this mount's own commits arrive in any interleaving; per subject
only a higher stream sequence counts. The methods return what the kernel has to be told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush

from natsfs.catalog.attributes import (
    EXTENDS_KEY,
    SYMLINK_KEY,
    Attributes,
    Defaults,
    named_ns,
    parse_time,
    removed_ns,
)
from natsfs.catalog.inodes import (
    ROOT_INO,
    AttributesChanged,
    ContentChanged,
    Effect,
    EntryChanged,
    Ino,
    Inode,
    InodeTable,
    Node,
)
from natsfs.catalog.metadata import Metadata, Stored, pack, pack_record, peek, plain, unpack
from natsfs.names import SELF, Path, encode_subject, file_name, path_of

S_IFREG = 0o100000
S_IFDIR = 0o040000
S_IFLNK = 0o120000


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes a bucket the same bucket: its name, its stream's creation time, and an epoch.

    The epoch rises when the stream's last sequence turns out lower than what was known: a store that was restored
    or rolled back gives sequences out again. Under a new identity every known sequence is void.
    """

    name: str
    created: str
    epoch: int = 0


def same_content(one: Metadata, other: Metadata) -> bool:
    """Whether two versions of a name show the same bytes: what differs are attributes."""
    return (
        one.nuid == other.nuid
        and one.size == other.size
        and one.digest == other.digest
        and one.link == other.link
        and (one.attributes or {}).get(SYMLINK_KEY) == (other.attributes or {}).get(SYMLINK_KEY)
    )


def _is_same(known: Metadata | int, meta: Metadata) -> bool:
    """Whether a message of a sequence that is known is the known one."""
    if isinstance(known, int):
        return meta.deleted
    return not meta.deleted and known.nuid == meta.nuid


def extends(one: Metadata, other: Metadata) -> bool:
    """Whether `other` is known to begin with all bytes of `one`."""
    return (
        (other.attributes or {}).get(EXTENDS_KEY) == f"{one.nuid} {one.size}"
        and one.link is None
        and other.link is None
        and other.size >= one.size
    )


class Bucket:
    """The catalog of one bucket."""

    def __init__(
        self, identity: Identity, inodes: InodeTable, defaults: Defaults, parent: Node | None
    ) -> None:
        self.identity = identity
        self.name = identity.name
        self.root = Node(self, parent, identity.name.encode(), directory=True)
        self.loaded = False
        self.gone = False
        self.read_only_because: str | None = None
        self.created_ns = parse_time(identity.created) or 0
        self._inodes = inodes
        self._defaults = defaults
        # Per metadata subject the newest message: the object's metadata (packed, of most files), or a tombstone's
        # sequence.
        self._subjects: dict[str, Metadata | bytes | int] = {}
        self._by_nuid: dict[str, str | list[str]] = {}  # a list where there are several
        # Objects of one name that arrived under several subjects (clients encode names differently): all but
        # the newest, which is the one in the tree.
        self._shadowed: dict[tuple[str, bool], list[str]] = {}
        self._unseen: set[str] = set()
        self._void = False
        self._pending: dict[str, Metadata | None] = {}
        # A heap of (time, sequence, subject), where age matters.
        self._ages: list[tuple[int, int, str]] | None = None
        # A heap of (sequence, subject), where the stream drops what it got first.
        self._order: list[tuple[int, str]] | None = None
        # Of a listing: directories, whose markers may follow behind their entries; tombstones, whose directories may.
        self._made: list[tuple[Node, int]] = []
        self._removals: list[Metadata] = []
        self._heard = 0  # the highest sequence that the last listing has had
        # Subjects of which a listing had an older message than was known, or none: a replica that lags, a store that
        # was set back, or a purge. The leader knows which.
        self.doubtful: set[str] = set()
        self.watched_seq = 0  # everything up to this stream sequence has been taken in
        self.stored_seq = 0  # the stream has had at least so many

    # --- asking -----------------------------------------------------------------------------------------------

    def subject_prefix(self) -> str:
        return f"$O.{self.name}.M."

    def subject_of(self, name: str, node: Node | None = None) -> str:
        """The subject to publish `name` on: the one that its metadata arrived under, else Go's encoding."""
        if node is not None and node.meta is not None and node.meta.name == name and node.meta.subject:
            return node.meta.subject
        return self.subject_prefix() + encode_subject(name)

    def last_seq(self, subject: str) -> int:
        """The sequence to expect in a compare-and-swap: 0 where the subject holds nothing."""
        if self._void and subject in self._unseen:
            return 0  # known of another incarnation of the bucket, in which sequences meant something else
        known = self._subjects.get(subject)
        if isinstance(known, bytes):
            return peek(known)[0]
        return 0 if known is None else known if isinstance(known, int) else known.seq

    def _known(self, subject: str) -> Metadata | int | None:
        known = self._subjects.get(subject)
        return unpack(known, self.name) if isinstance(known, bytes) else known

    def live(self, subject: str) -> Metadata | None:
        if self._void and subject in self._unseen:
            return None
        known = self._known(subject)
        return None if known is None or isinstance(known, int) else known

    def nuid_of(self, subject: str) -> str:
        """The nuid of what is known under `subject`, empty where that is nothing or a tombstone."""
        known = self._subjects.get(subject)
        if isinstance(known, bytes):
            return peek(known)[3]
        return "" if known is None or isinstance(known, int) else known.nuid

    def subjects_of_nuid(self, nuid: str) -> list[str]:
        """The subjects of the live objects whose chunks have this nuid."""
        found = self._by_nuid.get(nuid, ())
        return [found] if isinstance(found, str) else list(found)

    def live_subjects(self) -> list[str]:
        return [subject for subject, known in self._subjects.items() if not isinstance(known, int)]

    def subjects(self) -> list[str]:
        """Those that hold something, tombstones included."""
        return list(self._subjects)

    def count_subjects(self) -> int:
        """The number of `subjects`."""
        return len(self._subjects)

    def is_empty(self) -> bool:
        return not any(not isinstance(known, int) for known in self._subjects.values())

    def child(self, directory: Node, name: bytes) -> Node | None:
        return directory.children.get(name) if directory.children is not None else None

    def find(self, path: Path) -> Node | None:
        node = self.root
        for part in path:
            found = self.child(node, part)
            if found is None:
                return None
            node = found
        return node

    def file_node(self, name: str) -> Node | None:
        """The node of the object `name`, also where it lies beside a directory of its name."""
        node = self.find(path_of(name))
        if node is not None and node.is_dir:
            return self.child(node, SELF)
        return node

    # --- inodes -----------------------------------------------------------------------------------------------

    def inode_of(self, node: Node) -> Inode:
        """The inode of a node, made if there is none. The caller accounts for the reference."""
        if node.inode is not None:
            return node.inode
        attributes = self._attributes(node)
        if not node.ino or self._inodes.knows(node.ino):
            node.ino = self._number_of(node, attributes.ino)
        attributes.ino = attributes.ino or self._number_of(node, attributes.ino)
        inode = Inode(Ino(node.ino), self, node, attributes)
        if not node.is_dir and (meta := node.meta) is not None:
            node.meta = inode.meta = meta
            inode.name = meta.name
            inode.size = meta.size
        self._inodes.add(inode)
        node.inode = inode
        return inode

    def wake(self, node: Node) -> Inode:
        """Make the inode of a node that dozes, with the references that the kernel has."""
        count = self._inodes.wake(node)
        inode = self.inode_of(node)
        inode.nlookup += count
        return inode

    def glance(self, node: Node) -> tuple[Attributes, int] | None:
        """Attributes and size of a regular file that nobody has an inode of; None of anything else.

        The caller may hand out the number `node.ino` with them, and let the node doze.
        """
        packed = node.packed
        if packed is not None:
            _, time_ns, name, nuid, size, _, _, _, values, _, _, _ = peek(packed)
        elif node.is_dir or (not node.dozing and node.inode is not None):
            return None
        else:
            meta = node.meta
            if meta is None or meta.link is not None:
                return None
            time_ns, name, nuid, size, values = meta.time_ns, meta.name, meta.nuid, meta.size, meta.attributes
        attributes = Attributes.of(values, time_ns, self._defaults)
        if attributes.mode & 0o170000 != S_IFREG:
            return None
        if not self._inodes.has_number(node):
            node.ino = self._number(attributes.ino, "F", name, nuid)
        return attributes, size

    def attributes(self, node: Node) -> Attributes:
        """What to store for a node: what its inode says, where the kernel knows it."""
        if node.inode is not None:
            return node.inode.attributes
        attributes = self._attributes(node)
        attributes.ino = attributes.ino or self._number_of(node, attributes.ino)
        return attributes

    def _number(self, ino: int, *version: str) -> Ino:
        """The number `ino` that an object carries, unless somebody has it; else one that follows from `version`."""
        if ino > ROOT_INO and not self._inodes.knows(ino):
            return Ino(ino)
        return self._inodes.number(self.name, self.identity.created, *version)

    def _number_of(self, node: Node, ino: int) -> Ino:
        """As `_number`: a directory keeps its number whatever its marker says, a file as long as it is the same one."""
        meta = node.meta
        if node.is_dir or meta is None:
            return self._number(ino, "D", b"/".join(node.path()).decode("utf-8", "surrogateescape"))
        return self._number(ino, "F", meta.name, meta.nuid)

    def _attributes(self, node: Node) -> Attributes:
        meta = node.meta
        if node.is_dir:
            time_ns = meta.time_ns if meta is not None else node.event_ns or self.created_ns
            attributes = Attributes.decode(
                meta.attributes if meta is not None else None, S_IFDIR, time_ns, self._defaults
            )
            # Whoever set the marker's times knew of what had happened before.
            if meta is not None and node.event_ns > attributes.ctime_ns:
                attributes.mtime_ns = attributes.ctime_ns = node.event_ns
            return attributes
        assert meta is not None
        if meta.link is not None:
            attributes = Attributes.decode(meta.attributes, S_IFLNK, meta.time_ns, self._defaults)
            attributes.mode = S_IFLNK | 0o777
            return attributes
        return Attributes.decode(meta.attributes, S_IFREG, meta.time_ns, self._defaults)

    def restore_attributes(self, inode: Inode) -> None:
        """What was changed could not be stored: show what is."""
        inode.edits = ()
        node = inode.node
        if node is not None and node.inode is inode and (node.is_dir or node.meta is not None):
            inode.attributes = self._attributes(node)

    def touch(self, directory: Node, time_ns: int) -> None:
        """An entry of `directory` came or went."""
        if time_ns > directory.event_ns:
            directory.event_ns = time_ns
        inode = directory.inode
        if inode is not None and time_ns > inode.attributes.ctime_ns:
            inode.attributes.mtime_ns = inode.attributes.ctime_ns = time_ns

    # --- own operations ---------------------------------------------------------------------------------------

    def begin_op(self, op: str) -> None:
        """Register an own message before it is sent: its echo mostly arrives before its ack."""
        self._pending[op] = None

    def is_own(self, meta: Metadata) -> bool:
        """Whether the message is the echo of an operation that is still under way."""
        return meta.op in self._pending

    def end_op(self, op: str) -> list[Effect]:
        """The operation has been applied, or its outcome is unknown: then the echo, if one came, is the truth."""
        echo = self._pending.pop(op, None)
        return [] if echo is None else self.apply(echo)

    # --- messages ---------------------------------------------------------------------------------------------

    def begin_load(self, identity: Identity, last_seq: int = 0) -> None:
        """A listing of the whole bucket, up to stream sequence `last_seq`, follows, then `end_load`."""
        self._unseen = set()
        self._void = self._void or identity != self.identity
        self.identity = identity
        self.gone = False
        # Of what came after the listing began (an own message, acknowledged in this moment) it says nothing.
        self._unseen = {
            subject for subject in self._subjects if self._void or self.last_seq(subject) <= last_seq
        }
        self._heard = 0
        if self._void:
            self.watched_seq = self.stored_seq = 0
        self.stored_seq = max(self.stored_seq, last_seq)

    def end_load(self) -> list[Effect]:
        """What the listing did not mention is gone, if it is older than something that was mentioned.

        The listing may be that of a replica that lags behind what is known, but it leaves out nothing in between.
        """
        effects: list[Effect] = []
        for subject in self._unseen:
            if self._void or self.last_seq(subject) <= self._heard:
                effects += self.purged(subject)
            else:
                self.doubtful.add(subject)
        self._unseen = set()
        self._void = False
        for node, time_ns in self._made:
            if node.parent is not None:
                self.touch(node.parent, time_ns if node.meta is None else self._entry_time(node.meta))
        self._made = []
        for meta in self._removals:
            parent = self.find(path_of(meta.name.removesuffix("/") or "/")[:-1])
            if parent is not None and parent.is_dir:
                self.touch(parent, self._entry_time(meta))
        self._removals = []
        self.loaded = True
        return effects

    def enter(self, messages: Sequence[Stored], first: int) -> int:
        """Take in messages of a listing, from number `first` on; returns the number of the one it leaves to `observe`.

        Of a million objects nearly all are files that nothing is known of yet, or known as they are: those cost as
        little as they can. None of them changes anything that the kernel could have asked about.
        """
        if self.loaded and not self._unseen:
            return first
        again = bool(self._unseen)
        subjects, by_nuid, prefix = self._subjects, self._by_nuid, self.subject_prefix()
        parent, above = self.root, ""
        for number in range(first, len(messages)):
            message = messages[number]
            seq = message.seq
            subject = message.subject.decode("utf-8", "replace")
            known = subjects.get(subject) if again else None
            if known is not None:
                there = peek(known) if isinstance(known, bytes) else None
                if there is None or there[:2] != (seq, message.time_ns):
                    return number
                if self._void and ((record := plain(message)) is None or record[2:4] != there[2:4]):
                    return number
                self._unseen.discard(subject)
            else:
                record = plain(message)
                if record is None:
                    return number
                _, time_ns, name, nuid = record[:4]
                folder, _, last = name.rpartition("/")
                part = file_name(last)
                if self.loaded or subject != prefix + encode_subject(name) or not last or part is None:
                    return number
                noted = named_ns(record[8])
                entry_ns = time_ns if noted is None else noted
                if name[: -len(last)] != above:
                    above = name[: -len(last)]
                    parent = self._make_directory(path_of(folder) if above else (), entry_ns, [])
                assert parent.children is not None
                packed = pack_record(record)
                if part in parent.children or subjects.setdefault(subject, packed) is not packed:
                    return number
                self.add_node(parent, part, directory=False).pack(packed)
                if entry_ns > parent.event_ns:
                    self.touch(parent, entry_ns)
                if nuid and by_nuid.setdefault(nuid, subject) is not subject:
                    self._add_nuid(nuid, subject)
            if seq > self._heard:
                self._hear(seq)
        return len(messages)

    def has_applied(self, message: Stored) -> bool:
        """Whether `message`, which this mount sent, is what is known of its subject, or older than that.

        Nothing of it is decoded. Of others' messages a sequence is no proof: a store that was set back gives
        them out again.
        """
        subject = message.subject.decode("utf-8", "replace")
        if self._void or subject in self._unseen or self.last_seq(subject) < message.seq:
            return False
        self._hear(message.seq)
        return True

    def observe(self, meta: Metadata) -> list[Effect]:
        """A message from the watcher."""
        self._hear(meta.seq)
        return self.learn(meta)

    def _hear(self, seq: int) -> None:
        """The watch has come to this sequence."""
        self._heard = max(self._heard, seq)
        self.watched_seq = max(self.watched_seq, seq)
        self.stored_seq = max(self.stored_seq, seq)

    def learn(self, meta: Metadata) -> list[Effect]:
        """A message that was asked for, ahead of the watcher; what lies before it is still to come."""
        if meta.op is not None and meta.op in self._pending:
            self._pending[meta.op] = meta
            self._unseen.discard(meta.subject)
            return []
        return self.apply(meta)

    def set_back(self, meta: Metadata) -> list[Effect]:
        """The leader has no newer message of this subject than `meta`, although one was known."""
        known = self._known(meta.subject)
        if isinstance(known, int):
            del self._subjects[meta.subject]
        elif known is not None:
            self._subjects[meta.subject] = replace(known, seq=0)
        return self.apply(meta)

    def apply(self, meta: Metadata, inode: Inode | None = None, *, own: bool = False) -> list[Effect]:
        """A message becomes what the tree shows, unless a newer one of its subject already did.

        `inode` is the own inode whose content this message has committed; the name then leads to it. An `own` message
        is one that somebody here asks about next, so that it is not packed.
        """
        subject = meta.subject
        known = self._known(subject)
        listed = subject in self._unseen
        void = self._void and listed
        self._unseen.discard(subject)
        if known is not None and not void:
            seq = known if isinstance(known, int) else known.seq
            if meta.seq < seq or (meta.seq == seq and _is_same(known, meta)):
                if listed and meta.seq < seq:
                    self.doubtful.add(subject)
                return []
            # The same sequence with something else: a store that was set back has given it out again.
        effects: list[Effect] = []
        old = None if known is None or isinstance(known, int) else known
        if old is not None:
            self._drop_nuid(old)
            if meta.deleted or old.name != meta.name or old.is_marker != meta.is_marker:
                self._subjects[subject] = meta.seq
                self._unbind(old, self._entry_time(meta), effects)
        if meta.deleted:
            self._subjects[subject] = meta.seq
            if not self.loaded:
                self._removals.append(meta)
            node = self.file_node(meta.name) if old is None and not meta.name.endswith("/") else None
            if node is not None and node.parent is not None and not node.has_meta and node.inode is None:
                self._remove(node, self._entry_time(meta), effects)
        else:
            self._subjects[subject] = meta
            self._add_nuid(meta.nuid, meta.subject)
            if self._ages is not None:
                heappush(self._ages, (meta.time_ns, meta.seq, subject))
            if self._order is not None:
                heappush(self._order, (meta.seq, subject))
            self._bind(meta, inode, effects, own=own)
        return effects

    def expired(self, before_ns: int) -> list[str]:
        """The live subjects whose message is older; to be asked every now and then where the stream has a max_age.

        The server drops such messages without a word. What turns out to be there still is told by `not_expired`.
        """
        if self._ages is None:
            self._ages = [
                (meta.time_ns, meta.seq, subject)
                for subject in self.live_subjects()
                if (meta := self.live(subject)) is not None
            ]
            heapify(self._ages)
        found = []
        while self._ages and self._ages[0][0] < before_ns:
            _, seq, subject = heappop(self._ages)
            if (meta := self.live(subject)) is not None and meta.seq == seq:
                found.append(subject)
        return found

    def not_expired(self, subject: str, time_ns: int) -> None:
        """The store still has it: its message counts as one of `time_ns` from now on."""
        meta = self.live(subject)
        if meta is not None and self._ages is not None:
            heappush(self._ages, (time_ns, meta.seq, subject))

    def dropped(self, first_seq: int) -> list[str]:
        """The live subjects whose message is older than the stream's first; what is there still: `not_dropped`."""
        if self._order is None:
            self._order = [(self.last_seq(subject), subject) for subject in self.live_subjects()]
            heapify(self._order)
        found = []
        while self._order and self._order[0][0] < first_seq:
            seq, subject = heappop(self._order)
            if self.last_seq(subject) == seq and self.live(subject) is not None:
                found.append(subject)
        return found

    def not_dropped(self, subject: str) -> None:
        """The store may have it still: it is told again."""
        if self._order is not None and self.live(subject) is not None:
            heappush(self._order, (self.last_seq(subject), subject))

    def purged(self, subject: str, seq: int | None = None) -> list[Effect]:
        """The subject holds no message any more (nor did when its newest known one was `seq`)."""
        known = self._known(subject)
        if known is None or (seq is not None and self.last_seq(subject) != seq):
            return []
        effects: list[Effect] = []
        del self._subjects[subject]
        if not isinstance(known, int):
            self._drop_nuid(known)
            self._unbind(known, known.time_ns, effects)
        return effects

    def _add_nuid(self, nuid: str, subject: str) -> None:
        if nuid:
            others = self._by_nuid.setdefault(nuid, subject)
            if isinstance(others, list):
                others.append(subject)
            elif others != subject:
                self._by_nuid[nuid] = [others, subject]

    def _drop_nuid(self, meta: Metadata) -> None:
        subjects = self._by_nuid.get(meta.nuid)
        if isinstance(subjects, list):
            if meta.subject in subjects:
                subjects.remove(meta.subject)
            if len(subjects) == 1:
                self._by_nuid[meta.nuid] = subjects[0]
        elif subjects == meta.subject:
            del self._by_nuid[meta.nuid]

    # --- the tree ---------------------------------------------------------------------------------------------

    def _bind(self, meta: Metadata, inode: Inode | None, effects: list[Effect], *, own: bool = False) -> None:
        if meta.is_marker:
            if meta.name.strip("/"):
                node = self._make_directory(path_of(meta.name[:-1]), self._entry_time(meta), effects)
            else:
                node = self._make_directory(path_of(meta.name)[:-1], self._entry_time(meta), effects)
            if self._is_shadow(node.meta, meta):
                return
            node.meta = meta
            if node.inode is not None:
                if not node.inode.uncommitted:
                    node.inode.attributes = self._attributes(node)
                effects.append(AttributesChanged(node.inode.ino))
            return
        path = path_of(meta.name)
        parent = self._make_directory(path[:-1], self._entry_time(meta), effects)
        assert parent.children is not None
        name = path[-1]
        found = parent.children.get(name)
        if found is not None and found.is_dir:
            parent, name = found, SELF
            assert parent.children is not None
            found = parent.children.get(name)
        if found is None:
            node = self.add_node(parent, name, directory=False)
            self.touch(parent, self._entry_time(meta))
            if inode is None and not own:
                self._pack(node, meta)
            else:
                node.meta = meta
            if inode is not None:
                self._attach(node, inode, meta, effects)
            effects.append(self._entry(parent, name))
            self._parent_attributes(parent, effects)
            return
        if not self._is_shadow(found.meta, meta):
            self._replace(found, meta, inode, effects)

    def _is_shadow(self, shown: Metadata | None, meta: Metadata) -> bool:
        """Two subjects, one name: the newer message is the one that the name shows. Whether that is not `meta`."""
        if shown is None or shown.subject == meta.subject:
            return False
        behind, newest = sorted((shown, meta), key=lambda one: one.seq)
        shadowed = self._shadowed.setdefault((meta.name, meta.is_marker), [])
        if meta.subject in shadowed:
            shadowed.remove(meta.subject)
        shadowed.append(behind.subject)
        return newest is not meta

    def _behind(self, meta: Metadata) -> Metadata | None:
        """What the name of `meta`, which is gone, shows from now on: the newest that was shadowed."""
        key = (meta.name, meta.is_marker)
        others = [self.live(subject) for subject in self._shadowed.pop(key, [])]
        remaining = sorted((other for other in others if other is not None), key=lambda other: other.seq)
        if len(remaining) > 1:
            self._shadowed[key] = [other.subject for other in remaining[:-1]]
        return remaining[-1] if remaining else None

    def _leave_shadow(self, meta: Metadata) -> None:
        key = (meta.name, meta.is_marker)
        shadowed = self._shadowed.get(key, [])
        if meta.subject in shadowed:
            shadowed.remove(meta.subject)
            if not shadowed:
                del self._shadowed[key]

    def _has_shadows(self, meta: Metadata | None) -> bool:
        return meta is not None and (meta.name, meta.is_marker) in self._shadowed

    @staticmethod
    def _entry_time(meta: Metadata) -> int:
        """When the name came into its directory, or left it: what natsfs noted, else the time of the message."""
        noted = removed_ns(meta.attributes) if meta.deleted else named_ns(meta.attributes)
        return meta.time_ns if noted is None else noted

    def _replace(self, node: Node, meta: Metadata, inode: Inode | None, effects: list[Effect]) -> None:
        old = node.inode
        node.meta = meta
        if inode is not None:
            if old is not None and old is not inode:
                self._detach(old, effects)
                effects.append(self._entry(node.parent, node.name))
            elif old is None:
                effects.append(self._entry(node.parent, node.name))
            self._attach(node, inode, meta, effects)
            return
        if old is not None and old.meta is not None and same_content(old.meta, meta):
            old.meta = meta
            if not old.uncommitted:
                old.attributes = self._attributes(node)
            effects.append(AttributesChanged(old.ino))
            return
        if old is not None and old.meta is not None and not old.layered and extends(old.meta, meta):
            # Whoever reads it finds the bytes that were there where they were, and more behind them.
            effects.append(ContentChanged(old.ino, old.size, meta.size))
            old.meta = meta
            old.size = meta.size
            if not old.uncommitted:
                old.attributes = self._attributes(node)
            return
        # Somebody else's content: a new inode, as if they had renamed a file over this one. The old inode keeps
        # its bytes for whoever has it open.
        if old is not None:
            self._detach(old, effects)
            node.inode = None
        node.ino = 0
        self._pack(node, meta)
        effects.append(self._entry(node.parent, node.name))

    def put_by(self, node: Node) -> None:
        """Nobody has an inode of `node` any more."""
        meta = None if node.is_dir or node.packed is not None else node.meta
        if meta is not None and self.last_seq(meta.subject) == meta.seq:
            self._pack(node, meta)

    def _pack(self, node: Node, meta: Metadata) -> None:
        """`node` shows `meta`, and nobody has an inode of it yet: of a million files most are only listed."""
        packed = pack(meta)
        if packed is None:
            node.meta = meta
        else:
            node.pack(packed)
            self._subjects[meta.subject] = packed

    @staticmethod
    def _detach(inode: Inode, effects: list[Effect]) -> None:
        """Its name leads to something else: whoever has it open finds no link to it."""
        inode.node = None
        effects.append(AttributesChanged(inode.ino))

    def _attach(self, node: Node, inode: Inode, meta: Metadata, effects: list[Effect]) -> None:
        if inode.node is None:
            effects.append(AttributesChanged(inode.ino))  # the kernel may know that it had no name
        node.inode = inode
        node.ino = inode.ino
        inode.node = node
        inode.gone = False
        inode.meta = meta
        inode.name = meta.name

    def _unbind(self, meta: Metadata, time_ns: int, effects: list[Effect]) -> None:
        if meta.is_marker:
            path = path_of(meta.name)[:-1]
            node = self.find(path)
            if node is None or node.meta is None or node.meta.subject != meta.subject:
                self._leave_shadow(meta)
            else:
                node.meta = self._behind(meta)
                if node.inode is not None:
                    node.inode.attributes = self._attributes(node)
                    effects.append(AttributesChanged(node.inode.ino))
                self._prune(node, time_ns, effects)
            return
        node = self.file_node(meta.name)
        if node is None or node.meta is None or node.meta.subject != meta.subject:
            self._leave_shadow(meta)
            return
        behind = self._behind(meta)
        if behind is not None:
            self._replace(node, behind, None, effects)
            return
        self._remove(node, time_ns, effects)

    def _remove(self, node: Node, time_ns: int, effects: list[Effect]) -> None:
        parent = node.parent
        assert parent is not None
        inode = node.inode
        self.drop_node(node)
        if inode is not None and inode.pins:
            # Somebody else removed it. What is being written here is not theirs to remove: it is committed or, where it
            # builds on what they removed, put aside with an error. Own removals set the flag themselves.
            inode.unlinked = False
            effects.append(AttributesChanged(inode.ino))
        if inode is not None:
            inode.gone = True
        self.touch(parent, time_ns)
        effects.append(self._entry(parent, node.name, node.ino))
        self._parent_attributes(parent, effects)
        self._prune(parent, time_ns, effects)

    def _prune(self, node: Node, time_ns: int, effects: list[Effect]) -> None:
        """A directory that neither a marker nor an entry holds is gone, and its parent may be next."""
        while node is not self.root and not node.has_meta and node.children is not None:
            if any(name != SELF for name in node.children):
                return
            if node.inode is not None and node.inode.ino == ROOT_INO:
                return  # what is mounted stays, as an empty directory
            parent = node.parent
            assert parent is not None
            beside = node.children.get(SELF)
            if node.inode is not None:
                node.inode.node = None
                node.inode.unlinked = True
            effects.append(self._entry(parent, node.name, node.ino))
            if beside is not None:
                node.children = None
                # The inode first: one that is made only now takes the message along.
                node.inode, node.meta, node.ino = beside.inode, beside.meta, beside.ino
                if node.inode is not None:
                    node.inode.node = node
                parent.subdirs -= 1
                self._parent_attributes(parent, effects)
                return
            self.drop_node(node)
            self.touch(parent, time_ns)
            self._parent_attributes(parent, effects)
            node = parent

    def _make_directory(self, path: Path, time_ns: int, effects: list[Effect]) -> Node:
        """The directory `path`, with what is missing above it; `time_ns` is when that came."""
        node = self.root
        for part in path:
            assert node.children is not None
            found = node.children.get(part)
            if found is None:
                found = self.add_node(node, part, directory=True)
                if self.loaded:
                    self.touch(node, time_ns)
                else:
                    self._made.append((found, time_ns))
                effects.append(self._entry(node, part))
                self._parent_attributes(node, effects)
            elif not found.is_dir:
                beside = Node(self, found, SELF, directory=False)
                beside.inode, beside.meta, beside.ino = found.inode, found.meta, found.ino
                if beside.inode is not None:
                    beside.inode.node = beside
                found.children = {SELF: beside}
                found.meta, found.inode, found.ino = None, None, 0
                node.subdirs += 1
                effects.append(self._entry(node, part))
                self._parent_attributes(node, effects)
            node = found
        return node

    def add_node(self, parent: Node, name: bytes, *, directory: bool) -> Node:
        assert parent.children is not None
        node = Node(self, parent, name, directory=directory)
        parent.children[name] = node
        parent.subdirs += directory
        return node

    def drop_node(self, node: Node) -> None:
        """Take a node out of the tree. Its inode stays with whoever has it, without a name."""
        parent = node.parent
        assert parent is not None
        assert parent.children is not None
        if parent.children.get(node.name) is node:
            del parent.children[node.name]
            parent.subdirs -= node.is_dir
        if node.inode is not None:
            node.inode.node = None
            node.inode.unlinked = True

    def _entry(self, parent: Node | None, name: bytes, gone: int = 0) -> Effect:
        ino = parent.inode.ino if parent is not None and parent.inode is not None else Ino(0)
        return EntryChanged(ino, name, gone)

    def _parent_attributes(self, parent: Node, effects: list[Effect]) -> None:
        if parent.inode is not None:
            effects.append(AttributesChanged(parent.inode.ino))

    # --- own renames ------------------------------------------------------------------------------------------

    def files_below(self, node: Node) -> Iterator[Node]:
        """Every node at or below `node` that has a message of its own: files, and directories with markers."""
        if node.has_meta:
            yield node
        for child in list((node.children or {}).values()):
            yield from self.files_below(child)

    def can_restate(self, meta: Metadata, old_subject: str, tombstone_seq: int) -> bool:
        """Whether nobody's newer message for either name of a rename has arrived."""
        return self._can_take_over(meta) and self.last_seq(old_subject) < tombstone_seq

    def _can_take_over(self, meta: Metadata) -> bool:
        """Whether `meta` is the newest message of its subject, which holds no object of another name."""
        there = self.live(meta.subject)
        return self.last_seq(meta.subject) < meta.seq and (there is None or there.name == meta.name)

    def move(self, node: Node, parent: Node, name: bytes) -> None:
        """Give a node a new place; what was there has been dropped before. Messages follow with `restate`."""
        old = node.parent
        assert old is not None
        assert old.children is not None
        assert parent.children is not None
        del old.children[node.name]
        old.subdirs -= node.is_dir
        node.parent, node.name = parent, name
        parent.children[name] = node
        parent.subdirs += node.is_dir

    def rename(
        self, node: Node, directory: Node, name: bytes, meta: Metadata, old_subject: str, tombstone_seq: int
    ) -> bool:
        """Both messages of a file's rename are stored: move its node, with its inode, to its new place.

        False, and nothing is changed, if somebody else's news for one of the two names came between; the caller applies
        the two messages one by one then.
        """
        target = self.child(directory, name)
        if (
            not self.can_restate(meta, old_subject, tombstone_seq)
            # An object below the old name makes a directory of the node.
            or node.is_dir
            or self.find(node.path()) is not node
            or self.find(directory.path()) is not directory
            or (target is not None and target.is_dir)
            # Where a name has two spellings, what appears behind it is the messages' affair.
            or (target is not None and target.meta is not None and target.meta.subject != meta.subject)
            or self._has_shadows(node.meta)
            or self._has_shadows(meta)
        ):
            return False
        if target is not None:
            self.drop_node(target)
        self.move(node, directory, name)
        return self.restate(node, meta, old_subject, tombstone_seq)

    def exchange(self, one: Node, two: Node, to_two: Metadata, to_one: Metadata) -> bool:
        """Both messages of an exchange of files are stored: `one` is the object of `to_two`, `two` that of `to_one`.

        False, and nothing is changed, if somebody else's news for one of the names came between.
        """
        if (
            not self._can_take_over(to_two)
            or not self._can_take_over(to_one)
            or any(
                node.is_dir
                or self.find(node.path()) is not node
                or node.meta is None
                or node.meta.subject != meta.subject
                for node, meta in ((one, to_one), (two, to_two))
            )
            or self._has_shadows(to_two)
            or self._has_shadows(to_one)
        ):
            return False
        places = [(node.parent, node.name) for node in (two, one)]
        for node, (parent, name), meta in zip((one, two), places, (to_two, to_one), strict=True):
            assert parent is not None
            assert parent.children is not None
            node.parent, node.name = parent, name
            parent.children[name] = node
            self._take_over(node, meta)
        return True

    def _take_over(self, node: Node, meta: Metadata) -> None:
        """`meta` replaces what its subject held, and is the object of `node`."""
        replaced = self.live(meta.subject)
        if replaced is not None:
            self._drop_nuid(replaced)
        self._subjects[meta.subject] = meta
        self._add_nuid(meta.nuid, meta.subject)
        inode = node.inode
        node.meta = meta
        if inode is not None and not node.is_dir:
            inode.meta = meta
            inode.name = meta.name

    def restate(self, node: Node, meta: Metadata, old_subject: str, tombstone_seq: int) -> bool:
        """After a rename: `node` is now the object of `meta`, and its old subject holds a tombstone.

        False if somebody else's newer message for either name arrived meanwhile; the caller applies the two
        messages one by one then.
        """
        if not self.can_restate(meta, old_subject, tombstone_seq):
            return False
        old = self.live(old_subject)
        if old is not None:
            self._drop_nuid(old)
        self._subjects[old_subject] = tombstone_seq
        self._take_over(node, meta)
        return True

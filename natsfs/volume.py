"""What is mounted: the buckets in use with their catalogs, kept true by the watch; and the way changes are published.

Who owns what: the trio thread owns catalogs, inodes and files; code between two awaits is atomic. `take` applies
what the watch of a bucket tells, in order, in the task of that watch. An operation registers its messages before they
are sent and applies them itself, so their echoes are passed over.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import trio

from natsfs.catalog.attributes import Attributes, Defaults, parse_time, renamed_at, same_inode
from natsfs.catalog.bucket import Bucket, Identity
from natsfs.catalog.inodes import (
    ROOT_INO,
    AttributesChanged,
    Effect,
    EntryChanged,
    Ino,
    Inode,
    InodeTable,
    Node,
)
from natsfs.catalog.metadata import NUID, Metadata, tombstone
from natsfs.config import Config
from natsfs.deferred import Deferred
from natsfs.errors import (
    BucketFull,
    BucketGone,
    Conflict,
    Ending,
    MountError,
    ReadOnlyBucket,
    StoreError,
    Unreachable,
)
from natsfs.files.diskcache import DiskCache
from natsfs.files.reader import Reader
from natsfs.files.spool import Spool
from natsfs.locks import SharedLock
from natsfs.names import decode_subject, path_of
from natsfs.notifier import Notifier
from natsfs.purges import Purge, Purges
from natsfs.store.frames import Message
from natsfs.store.publish import IN_DOUBT, Known
from natsfs.store.store import BucketInfo, Store
from natsfs.store.watch import (
    BucketsChanged,
    Event,
    Gone,
    Hint,
    Interrupted,
    Loaded,
    Loading,
    Messages,
    decode_message,
)

log = logging.getLogger(__name__)

BUCKET_POLL = 30.0  # seconds between two looks at the list of buckets, where advisories do not tell
RECONCILE = 60.0  # seconds between two comparisons of the catalog with what is stored
COMPARE = 1800.0  # seconds after which that is done also where the number of messages is as it should be
COUNTS, COUNT_AGAIN = 5, 0.2  # times to count them, and seconds between two
SLICE = 2000  # subjects that are gone through before others have their turn
EXPIRE = 1.0  # seconds between two looks at what has reached its stream's max_age
REST = 1.0  # seconds at most between two looks at what may have been purged
SUSPECTS = 1000  # names that are asked about one by one; of more, the whole list is asked for
OUTCOME_UNKNOWN = 0  # in place of the sequence that ended a version: it is not known whether it ever was one
TWIN, TWINS = 0.1, 10.0  # seconds until an object with two names is looked at again, at first and at most
FREEZE = 20_000  # listed objects after which the garbage collector is told to leave what is there alone
YOUNG = 25_000  # new objects after which it looks for garbage: not while a bucket is listed
TAKES = 3  # attempts to take a message back, where others change its name in the same moment
INSIST = 10.0  # seconds, at most, between two attempts at what the store has still to take
HEAR = (
    2.0  # seconds; a message that was purged since never comes, and a watch that is silent is known by then
)
INFO_AGE = 2.0  # seconds for which statfs(2) believes the last answer


class Mounted:
    """A bucket in the mount: its catalog once somebody used it, and what orders its changes."""

    def __init__(self, name: str, node: Node | None) -> None:
        self.name = name
        self.node = node  # the bucket's entry in the mount's root, None if the bucket is the root
        self.catalog: Bucket | None = None
        self.info: BucketInfo | None = None
        self.info_time = 0.0
        self.loading = trio.Lock()
        self.loaded = trio.Event()
        self.followed = False  # whether the watch stands, so that the catalog is what the store holds
        # Of the connection, in which the bucket was listed last.
        self.loading_generation = self.generation = 0
        # The highest sequence of an own message that was acknowledged in each generation of the connection.
        self._acknowledged: dict[int, int] = {}
        self._set_backs = 0
        self.compared = time.monotonic()  # when the catalog was compared in full with what is stored
        self.surplus: int | None = None  # of stored messages over known ones, when nothing was amiss
        self.dropped = (
            0.0,
            0,
        )  # when its first message was looked for, and up to where the watch had come then
        self.takes = False  # whether the last message was stored: then attributes may follow in a moment
        self.names = SharedLock()

    def acknowledged(self, seq: int, generation: int) -> None:
        self._acknowledged[generation] = max(self._acknowledged.get(generation, 0), seq)

    @property
    def highest(self) -> int:
        """The highest sequence of an own message."""
        return max(self._acknowledged.values(), default=0)

    def identify(self, identity: Identity, last_seq: int, generation: int) -> Identity:
        """The identity of a store that was listed in `generation`, by what was known to be in it before.

        The watch may have been away while own messages were stored. One that was acknowledged before the connection
        was made on which the listing began has to be in the listing, or the store was set back. By the time the listing
        is looked at the connection may have been made anew again: what was acknowledged since says nothing.
        """
        known = max((seq for made, seq in self._acknowledged.items() if made < generation), default=0)
        created = self.catalog.identity.created if self.catalog is not None else identity.created
        if known > last_seq and identity.created == created:
            log.warning("bucket %s was restored: everything known of it is read anew", self.name)
            self._set_backs += 1
        if known > last_seq or identity.created != created:
            self._acknowledged = {}
        else:
            since = {made: seq for made, seq in self._acknowledged.items() if made >= generation}
            self._acknowledged = {generation - 1: known} | since
        return replace(identity, epoch=identity.epoch + self._set_backs)


@dataclass(slots=True)
class Sent:
    """A message of an operation that is stored, or may be; `before` is the object that its name led to until then."""

    op: str
    meta: Metadata
    expected: int
    before: Metadata | None
    seq: int | None = None  # None: whether it is stored is not known


class Operation:
    """A group of own messages: registered, published, applied, in this order, whatever the watcher sees meanwhile.

    `sent` are those that were not refused.
    """

    def __init__(self, volume: Volume, catalog: Bucket) -> None:
        self._volume = volume
        self._catalog = catalog
        self._ops: list[str] = []
        self.sent: list[Sent] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        effects: list[Effect] = []
        for op in self._ops:
            effects += self._catalog.end_op(op)
        self._volume.notifier.send(effects)

    async def publish(self, meta: Metadata, expected: int, content: bytes | None = None) -> Metadata:
        """Publish, with the content if it is one chunk that has still to go; returns the message as it is stored.

        Raises `Conflict` and other `StoreError`s.
        """
        self._volume.check_writable(self._catalog)
        op = self._volume.store.new_op()
        self._ops.append(op)
        self._catalog.begin_op(op)
        mounted = self._volume.mounted_of(self._catalog)
        takes, mounted.takes = mounted.takes, False
        replaces = before = None  # what is expected may be an own message that is not applied yet
        if expected and self._catalog.last_seq(meta.subject) == expected:
            before = self._catalog.live(meta.subject)
            replaces = "" if before is None else before.nuid
        doubtful = not mounted.followed or self._volume.store.is_silent(mounted.name)
        generation = IN_DOUBT if doubtful else mounted.generation
        highest = max(self._catalog.stored_seq, mounted.highest)

        async def send() -> int:
            known = Known(expected, replaces, generation)
            return await self._volume.store.publish(meta, known, op, content)

        sent = Sent(op, meta, expected, before)
        self.sent.append(sent)
        try:
            try:
                sent.seq = seq = await send()
            except BucketFull:
                # What waits for its grace time to pass is room.
                if content is not None or not self._volume.purges.hurry(self._catalog.name):
                    raise
                await self._volume.purges.settle(self._catalog.name)
                sent.seq = seq = await send()
        except StoreError as error:
            if isinstance(error, Conflict):
                mounted.takes = takes
            # A tombstone after which somebody used the name is refused, too, where its answer was lost.
            may_be_stored = isinstance(error, Conflict) and error.doubtful and meta.deleted
            if not isinstance(error, Unreachable) and not may_be_stored:
                self.sent.remove(sent)
            raise
        mounted.takes = True
        mounted.acknowledged(seq, self._volume.store.generation)
        if seq <= highest:
            await self._stored_elsewhere(mounted, replace(meta, seq=seq), has_content=content is not None)
        return replace(meta, seq=seq, time_ns=time.time_ns(), op=op)

    async def _stored_elsewhere(self, mounted: Mounted, meta: Metadata, *, has_content: bool) -> None:
        """A sequence that had been given before: `meta` is in another stream of this name than what was known.

        Raises `Conflict`, and takes it back, if its content is not there.
        """
        volume = self._volume
        volume.follow_anew(mounted)
        if has_content or not meta.size or meta.link is not None:
            return
        if await volume.store.prove(mounted.name, meta):
            return
        op = volume.store.new_op()
        self._ops.append(op)
        self._catalog.begin_op(op)
        await volume.store.publish(tombstone(meta), Known(meta.seq), op)
        raise Conflict(f"bucket {mounted.name} was made again or restored meanwhile", 0)

    async def take_back(
        self, sent: Sent, mine: set[str], left: set[str], new_subject: str | None = None, *, at_once: bool
    ) -> None:
        """Let the name of a message of this or an earlier operation lead again to what it led to before.

        What somebody else has put there since stays: a message of another operation than those in `mine`, to which
        the new one is added. If it is done `at_once`, before anybody has heard of the failure, somebody may have taken
        what stood there for a moment, or changed its attributes: they did not mean what it had replaced.

        Whoever has put something under a name that had its tombstone found it free, and replaced nothing: what had the
        name before keeps the one that it got instead. Such versions are added to `left`, by their nuid, and messages
        that lead to one of them are not taken back. Nor does it get its old name where the new one, `new_subject`, was
        given to it by somebody else as well.
        """
        volume, before, subject = self._volume, sent.before, sent.meta.subject
        if sent.meta.nuid in left:
            await volume.refresh(self._catalog, subject)
            return
        found: Metadata | None = None
        for _ in range(TAKES):
            found = await volume.store.metadata(self._catalog.name, subject)
            there = 0 if found is None else found.seq
            # One that has not arrived may still do so: another one in its stead raises the sequence that it expects.
            may_arrive = sent.seq is None and there == sent.expected
            if found is None or found.deleted:
                was_taken = at_once and before is not None
            else:
                # The same object with other attributes is what was put there, unless another rename put it there.
                is_same = bool(found.nuid) and found.nuid == sent.meta.nuid
                was_taken = (
                    at_once and is_same and renamed_at(found.attributes) == renamed_at(sent.meta.attributes)
                )
            is_others = not may_arrive and not was_taken and (found is None or found.op not in mine)
            if is_others or (found is not None and found.nuid in left):
                break
            if before is not None and new_subject is not None:
                new = await volume.store.metadata(self._catalog.name, new_subject)
                if new is not None and new.nuid == before.nuid and new.op not in mine:
                    break
            if before is not None and not await volume.is_whole(self._catalog, before):
                return  # whoever replaced it under its other name has removed its content
            known = len(self.sent)
            try:
                self.apply(await self.publish(tombstone(sent.meta) if before is None else before, there))
            except Conflict:
                continue
            finally:
                mine.update(one.op for one in self.sent[known:] if one.meta.subject == subject)
            return
        if sent.meta.deleted and before is not None:
            if found is None or found.deleted:
                # Most likely `before` was removed, where the tombstone may not have been stored.
                is_free = sent.seq is not None
            else:
                is_free = found.nuid != before.nuid and not same_inode(found.attributes, before.attributes)
            if is_free and before.nuid and await volume.is_whole(self._catalog, before):
                left.add(before.nuid)
            await volume.refresh(self._catalog, subject)

    def apply(self, meta: Metadata, inode: Inode | None = None) -> None:
        """Make a published message what the tree shows.

        The kernel knows of a name that its own call made. It does not of what a commit did: there the name may have
        led to somebody else's version, or to nothing, and leads to `inode` from now on.
        """
        catalog = self._catalog
        before = catalog.live(meta.subject)
        effects = catalog.apply(meta, inode, own=True)
        if inode is None:
            # Also to spare directories: one whose entry is invalidated has no path for a shell inside it until
            # somebody looks it up again.
            path = path_of(meta.name.removesuffix("/") if meta.is_marker else meta.name)
            parent = catalog.find(path[:-1])
            if parent is not None and parent.inode is not None:
                ino = parent.inode.ino
                known = {EntryChanged(ino, path[-1]), AttributesChanged(ino)}
                known |= {AttributesChanged(Ino(e.gone)) for e in effects if isinstance(e, EntryChanged)}
                effects = [
                    e
                    for e in effects
                    if (replace(e, gone=0) if isinstance(e, EntryChanged) else e) not in known
                ]
        self._volume.notifier.send(effects)
        if before is not None and before.nuid != meta.nuid:
            self._volume.discard(catalog, before, meta.seq)


class Volume:
    def __init__(self, config: Config, nursery: trio.Nursery) -> None:
        options = config.options
        self.config = config
        self.store = Store(config)
        self.inodes = InodeTable()
        self.notifier = Notifier()
        self.deferred = Deferred(nursery)
        self.defaults = Defaults(
            os.getuid() if options.uid is None else options.uid,
            os.getgid() if options.gid is None else options.gid,
            options.file_mode,
            options.dir_mode,
        )
        self.spool = Spool(options.spool_dir, options.spool_size)
        self.disk = (
            DiskCache(options.disk_cache, options.disk_cache_size, config.display_source)
            if options.disk_cache
            else None
        )
        self.reader = Reader(self.store, options.cache_size, nursery, self.disk, self._created)
        key = hashlib.sha256("\0".join(sorted(config.servers)).encode()).hexdigest()[:16]
        spool_dir = Path(options.spool_dir)
        self.purges = Purges(
            spool_dir / f"purges-{key}-{os.getpid()}.jsonl",
            f"purges-{key}-*.jsonl",
            options.purge_grace,
            self._verdict,
            self.store.purge_chunks,
        )
        self.buckets: dict[str, Mounted] = {}
        self.making: set[str] = set()  # buckets that a mkdir here is making at this moment
        self.root: Node  # of the mount
        self._nursery = nursery
        self._ending = False
        self._loads: set[trio.CancelScope] = set()
        self._buckets_changed = trio.Event()
        self._suspects: dict[Bucket, set[str | int | None]] = {}
        # Subjects whose object has another name, too: its nuid, when to look again, and the pause before that.
        self._twins: dict[Bucket, dict[str, tuple[str, float, float]]] = {}
        self._started_ns = time.time_ns()
        self._listed = 0
        self._heard = trio.Event()  # set and replaced when messages of a watch have been applied
        self._account = (0, -1)
        self._account_time = -INFO_AGE

    # --- life -------------------------------------------------------------------------------------------------

    async def start(self, connections: trio.Nursery) -> None:
        """Connect, in a nursery that outlives all else here, and load what the root shows. Raises `MountError`."""
        if self.disk is not None:
            await trio.to_thread.run_sync(self.disk.open)
        await self.store.open(connections, self)
        gc.set_threshold(YOUNG)
        config = self.config
        if config.bucket is None:
            self.root = Node(None, None, b"", directory=True)
            attributes = Attributes(
                stat.S_IFDIR | self.defaults.dir_mode,
                self.defaults.uid,
                self.defaults.gid,
                0,
                *([self._started_ns] * 4),
            )
            inode = Inode(ROOT_INO, None, self.root, attributes)
            self.root.inode, self.root.ino = inode, ROOT_INO
            self.inodes.add(inode)
            await self._list_buckets()
        else:
            mounted = self.buckets[config.bucket] = Mounted(config.bucket, None)
            try:
                catalog = await self.load(mounted)
            except BucketGone:
                raise MountError(
                    f"bucket {config.bucket!r} does not exist; "
                    "create it, or mount the server without a bucket and use mkdir"
                ) from None
            except StoreError as error:
                raise MountError(f"bucket {config.bucket!r} cannot be read: {error}") from None
            node: Node | None = catalog.root
            for part in config.prefix.split("/") if config.prefix else []:
                node = catalog.child(node, part.encode()) if node is not None else None
            if node is None or not node.is_dir:
                raise MountError(f"bucket {config.bucket!r} has no directory {config.prefix!r}")
            self.root = node
            # The kernel calls the root 1, whatever directory it is.
            node.ino = ROOT_INO
            catalog.inode_of(node).nlookup += 1
        self.purges.load()
        self._nursery.start_soon(self.purges.run)
        self._nursery.start_soon(self._poll_buckets)
        self._nursery.start_soon(self._reconcile_all)
        self._nursery.start_soon(self._expire_all)

    async def close(self) -> None:
        """After the last commit: stop everything that was started; bounded in time."""
        self.notifier.stop()
        self.purges.close()
        await self.store.close()
        self.spool.close()
        if self.disk is not None:
            await trio.to_thread.run_sync(self.disk.close)

    # --- the watches ------------------------------------------------------------------------------------------

    def hint(self, hint: Hint) -> None:
        if isinstance(hint, BucketsChanged):
            self._buckets_changed.set()
            return
        mounted = self.buckets.get(hint.bucket)
        if mounted is not None and mounted.catalog is not None and mounted.catalog.loaded:
            what = hint.what
            # Of what is newer than all that has come nothing is known yet.
            not_yet = isinstance(what, int) and what > mounted.catalog.watched_seq
            self._suspect(mounted.catalog, None if not_yet else what)

    async def take(self, event: Event) -> None:
        mounted = self.buckets.get(event.bucket)
        if mounted is None:
            return
        try:
            await self._apply(mounted, event)
        except Exception:
            # A message nobody foresaw must not end the daemon; what it was about is in the log.
            log.exception("an event could not be applied: %.200r", event)

    async def _apply(self, mounted: Mounted, event: Event) -> None:
        catalog = mounted.catalog
        match event:
            case Loading(identity=identity, last_seq=last_seq, generation=generation):
                if catalog is None:
                    parent = None if mounted.node is None else self.root
                    catalog = mounted.catalog = Bucket(identity, self.inodes, self.defaults, parent)
                    self._adopt(mounted, catalog)
                identity = mounted.identify(identity, last_seq, generation)
                catalog.begin_load(identity, last_seq)
                mounted.loading_generation = generation
            case Messages(messages=messages):
                assert catalog is not None
                await self._observe(catalog, messages)
                self._heard.set()
                self._heard = trio.Event()
            case Loaded():
                assert catalog is not None
                first = not catalog.loaded
                effects = catalog.end_load()
                # Below a bucket that is loaded for the first time the kernel knows no name. An entry invalidated
                # after its first lookup would be a file whose pages are dropped at its close.
                if first:
                    root = catalog.root.inode
                    effects = [] if root is None else [AttributesChanged(root.ino)]
                self.notifier.send(effects)
                for subject in catalog.doubtful:
                    self._suspect(catalog, subject)
                if mounted.info is not None:
                    catalog.read_only_because = mounted.info.read_only_because
                mounted.loaded.set()
                mounted.followed = True
                mounted.generation = mounted.loading_generation
                self._nursery.start_soon(self._take_stock, mounted, catalog, 0)
            case Interrupted():
                mounted.followed = False
            case Gone():
                mounted.followed = False
                self._bucket_gone(mounted)

    async def _observe(self, catalog: Bucket, messages: list[Message]) -> None:
        """Apply messages in order; a removal only when the kernel has heard of the entries that appeared before it.

        Each directory's notifications have an order of their own. A file that is renamed elsewhere would be under
        no name for whoever asks about the new one, which the kernel believes absent, and then about the old.
        """
        metas: list[Metadata] = []
        number = 0
        while (number := catalog.enter(messages, number)) < len(messages):
            message = messages[number]
            number += 1
            meta = self._news(catalog, message)
            if meta is None:
                continue
            metas.append(meta)
            if meta.deleted:
                await self.notifier.entries_told()
            self._learn(catalog, meta)
        if catalog.loaded:
            self._suspect_renames(catalog, metas)
            return
        self._listed += len(messages)
        if self._listed > FREEZE:
            # What was listed stays: a collection that goes over all of it, time and again, finds nothing.
            self._listed = 0
            gc.freeze()

    def take_now(self, bucket: str, message: Message) -> bool:
        """As `_observe` for a single message, unless that has to wait for the kernel."""
        mounted = self.buckets.get(bucket)
        catalog = None if mounted is None else mounted.catalog
        if catalog is None or not catalog.loaded:
            return False
        try:
            meta = self._news(catalog, message)
            if meta is not None and meta.deleted and self.notifier.has_entries_to_tell:
                return False
            if meta is not None:
                self._learn(catalog, meta)
                self._suspect_renames(catalog, [meta])
        except Exception:
            log.exception("a message could not be applied: %.200r", message)
        self._heard.set()
        self._heard = trio.Event()
        return True

    def _news(self, catalog: Bucket, message: Message) -> Metadata | None:
        """What a message says, if it is not one of this mount's that was applied already."""
        if not self.store.has_sent(message):
            self.store.courtesy.asked()
        elif catalog.has_applied(message):
            return None
        return decode_message(message)

    def _learn(self, catalog: Bucket, meta: Metadata) -> None:
        before = catalog.nuid_of(meta.subject) if catalog.loaded and not meta.deleted else ""
        try:
            effects = catalog.observe(meta)
        except Exception:
            # Of a batch only the message that nobody foresaw may be lost.
            log.exception("metadata on %s (sequence %d) is passed over", meta.subject, meta.seq)
            return
        if catalog.loaded:
            self.notifier.send(effects)
        if before and meta.link is None and catalog.nuid_of(meta.subject) == meta.nuid:
            self.reader.replaced(before, meta)

    def _adopt(self, mounted: Mounted, catalog: Bucket) -> None:
        """The bucket's tree takes the place of the entry in the root that stood for it."""
        node = mounted.node
        if node is None:
            return
        catalog.root.inode, catalog.root.ino = node.inode, node.ino
        if node.inode is not None:
            node.inode.node = catalog.root
            node.inode.bucket = catalog
        assert self.root.children is not None
        self.root.children[node.name] = catalog.root
        mounted.node = catalog.root

    def _suspect_renames(self, catalog: Bucket, metas: list[Metadata]) -> None:
        """Other clients rename by putting the same nuid under a new name and purging the old one without a trace."""
        for meta in metas:
            if meta.nuid and not meta.deleted and not catalog.is_own(meta):
                for subject in catalog.subjects_of_nuid(meta.nuid):
                    if subject != meta.subject:
                        self._suspect(catalog, subject)
                        self._await_purge(catalog, subject, meta.nuid)

    def _await_purge(self, catalog: Bucket, subject: str, nuid: str) -> None:
        """The purge of an old name may come only after it was looked at: it is looked at some more times."""
        twins = self._twins.get(catalog)
        if twins is None:
            self._twins[catalog] = twins = {}
            self._nursery.start_soon(self._look_at_twins, catalog)
        twins[subject] = nuid, trio.current_time() + TWIN, TWIN

    async def _look_at_twins(self, catalog: Bucket) -> None:
        twins = self._twins[catalog]
        while twins:
            await trio.sleep(TWIN)
            now = trio.current_time()
            for subject, (nuid, due, pause) in list(twins.items()):
                subjects = catalog.subjects_of_nuid(nuid)
                if pause > TWINS or len(subjects) < 2 or subject not in subjects:
                    del twins[subject]
                elif now >= due:
                    self._suspect(catalog, subject)
                    twins[subject] = nuid, now + 4 * pause, 4 * pause
        del self._twins[catalog]

    def _suspect(self, catalog: Bucket, what: str | int | None) -> None:
        """Have a subject, a sequence or everything looked at soon; one task a bucket does it, however many come."""
        suspects = self._suspects.get(catalog)
        if suspects is None:
            self._suspects[catalog] = {what}
            self._nursery.start_soon(self._look_at_suspects, catalog)
        else:
            suspects.add(what)

    async def _look_at_suspects(self, catalog: Bucket) -> None:
        while suspects := self._suspects[catalog]:
            self._suspects[catalog] = set()
            began = trio.current_time()
            if None in suspects or len(suspects) > SUSPECTS:
                await self._look_again(catalog, None)
            else:
                for subject in await self._subjects_of(catalog, suspects):
                    await self._look_again(catalog, subject)
            # In a burst of purges elsewhere the looks leave half of the time to those who wait for an answer, and a
            # name that is purged last is still gone at once.
            await trio.sleep(min(trio.current_time() - began, REST))
        del self._suspects[catalog]

    async def _subjects_of(self, catalog: Bucket, suspects: set[str | int | None]) -> set[str]:
        """The subjects among them, and those whose newest message has one of the sequences."""
        found = {what for what in suspects if isinstance(what, str)}
        if len(found) < len(suspects):
            known = await self._sequences(catalog)
            found |= {subject for subject, seq in known.items() if seq in suspects}
        return found

    async def _sequences(self, catalog: Bucket) -> dict[str, int]:
        """Of every subject the newest known sequence."""
        known: dict[str, int] = {}
        for number, subject in enumerate(catalog.subjects()):
            known[subject] = catalog.last_seq(subject)
            if number % SLICE == 0:
                await trio.lowlevel.checkpoint()
        return known

    async def _look_again(self, catalog: Bucket, subject: str | None) -> None:
        """Ask whether what the catalog holds is still stored; None asks about every object."""
        try:
            if subject is None:
                await self.refresh_all(catalog)
            else:
                await self.refresh(catalog, subject)
        except BucketGone:
            pass
        except StoreError as error:
            log.warning("bucket %s could not be compared with the store: %s", catalog.name, error)
        except Exception:
            log.exception("bucket %s could not be compared with the store", catalog.name)

    async def refresh(self, catalog: Bucket, subject: str) -> Metadata | None:
        """Bring one name up to date, by the word of the stream's leader, which is returned.

        What the catalog shows may lie behind it: an own message that is still under way is applied by its operation.
        """
        known = catalog.last_seq(subject)
        meta = await self.store.metadata(catalog.name, subject)
        believed = subject in catalog.doubtful
        if meta is not None and meta.seq < known and not believed:
            # The newest message was deleted, unless this was a leader of before, which does not know of it yet.
            believed = (await self.store.bucket(catalog.name)).last_seq >= known
            meta = await self.store.metadata(catalog.name, subject)
        if meta is None:
            effects = catalog.purged(subject, known)
        elif believed and meta.seq < known == catalog.last_seq(subject):
            effects = catalog.set_back(meta)
        else:
            effects = catalog.learn(meta)
        catalog.doubtful.discard(subject)
        self.notifier.send(effects)
        return meta

    async def hear(self, catalog: Bucket, seq: int) -> None:
        """Wait until the watch has come to `seq`, which the leader has told: all that came before is known then.

        Raises `Unreachable` if the watch does not stand.
        """
        with trio.move_on_after(HEAR) as scope:
            while catalog.watched_seq < seq:
                await self._heard.wait()
        if scope.cancelled_caught and (
            not self.mounted_of(catalog).followed or self.store.is_silent(catalog.name)
        ):
            raise Unreachable(f"bucket {catalog.name}: no news of others' changes arrive")

    async def refresh_all(self, catalog: Bucket) -> None:
        """Compare what is known with the newest messages that are stored: some may have been removed unheard.

        What is missing, or older than what is known, may be news to a replica that lags: the leader is asked.
        """
        known = await self._sequences(catalog)
        older: set[str] = set()
        is_empty = True

        def take(messages: list[Message]) -> None:
            nonlocal is_empty
            is_empty = is_empty and not messages
            for message in messages:
                subject = message.subject.decode("utf-8", "replace")
                seq = known.get(subject)
                if seq is not None and message.seq >= seq:
                    del known[subject]
                elif seq is not None:
                    older.add(subject)

        await self.store.newest_of_each(catalog.name, take)
        if is_empty and not await self.store.newest_metadata(catalog.name):
            # Everything was purged: one answer says it all.
            for subject, seq in known.items():
                self.notifier.send(catalog.purged(subject, seq))
            known = {}
        # A tombstone that is gone shows nothing.
        older |= {subject for subject in known if catalog.live(subject) is not None}
        for subject in catalog.doubtful | older:
            await self.refresh(catalog, subject)

    async def _reconcile_all(self) -> None:
        while True:
            await trio.sleep(RECONCILE)
            for mounted in list(self.buckets.values()):
                if mounted.catalog is not None and mounted.catalog.loaded and not mounted.catalog.gone:
                    await self._reconcile(mounted, mounted.catalog)

    async def _reconcile(self, mounted: Mounted, catalog: Bucket) -> None:
        """Compare the catalog with the store: in full where the number of messages says so, and every now and then.

        What the watch does not tell of is a removal, and that makes messages fewer.
        """
        if time.monotonic() - mounted.compared < COMPARE and not catalog.doubtful:
            for _ in range(COUNTS):
                surplus = await self._surplus(catalog)
                if surplus is not None and surplus == mounted.surplus:
                    return
                await trio.sleep(COUNT_AGAIN)  # a message may be under way
        await self._look_again(catalog, None)
        await self._take_stock(mounted, catalog)

    async def _take_stock(self, mounted: Mounted, catalog: Bucket, least: int | None = None) -> None:
        """Everything has been listed: what is stored beside it is no sign of a removal.

        Less than `least` is one: what a watch has listed was all stored. Messages under way are counted, or known, too
        early, so any other number has to come twice.
        """
        mounted.compared = time.monotonic()
        mounted.surplus = None
        counted: set[int] = set()
        for _ in range(COUNTS):
            surplus = await self._surplus(catalog)
            if surplus is not None:
                if surplus == least or surplus in counted:
                    mounted.surplus = surplus if least is None else max(least, surplus)
                    return
                counted.add(surplus)
            await trio.sleep(COUNT_AGAIN)

    async def _surplus(self, catalog: Bucket) -> int | None:
        """Stored metadata messages that the catalog does not know: those that others left behind newer ones, say."""
        try:
            return await self.store.count_metadata(catalog.name) - catalog.count_subjects()
        except StoreError as error:
            log.debug("bucket %s could not be counted: %s", catalog.name, error)
        except Exception:
            log.exception("bucket %s could not be counted", catalog.name)
        return None

    async def _expire_all(self) -> None:
        """A message that reaches the stream's max_age goes without a sign: whether it has is asked when it is due.

        So do the first ones of a stream that makes room for new ones: whether some have is asked when new ones came.
        """
        while True:
            await trio.sleep(EXPIRE)
            for mounted in list(self.buckets.values()):
                catalog, info = mounted.catalog, mounted.info
                if info is None or catalog is None or not catalog.loaded or not mounted.followed:
                    continue
                if info.drops:
                    await self._look_for_dropped(mounted, catalog, info)
                if not info.ttl:
                    continue
                before_ns = time.time_ns() - int(info.ttl * 1e9)
                due = catalog.expired(before_ns)
                if len(due) > SUSPECTS:
                    await self._look_again(catalog, None)
                for subject in due if len(due) <= SUSPECTS else ():
                    await self._look_again(catalog, subject)
                for subject in due:
                    catalog.not_expired(subject, before_ns + int(EXPIRE * 1e9))

    async def _look_for_dropped(self, mounted: Mounted, catalog: Bucket, info: BucketInfo) -> None:
        """What lies before the first message of a stream is gone."""
        now, (looked, seq) = time.monotonic(), mounted.dropped
        if not info.is_nearly_full and seq == catalog.watched_seq and now - looked < BUCKET_POLL:
            return
        mounted.dropped = now, catalog.watched_seq
        try:
            info = await self.store.bucket(mounted.name)
        except StoreError as error:
            log.info("bucket %s could not be looked at: %s", mounted.name, error)
            return
        self._take_info(mounted, info)
        if info.created != catalog.identity.created or not mounted.followed:
            return
        due = catalog.dropped(info.first_seq)
        if len(due) > SUSPECTS:
            await self._look_again(catalog, None)
        for subject in due if len(due) <= SUSPECTS else ():
            await self._look_again(catalog, subject)
        for subject in due:
            catalog.not_dropped(subject)

    # --- buckets ----------------------------------------------------------------------------------------------

    async def _poll_buckets(self) -> None:
        while True:
            with trio.move_on_after(BUCKET_POLL):
                await self._buckets_changed.wait()
            self._buckets_changed = trio.Event()
            try:
                await self._list_buckets()
            except StoreError as error:
                log.warning("the list of buckets could not be read: %s", error)
            except Exception:
                log.exception("the list of buckets could not be read")

    async def _list_buckets(self) -> None:
        if self.config.bucket is not None:
            # An account may be allowed to see this one stream only.
            mounted = self.buckets[self.config.bucket]
            try:
                info = await self.store.bucket(mounted.name)
            except BucketGone:
                self._bucket_gone(mounted)
            else:
                self._take_info(mounted, info)
                await self._follow_again(mounted, info)
            return
        before = set(self.buckets)
        found = {info.name: info for info in await self.store.buckets()}
        for name, info in found.items():
            known = self.buckets.get(name)
            if known is not None:
                self._take_info(known, info)
        for name, info in found.items():
            if name in self.making:
                continue  # the kernel hears of it from its own call
            if name not in self.buckets:
                self.add_bucket(info)
                self.notifier.send([EntryChanged(ROOT_INO, name.encode()), AttributesChanged(ROOT_INO)])
            else:
                await self._follow_again(self.buckets[name], info)
        # One that was made while the list was on its way is not in it; whether another is gone is asked.
        for name in before - found.keys():
            try:
                await self.store.bucket(name)
            except BucketGone:
                if name in self.buckets:
                    self._bucket_gone(self.buckets[name])

    def follow_anew(self, mounted: Mounted) -> None:
        """What is known of a bucket may be of another stream: until it is listed again the leader is asked first."""
        if not mounted.followed:
            return  # it is being listed
        log.warning("bucket %s was re-created or restored: it is listed again", mounted.name)
        mounted.followed = False

        async def watch() -> None:
            await self.store.unwatch(mounted.name)
            await self.store.watch(mounted.name)

        self._nursery.start_soon(watch)

    async def _follow_again(self, mounted: Mounted, info: BucketInfo) -> None:
        """A bucket that was gone is back under its name, or another one has taken its name at once."""
        catalog = mounted.catalog
        if catalog is not None and (catalog.gone or catalog.identity.created != info.created):
            mounted.followed = False
            await self.store.unwatch(mounted.name)
            await self.store.watch(mounted.name)

    def _take_info(self, mounted: Mounted, info: BucketInfo) -> None:
        mounted.info, mounted.info_time = info, time.monotonic()
        if mounted.catalog is not None:
            if info.read_only_because and not mounted.catalog.read_only_because:
                log.warning("bucket %s is read-only here: %s", info.name, info.read_only_because)
            mounted.catalog.read_only_because = info.read_only_because

    def add_bucket(self, info: BucketInfo) -> Node:
        """A bucket appears in the root; its content is loaded when it is first used."""
        assert self.root.children is not None
        node = Node(None, self.root, info.name.encode(), directory=True)
        self.root.children[node.name] = node
        self.root.subdirs += 1
        self.buckets[info.name] = Mounted(info.name, node)
        self._take_info(self.buckets[info.name], info)
        self._touch_root()
        return node

    def _touch_root(self) -> None:
        assert self.root.inode is not None
        self.root.inode.attributes.mtime_ns = self.root.inode.attributes.ctime_ns = time.time_ns()

    def drop_bucket(self, mounted: Mounted) -> None:
        """Take a bucket out of the root."""
        del self.buckets[mounted.name]
        node = mounted.node
        assert node is not None
        assert self.root.children is not None
        self.root.children.pop(node.name, None)
        self.root.subdirs -= 1
        if node.inode is not None:
            inode = node.inode
            inode.node = None
            inode.unlinked = True
            inode.pins -= 1
            self.inodes.release(inode)
        if mounted.catalog is not None:
            mounted.catalog.gone = True
        self._touch_root()

    def _bucket_gone(self, mounted: Mounted) -> None:
        catalog = mounted.catalog
        if mounted.node is not None:
            ino = mounted.node.ino
            if self.buckets.get(mounted.name) is mounted:
                self.drop_bucket(mounted)
                self._nursery.start_soon(self.store.unwatch, mounted.name)
            self.notifier.send(
                [EntryChanged(ROOT_INO, mounted.name.encode(), ino), AttributesChanged(ROOT_INO)]
            )
        elif catalog is not None and not catalog.gone:
            # The mount's own bucket: everything in it is gone, and the mount waits for it to come back.
            log.warning("bucket %s does not exist any more", mounted.name)
            catalog.gone = True
            effects: list[Effect] = []
            for subject in catalog.live_subjects():
                effects += catalog.purged(subject)
            self.notifier.send(effects)

    async def load(self, mounted: Mounted) -> Bucket:
        """The bucket's catalog, complete. The first use of a bucket waits here; raises `StoreError`."""
        if mounted.catalog is not None and mounted.catalog.loaded:
            return mounted.catalog
        async with mounted.loading:
            if mounted.catalog is None or not mounted.catalog.loaded:
                with trio.CancelScope() as scope:
                    self._loads.add(scope)
                    try:
                        if self._ending:
                            scope.cancel()
                        self._take_info(mounted, await self.store.bucket(mounted.name))
                        await self.store.watch(mounted.name)
                        scope.deadline = trio.current_time() + self.config.options.timeout
                        await mounted.loaded.wait()
                    finally:
                        self._loads.remove(scope)
                if scope.cancelled_caught and self._ending:
                    raise Ending(f"bucket {mounted.name} is not listed: the mount is being taken down")
                if scope.cancelled_caught:
                    raise Unreachable(f"bucket {mounted.name} could not be listed in time")
            assert mounted.catalog is not None
            return mounted.catalog

    def end_loads(self) -> None:
        """The mount is being taken down: whoever waits for a bucket to be listed gets an error, now and later."""
        self._ending = True
        for scope in self._loads:
            scope.cancel()

    def created_ns(self, mounted: Mounted) -> int:
        created = parse_time(mounted.info.created) if mounted.info is not None else None
        return self._started_ns if created is None else created

    def _created(self, bucket: str) -> str | None:
        """When the server made the bucket, as far as that is known: it tells buckets of one name apart."""
        mounted = self.buckets.get(bucket)
        return (
            mounted.catalog.identity.created if mounted is not None and mounted.catalog is not None else None
        )

    def mounted_of(self, catalog: Bucket) -> Mounted:
        mounted = self.buckets.get(catalog.name)
        if mounted is None or mounted.catalog is not catalog:
            raise BucketGone(f"bucket {catalog.name} does not exist any more")
        return mounted

    async def info(self, mounted: Mounted) -> BucketInfo:
        """Use and limit of a bucket, at most `INFO_AGE` old unless the server does not answer."""
        if mounted.info is None or time.monotonic() - mounted.info_time > INFO_AGE:
            try:
                with trio.fail_after(5):
                    self._take_info(mounted, await self.store.bucket(mounted.name))
            except (trio.TooSlowError, Unreachable):
                if mounted.info is None:
                    raise
        assert mounted.info is not None
        return mounted.info

    async def account_use(self) -> tuple[int, int]:
        """Bytes stored in the account, and its limit (-1: none)."""
        if time.monotonic() - self._account_time > INFO_AGE:
            try:
                with trio.fail_after(5):
                    account = await self.store.account()
            except (trio.TooSlowError, Unreachable):
                pass  # statfs(2) answers with what was last known
            else:
                self._account = (
                    int(account.get("storage", 0)),
                    int(account["limits"].get("max_storage", -1)),
                )
                self._account_time = time.monotonic()
        return self._account

    def operation(self, catalog: Bucket) -> Operation:
        return Operation(self, catalog)

    async def is_whole(self, catalog: Bucket, meta: Metadata) -> bool:
        """Whether all content of a version is stored. Most clients remove that of what they replace."""
        return not meta.size or meta.link is not None or await self.store.prove(catalog.name, meta)

    def until_done(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        """Do in the background what the store did not answer to, or had no room for, until it has."""

        async def insist() -> None:
            delay = 0.1
            while True:
                await trio.sleep(delay)
                try:
                    await work()
                except BucketGone:
                    return
                except (Unreachable, BucketFull) as error:
                    log.info("%s waits: %s", what, error)
                    delay = min(delay * 2, INSIST)
                except Exception as error:
                    log.error("%s failed: %s", what, error)
                    return
                else:
                    return

        self._nursery.start_soon(insist)

    def check_writable(self, catalog: Bucket) -> None:
        if catalog.read_only_because is not None:
            raise ReadOnlyBucket(f"bucket {catalog.name} is read-only: {catalog.read_only_because}")
        if catalog.gone:
            raise BucketGone(f"bucket {catalog.name} does not exist any more")

    # --- garbage ----------------------------------------------------------------------------------------------

    def discard(self, catalog: Bucket, meta: Metadata, seq: int) -> None:
        """The version `meta` has been replaced or removed by the own message `seq`."""
        if NUID.fullmatch(meta.nuid) and meta.size and meta.link is None:
            self.purges.add(catalog.name, catalog.identity.created, meta.nuid, meta.subject, seq)

    def discard_unless_live(self, catalog: Bucket, nuid: str, subject: str, *, refused: bool) -> None:
        """Chunks whose metadata was sent without success: they go after the grace time if nothing has them then.

        Unless the store `refused` it, the metadata may have been stored all the same, or may still be on its way.
        """
        seq = max(1, catalog.watched_seq) if refused else OUTCOME_UNKNOWN
        self.purges.add(catalog.name, catalog.identity.created, nuid, subject, seq)

    async def _verdict(self, purge: Purge) -> bool | None:
        """No chunk of a live object is ever purged: see the design, decision 10."""
        mounted = self.buckets.get(purge.bucket)
        if mounted is None:
            # Nothing is known of a bucket that this mount does not show.
            return None if self.config.bucket is not None else False
        catalog = await self.load(mounted)
        if catalog.identity.created != purge.created or catalog.identity.epoch:
            return False
        if not mounted.followed:
            return None  # the nuid may have a new name that nobody here has heard of
        if self.reader.in_use(purge.bucket, purge.nuid):
            return None
        if catalog.subjects_of_nuid(purge.nuid):
            return False
        if catalog.watched_seq < purge.seq:
            newest = await self.store.newest_metadata(purge.bucket)
            if catalog.watched_seq < newest:
                return None
        meta = await self.store.metadata(purge.bucket, purge.subject)
        if meta is not None and meta.nuid == purge.nuid:
            return False
        if purge.seq == OUTCOME_UNKNOWN and not await self._fence(catalog, purge.subject, meta):
            return None
        return not catalog.subjects_of_nuid(purge.nuid)

    async def _fence(self, catalog: Bucket, subject: str, found: Metadata | None) -> bool:
        """Raise the sequence of `subject`, which holds `found`: what was sent for it before cannot be stored any more.

        Nothing less will do: the server answers a read before a message that reached it earlier (it keeps a queue for
        each), and a message may come out of the buffer of a connection that was given up. False if something was stored
        meanwhile.
        """
        if found is None:
            name = decode_subject(subject.removeprefix(catalog.subject_prefix()))
            found = tombstone(Metadata(name=name, bucket=catalog.name, nuid="", subject=subject))
        op = self.store.new_op()
        catalog.begin_op(op)
        try:
            await self.store.publish(found, Known(found.seq), op)
        except Conflict:
            return False
        finally:
            self.notifier.send(catalog.end_op(op))
        return True

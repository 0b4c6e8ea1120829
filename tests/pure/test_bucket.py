"""The catalog of a bucket against a model that computes the tree anew from the newest message of each subject."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count, cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from natsfs.catalog.attributes import Attributes, Defaults
from natsfs.catalog.bucket import Bucket, Identity
from natsfs.catalog.inodes import AttributesChanged, Effect, EntryChanged, InodeTable, Node
from natsfs.catalog.metadata import Link, Metadata, encode, new_nuid, tombstone
from natsfs.names import SELF, Path, encode_subject, path_of

DEFAULTS = Defaults(uid=1, gid=2, file_mode=0o644, dir_mode=0o755)
CREATED = "2026-01-01T00:00:00Z"

NAMES = ["a", "a/b", "a/b/c", "a/b/d", "e/f", "g", "a/", "a/b/", "e/", "h/", "/", "//x", "e/f/"]
SPELLINGS = ["", "~"]  # clients encode one name in different ways

names = st.sampled_from(NAMES)
spellings = st.sampled_from(SPELLINGS)
Tree = dict[Path, int | None]  # by path: the sequence of what it shows; None for a directory without a marker


def expected_tree(messages: dict[str, Metadata | int]) -> Tree:
    newest: dict[tuple[str, bool], Metadata] = {}
    for meta in messages.values():
        if not isinstance(meta, int):
            key = (meta.name, meta.is_marker)
            if key not in newest or newest[key].seq < meta.seq:
                newest[key] = meta
    directories: Tree = {}
    files: Tree = {}
    for (name, marker), meta in newest.items():
        path = path_of(name)
        if marker:
            path = path_of(name[:-1]) if name.strip("/") else path[:-1]
            directories[path] = meta.seq
        else:
            files[path] = meta.seq
        for end in range(1, len(path)):
            directories.setdefault(path[:end])
    directories.setdefault(())
    return directories | {(*path, SELF) if path in directories else path: seq for path, seq in files.items()}


def actual_tree(bucket: Bucket) -> Tree:
    found: Tree = {}

    def walk(node: Node) -> None:
        assert node.bucket is bucket
        assert node.subdirs == sum(child.is_dir for child in (node.children or {}).values())
        if node.is_dir or node.meta is not None:
            found[node.path()] = node.meta.seq if node.meta is not None else None
        if node.is_dir and node is not bucket.root:
            assert node.children or node.meta is not None, f"{node.path()} is empty and has no marker"
        for name, child in (node.children or {}).items():
            assert child.name == name
            assert child.parent is node
            walk(child)

    walk(bucket.root)
    return found


@dataclass
class Message:
    """As `Stored`."""

    subject: bytes
    data: bytes
    seq: int
    time_ns: int


def message_of(meta: Metadata) -> Message:
    return Message(meta.subject.encode(), encode(meta, mtime=CREATED), meta.seq, meta.time_ns)


def listed(bucket: Bucket, metas: list[Metadata]) -> Iterator[Metadata]:
    """Those of a listing that the catalog leaves to `observe`."""
    messages = [message_of(meta) for meta in metas]
    number = 0
    while (number := bucket.enter(messages, number)) < len(messages):
        yield metas[number]
        number += 1


class BucketMachine(RuleBasedStateMachine):
    """`stored` is the server's newest message per subject, `queue` what the watch has still to deliver, `known` what
    the catalog has been told and must show.
    """

    def __init__(self) -> None:
        super().__init__()
        self.identity = Identity("b", CREATED)
        self.table = InodeTable()
        self.bucket = Bucket(self.identity, self.table, DEFAULTS, None)
        self.stored: dict[str, Metadata] = {}
        self.log: list[Metadata | str] = []  # what made `stored`: messages, and subjects that were purged
        self.known: dict[str, Metadata | int] = {}
        self.queue: list[Metadata] = []
        self.echoed: dict[str, Metadata] = {}
        self.running: dict[str, Metadata] = {}
        self.seq = 0
        self.ops = 0
        self.births = count(1)
        self.bucket.begin_load(self.identity, 0)
        self.bucket.end_load()

    # --- the server ---

    def subject(self, name: str, spelling: str) -> str:
        return self.bucket.subject_prefix() + encode_subject(name) + spelling

    def store(self, meta: Metadata) -> Metadata:
        self.seq += 1
        stored = replace(meta, seq=self.seq, time_ns=self.seq * 1000)
        self.stored[meta.subject] = stored
        self.log.append(stored)
        # The rollup removes what came before on the subject, also where the watch has not delivered it.
        self.queue = [waiting for waiting in self.queue if waiting.subject != meta.subject]
        self.queue.append(stored)
        return stored

    def note(self, meta: Metadata) -> None:
        known = self.known.get(meta.subject, 0)
        if (known if isinstance(known, int) else known.seq) < meta.seq:
            self.known[meta.subject] = meta.seq if meta.deleted else meta

    def check(self, effects: list[Effect]) -> None:
        for effect in effects:
            assert isinstance(effect, EntryChanged | AttributesChanged)

    # --- other clients ---

    @rule(name=names, spelling=spellings, same=st.booleans(), size=st.integers(0, 1), where=st.none() | names)
    def others_put(self, name: str, spelling: str, same: bool, size: int, where: str | None) -> None:
        subject = self.subject(where or name, spelling)
        before = self.stored.get(subject)
        if same and before is not None and before.name == name and not before.deleted:
            self.store(replace(before, op=None, attributes={"mode": "600"}))  # chmod, by another natsfs
        else:
            self.store(Metadata(name=name, bucket="b", nuid=new_nuid(), size=size, subject=subject))

    @rule(pick=st.integers(0, 99))
    @precondition(lambda self: self.stored)
    def others_delete(self, pick: int) -> None:
        meta = sorted(self.stored.values(), key=lambda meta: meta.seq)[pick % len(self.stored)]
        self.store(replace(tombstone(meta), op=None))

    @rule(pick=st.integers(0, 99), heard=st.booleans())
    @precondition(lambda self: self.stored)
    def others_purge(self, pick: int, heard: bool) -> None:
        subject = sorted(self.stored)[pick % len(self.stored)]
        self.seq += 1
        del self.stored[subject]
        self.log.append(subject)
        self.queue = [waiting for waiting in self.queue if waiting.subject != subject]
        if heard and subject in self.known:
            known = self.bucket.last_seq(subject)
            assert self.bucket.purged(subject, known + 1) == []
            self.check(self.bucket.purged(subject, known))
            del self.known[subject]

    @rule(number=st.integers(1, 5))
    def deliver(self, number: int) -> None:
        for meta in self.queue[:number]:
            if meta.op is not None and self.bucket.has_applied(message_of(meta)):
                self.note(meta)
                continue
            self.check(self.bucket.observe(meta))
            if meta.op in self.running:
                self.echoed[meta.op] = meta
            else:
                self.note(meta)
        del self.queue[:number]

    # --- own operations ---

    def publish(self, meta: Metadata) -> Metadata | None:
        """As a message with compare-and-swap: None on a conflict."""
        there = self.stored.get(meta.subject)
        if self.bucket.last_seq(meta.subject) != (there.seq if there is not None else 0):
            return None
        self.ops += 1
        op = f"op{self.ops}"
        self.bucket.begin_op(op)
        stored = self.store(replace(meta, op=op))
        self.running[op] = stored
        return stored

    @rule(name=names, spelling=spellings, deleted=st.booleans(), echo_first=st.booleans(), lost=st.booleans())
    def own(self, name: str, spelling: str, deleted: bool, echo_first: bool, lost: bool) -> None:
        meta = Metadata(name=name, bucket="b", nuid=new_nuid(), subject=self.subject(name, spelling))
        stored = self.publish(tombstone(meta) if deleted else meta)
        if stored is None:
            return
        if echo_first:
            self.deliver(len(self.queue))
        if not lost:
            self.check(self.bucket.apply(stored, own=True))
            self.note(stored)
        assert stored.op is not None
        self.end(stored.op)

    def end(self, op: str) -> None:
        self.check(self.bucket.end_op(op))
        del self.running[op]
        echo = self.echoed.pop(op, None)
        if echo is not None:
            self.note(echo)

    @rule(pick=st.integers(0, 99), to=names, echo=st.integers(0, 2))
    def own_rename(self, pick: int, to: str, echo: int) -> None:
        files = [path for path in actual_tree(self.bucket) if not self.node(path).is_dir]
        if not files or to.endswith("/"):
            return
        node = self.node(sorted(files)[pick % len(files)])
        old = node.meta
        assert old is not None
        path = path_of(to)
        directory = self.bucket.find(path[:-1])
        if directory is None or not directory.is_dir:
            return
        target = self.bucket.child(directory, path[-1])
        if (target is not None and (target.is_dir or target is node)) or old.name == to:
            return
        subject = self.bucket.subject_of(to, target)
        moved = self.publish(replace(old, name=to, subject=subject))
        if moved is None:
            return
        if echo == 0:
            self.deliver(len(self.queue))
        buried = self.publish(tombstone(old)) if self.bucket.last_seq(old.subject) == old.seq else None
        if echo == 1:
            self.deliver(len(self.queue))
        inode = node.inode
        if (
            buried is not None
            and self.stays(node.parent, node)
            and self.bucket.rename(node, directory, path[-1], moved, old.subject, buried.seq)
        ):
            assert node.inode is inode, "a rename keeps the inode"
        else:
            self.check(self.bucket.apply(moved))
            if buried is not None:
                self.check(self.bucket.apply(buried))
        self.note(moved)
        if buried is not None:
            self.note(buried)
        for message in (moved, buried):
            if message is not None and message.op is not None:
                self.end(message.op)

    @rule(pick=st.integers(0, 99))
    def asked_about_and_forgotten(self, pick: int) -> None:
        files = sorted(path for path in actual_tree(self.bucket) if not self.node(path).is_dir)
        if files:
            node = self.node(files[pick % len(files)])
            meta = node.meta
            assert meta is not None
            inode = self.bucket.inode_of(node)
            inode.nlookup += 1
            self.table.forget(inode.ino, 1)
            assert node.inode is (inode if inode.nlookup or inode.pins else None)
            assert node.meta is not None
            assert replace(node.meta, op=None) == replace(meta, op=None)

    @rule(pick=st.integers(0, 99), other=st.integers(0, 99), echo=st.integers(0, 2))
    def own_exchange(self, pick: int, other: int, echo: int) -> None:
        files = sorted(path for path in actual_tree(self.bucket) if not self.node(path).is_dir)
        if len(files) < 2 or pick % len(files) == other % len(files):
            return
        one, two = self.node(files[pick % len(files)]), self.node(files[other % len(files)])
        first, second = one.meta, two.meta
        assert first is not None
        assert second is not None
        if first.name.endswith("/") or second.name.endswith("/"):
            return
        to_two = self.publish(replace(first, name=second.name, subject=second.subject))
        if to_two is None:
            return
        if echo == 0:
            self.deliver(len(self.queue))
        to_one = self.publish(replace(second, name=first.name, subject=first.subject))
        if echo == 1:
            self.deliver(len(self.queue))
        inodes = one.inode, two.inode
        if to_one is not None and self.bucket.exchange(one, two, to_two, to_one):
            assert (one.inode, two.inode) == inodes, "an exchange keeps the inodes"
            assert self.bucket.file_node(first.name) is two
            assert self.bucket.file_node(second.name) is one
        else:
            self.check(self.bucket.apply(to_two))
            if to_one is not None:
                self.check(self.bucket.apply(to_one))
        for message in (to_two, to_one):
            if message is not None:
                self.note(message)
                assert message.op is not None
                self.end(message.op)

    def stays(self, directory: Node | None, leaving: Node) -> bool:
        """Whether a directory exists without an entry; where it would not, a rename writes its marker first."""
        assert directory is not None
        if directory is self.bucket.root or directory.meta is not None:
            return True
        if directory.children is None:
            return False  # its last entry went meanwhile, and an object of its name took its place
        return any(child is not leaving and name != SELF for name, child in directory.children.items())

    # --- loading again ---

    @rule(change=st.sampled_from(["", "", "created", "epoch"]), lost=st.integers(0, 3), cut=st.booleans())
    def reload(self, change: str, lost: int, cut: bool) -> None:
        """After an interruption; with another identity the sequences begin anew or step back."""
        if change == "created":
            self.stored = {}
            self.seq = 0
            self.identity = Identity("b", f"{CREATED[:-1]}.{next(self.births):09}Z")
            for name in NAMES[: lost * 2]:
                self.store(Metadata(name=name, bucket="b", nuid=new_nuid(), subject=self.subject(name, "")))
        elif change == "epoch":
            for meta in sorted(self.stored.values(), key=lambda meta: -meta.seq)[:lost]:
                del self.stored[meta.subject]
            self.seq = max((meta.seq for meta in self.stored.values()), default=0)
            self.identity = replace(self.identity, epoch=self.identity.epoch + 1)
        self.queue = []
        if change:
            self.log = [*sorted(self.stored.values(), key=lambda meta: meta.seq)]
        if cut and self.stored:
            # The first attempt breaks off in the middle.
            self.bucket.begin_load(self.identity, self.seq)
            for meta in listed(self.bucket, list(self.stored.values())[: lost + 1]):
                self.check(self.bucket.observe(meta))
        self.bucket.begin_load(self.identity, self.seq)
        if change:
            for subject in self.known:
                if subject not in self.stored:
                    assert self.bucket.last_seq(subject) == 0, "a sequence of the bucket before"
        for meta in listed(self.bucket, sorted(self.stored.values(), key=lambda meta: meta.seq)):
            self.check(self.bucket.observe(meta))
        self.check(self.bucket.end_load())
        self.ask_the_leader()
        self.known = {s: meta.seq if meta.deleted else meta for s, meta in self.stored.items()}

    @rule(behind=st.integers(0, 6), delivered=st.integers(0, 6))
    def reload_from_a_replica_that_lags(self, behind: int, delivered: int) -> None:
        """It lists what it has, and may get some more before the listing ends; what is known stays."""
        self.queue = []
        at = max(0, len(self.log) - behind)
        replica: dict[str, Metadata] = {}
        for event in self.log[:at]:
            if isinstance(event, str):
                replica.pop(event, None)
            else:
                replica[event.subject] = event
        listing = sorted(replica.values(), key=lambda meta: meta.seq)
        messages = [event for event in self.log[at:] if not isinstance(event, str)]
        self.bucket.begin_load(self.identity, self.seq)
        for meta in listed(self.bucket, [*listing, *messages[:delivered]]):
            self.check(self.bucket.observe(meta))
        self.check(self.bucket.end_load())
        for subject, known in self.known.items():
            if subject in self.stored:
                seq = known if isinstance(known, int) else known.seq
                assert self.bucket.last_seq(subject) >= seq, "what was known is known"
        for meta in messages[delivered:]:
            self.check(self.bucket.observe(meta))
        self.ask_the_leader([meta.subject for meta in [*listing, *messages]])
        self.known = {s: meta.seq if meta.deleted else meta for s, meta in self.stored.items()}

    def ask_the_leader(self, listed: Iterable[str] = ()) -> None:
        """What the mount does with subjects that are in doubt; and in its comparisons with all."""
        for subject in {*self.bucket.doubtful, *listed}:
            if subject not in self.stored:
                self.check(self.bucket.purged(subject))
        self.bucket.doubtful.clear()

    # --- the kernel ---

    def node(self, path: Path) -> Node:
        node = self.bucket.find(path)
        assert node is not None
        return node

    @rule(pick=st.integers(0, 99), pins=st.integers(0, 1))
    def look_up(self, pick: int, pins: int) -> None:
        paths = sorted(actual_tree(self.bucket))
        inode = self.bucket.inode_of(self.node(paths[pick % len(paths)]))
        inode.nlookup += 1 - pins
        inode.pins += pins

    @rule(pick=st.integers(0, 99))
    def list_entry(self, pick: int) -> None:
        """As a listing does, which makes no inode."""
        paths = sorted(actual_tree(self.bucket))
        node = self.node(paths[pick % len(paths)])
        expected = None if node.is_dir else self.bucket._attributes(node)
        glance = self.bucket.glance(node)
        if glance is None:
            assert node.is_dir or node._inode is not None
            return
        assert node.meta is not None
        assert glance == (expected, node.meta.size)
        self.table.doze(node)

    @rule(pick=st.integers(0, 99), count=st.integers(1, 2))
    def forget_dozing(self, pick: int, count: int) -> None:
        dozing = sorted(ino for ino, found in self.table._inodes.items() if isinstance(found, Node))
        if dozing:
            self.table.forget(dozing[pick % len(dozing)], count)

    @rule(pick=st.integers(0, 99))
    def wake(self, pick: int) -> None:
        dozing = sorted(ino for ino, found in self.table._inodes.items() if isinstance(found, Node))
        if dozing:
            ino = dozing[pick % len(dozing)]
            node = self.table._inodes[ino]
            assert isinstance(node, Node)
            count = node.dozing
            inode = self.table.get(ino)
            assert (inode.ino, inode.nlookup, inode.node) == (ino, count, node)

    @rule(pick=st.integers(0, 99))
    def forget(self, pick: int) -> None:
        inodes = sorted(self.table.all(), key=lambda inode: inode.ino)
        if inodes:
            inode = inodes[pick % len(inodes)]
            inode.pins = 0
            self.table.forget(inode.ino, inode.nlookup)

    # --- what always holds ---

    @invariant()
    def the_tree_is_that_of_the_newest_messages(self) -> None:
        assert actual_tree(self.bucket) == expected_tree(self.known)

    @invariant()
    def sequences(self) -> None:
        for subject in [self.subject(name, spelling) for name in NAMES for spelling in SPELLINGS]:
            known = self.known.get(subject, 0)
            assert self.bucket.last_seq(subject) == (known if isinstance(known, int) else known.seq)
            live = self.bucket.live(subject)
            assert (live and replace(live, op=None)) == (
                None if isinstance(known, int) else replace(known, op=None)
            )

    @invariant()
    def nuids(self) -> None:
        by_nuid: dict[str, set[str]] = {}
        for subject, meta in self.known.items():
            if not isinstance(meta, int):
                by_nuid.setdefault(meta.nuid, set()).add(subject)
        for nuid, subjects in by_nuid.items():
            found = self.bucket.subjects_of_nuid(nuid)
            assert set(found) == subjects
            assert len(found) == len(subjects)
        assert self.bucket.is_empty() == (not by_nuid)

    @invariant()
    def inodes(self) -> None:
        for inode in self.table.all():
            node = inode.node
            if node is None:
                continue
            assert node.inode is inode
            assert node.ino == inode.ino
            assert self.bucket.find(node.path()) is node, "an inode leads to a place in the tree"
            assert inode.is_dir == node.is_dir
            if not node.is_dir:
                assert inode.meta is node.meta
                assert node.meta is not None
                assert inode.size == node.meta.size
                assert inode.name == node.meta.name
            expected = self.bucket._attributes(node)
            assert inode.attributes.mode == expected.mode
            assert not inode.unlinked

        dozing = [node for node in self.table._inodes.values() if isinstance(node, Node)]
        for node in dozing:
            assert self.bucket.find(node.path()) is node, (
                "a node that the kernel knows has its place in the tree"
            )

        def walk(node: Node) -> None:
            if node.dozing:
                assert self.table._inodes[node.ino] is node
                assert node._inode is None
            elif node.inode is not None:
                assert node.inode.node is node
                assert self.table.get(node.inode.ino) is node.inode
            for child in (node.children or {}).values():
                walk(child)

        walk(self.bucket.root)


# --- a listing, in short and at length ---------------------------------------------------------------------------

MINE = st.builds(
    lambda kind, **values: Attributes(mode=kind | 0o640, uid=7, gid=8, rdev=0, **values).encode(None),
    st.sampled_from([stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFDIR]),
    **{f"{time}_ns": st.integers(-(10**9), 10**12) for time in ("atime", "mtime", "ctime", "btime", "named")},
    ino=st.integers(-1, 5),
)
unusual = st.sampled_from(
    ["a//b", "./a", "a/..", "é", "a\0", "100%", "%2F", "\ud800", "x" * 300, f"{'y' * 252}/z", '"\\']
)
plain = {
    "name": names | unusual | st.text(alphabet="ab/", min_size=1, max_size=6),
    "bucket": st.just("b"),
    "nuid": st.sampled_from(["", "one", "two"]) | st.uuids().map(str),
    "size": st.integers(0, 2**40),
    "digest": st.just("SHA-256="),
    "attributes": st.none() | MINE | st.just({"mode": "600", "btime": "1970-01-01T00:00:05Z"}),
    "subject": spellings,
}
special = plain | {
    "digest": st.none(),
    "deleted": st.booleans(),
    "link": st.none() | st.just(Link("b", "a")),
    "other": st.none() | st.just({"revision": 3}),
}
versions = st.lists(st.builds(Metadata, **plain) | st.builds(Metadata, **special), max_size=12)


def loaded(metas: list[Metadata], times: int, *, short: bool) -> Bucket:
    bucket = Bucket(Identity("b", CREATED), InodeTable(), DEFAULTS, None)
    for _ in range(times):
        bucket.begin_load(bucket.identity, len(metas) // 2)
        for meta in listed(bucket, metas) if short else metas:
            bucket.observe(meta)
        bucket.end_load()
    return bucket


def shown(node: Node) -> object:
    """All that the kernel could ask about."""
    assert node.bucket is not None
    glance = node.bucket.glance(node)
    below = {name: shown(child) for name, child in (node.children or {}).items()}
    return node.meta, node.ino, node.subdirs, node.event_ns, glance, node.bucket.attributes(node), below


@pytest.mark.parametrize("times", [1, 2])
@settings(max_examples=300)
@given(given_=versions)
def test_what_a_listing_takes_in_short_is_what_it_takes_in_at_length(
    given_: list[Metadata], times: int
) -> None:
    metas = []
    for seq, meta in enumerate(given_, 1):
        subject = f"$O.b.M.{encode_subject(meta.name)}{meta.subject}"
        metas.append(replace(meta, subject=subject, seq=seq, time_ns=seq * 1000))
    short, long = (loaded(metas, times, short=short) for short in (True, False))
    assert shown(short.root) == shown(long.root)
    assert short.watched_seq == long.watched_seq
    assert short.doubtful == long.doubtful
    for meta in metas:
        assert short.last_seq(meta.subject) == long.last_seq(meta.subject)
        assert short.live(meta.subject) == long.live(meta.subject)
        assert sorted(short.subjects_of_nuid(meta.nuid)) == sorted(long.subjects_of_nuid(meta.nuid))


def test_most_of_a_listing_is_taken_in_short() -> None:
    """What is left to `observe` is a file that other clients' subjects, links or unusual names make special."""
    names = ["f", "d/f", "d/e/f", "d/g", "é", "100%"]
    own = Attributes(0o100644, 7, 8, 0, 1, 2, 3, 4, 5).encode(None)
    metas = [
        Metadata(
            name=name,
            bucket="b",
            nuid=new_nuid(),
            digest="SHA-256=",
            attributes=attributes,
            subject=f"$O.b.M.{encode_subject(name)}",
            seq=seq,
        )
        for seq, (name, attributes) in enumerate(zip(names, cycle((None, own)), strict=False), 1)
    ]
    bucket = Bucket(Identity("b", CREATED), InodeTable(), DEFAULTS, None)
    for _ in range(2):
        bucket.begin_load(bucket.identity, len(metas))
        assert list(listed(bucket, metas)) == []
        bucket.end_load()
    assert [path for path, seq in actual_tree(bucket).items() if seq] == [
        path_of(meta.name) for meta in metas
    ]


TestBucket = BucketMachine.TestCase
TestBucket.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("set_back", ["known", "unknown"])
def test_a_sequence_that_is_given_out_again_is_another_message(set_back: str) -> None:
    """Also where nothing but its time tells: then what is listed again is not taken for what is known."""
    subject = f"$O.b.M.{encode_subject('f')}"
    old = Metadata(name="f", bucket="b", nuid="old", subject=subject, seq=7, time_ns=1000)
    new = replace(old, nuid="new", size=5, time_ns=2000)
    bucket = loaded([old], 1, short=True)
    bucket.begin_load(replace(bucket.identity, epoch=set_back == "known"), 7)
    for meta in listed(bucket, [new]):
        bucket.observe(meta)
    bucket.end_load()
    live = bucket.live(subject)
    assert live is not None
    assert (live.nuid, live.size) == ("new", 5)
    assert bucket.subjects_of_nuid("old") == []

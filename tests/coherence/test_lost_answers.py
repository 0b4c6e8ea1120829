"""Renames whose messages, or the answers to them, are lost on the way: no object is lost, none has two names."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from tests.coherence.proxy import Gate
from tests.mount.test_exchange import exchange
from tests.support import Client, Mount, Mounter, Server, noise, until

Objects = dict[str, bytes]
# More than one chunk; the others are small, since there are hundreds of them.
FIRST, SECOND, THEIRS = noise(140_000, 1), noise(20_000, 2), noise(15_000, 3)
THEIR_CHANGES = (("", ""), ("put", "old"), ("delete", "new"), ("put", "new"), ("delete", "old"))


def make_exclusively(top: Path) -> None:
    os.close(os.open(top / "lock", os.O_CREAT | os.O_EXCL | os.O_WRONLY))


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


@dataclass(frozen=True)
class Change:
    """A rename of two files, or of files one by one: `moves` are the pairs of names."""

    before: Objects
    call: Callable[[Path], object]
    moves: tuple[tuple[str, str], ...]
    swaps: bool = False
    directories: tuple[set[str], set[str]] | None = None  # before and after
    messages: int = 2
    theirs: tuple[tuple[str, str], ...] = THEIR_CHANGES  # what others do meanwhile

    def made_to(self, objects: Objects) -> Objects:
        after = dict(objects)
        for old, new in self.moves:
            there = after.pop(new, None) if self.swaps else None
            if old in after:
                after[new] = after.pop(old)
            if there is not None:
                after[old] = there
        return after


RENAMES = ("rename", "replace", "exchange", "directory", "directories")
CHANGES = {
    "rename": Change({"a": FIRST}, lambda top: (top / "a").rename(top / "b"), (("a", "b"),)),
    "replace": Change({"a": FIRST, "b": SECOND}, lambda top: (top / "a").rename(top / "b"), (("a", "b"),)),
    "exchange": Change(
        {"a": FIRST, "b": SECOND},
        lambda top: exchange(top / "a", top / "b"),
        (("a", "b"),),
        swaps=True,
        messages=4,
    ),
    "directory": Change(
        {"a/f": FIRST, "a/g": SECOND},
        lambda top: (top / "a").rename(top / "b"),
        (("a/f", "b/f"), ("a/g", "b/g")),
        directories=({"a/"}, {"b/"}),
        messages=6,
        theirs=THEIR_CHANGES[:4],
    ),
    "exclusive": Change({}, make_exclusively, (), messages=1),
    "removal": Change({"a": FIRST}, lambda top: (top / "a").unlink(), (), messages=1),
    "directories": Change(
        {"a/f": FIRST, "b/f": SECOND},
        lambda top: exchange(top / "a", top / "b"),
        (("a/f", "b/f"),),
        swaps=True,
        directories=({"a/", "b/"}, {"a/", "b/"}),
        messages=12,
        theirs=THEIR_CHANGES[:1],
    ),
}


@dataclass
class Case:
    kind: str
    number: int  # of the message that meets trouble
    stored: bool  # whether it reached the server, and only the answer is lost
    theirs: tuple[str, str] = ("", "")  # what another client does meanwhile, and to which name
    bucket: str = ""
    errors: list[int] = field(default_factory=list)
    thread: threading.Thread | None = None
    change: Change = field(init=False)

    def __post_init__(self) -> None:
        self.change = CHANGES[self.kind]

    @property
    def is_made(self) -> bool:
        """Whether the store has seen all of it before others did anything."""
        return self.stored and self.number == self.change.messages

    def __str__(self) -> str:
        how = "stored" if self.stored else "lost"
        return f"{self.kind} {self.number} {how} {self.theirs} {self.errors}"

    def fill(self, mount: Mount) -> None:
        for name, content in self.change.before.items():
            path = mount.path / self.bucket / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)

    def call(self, mount: Mount) -> None:
        try:
            self.change.call(mount.path / self.bucket)
        except OSError as error:
            self.errors.append(error.errno or 0)

    def start(self, mount: Mount) -> None:
        self.thread = threading.Thread(target=self.call, args=(mount,))
        self.thread.start()

    def do_theirs(self, client: Client) -> None:
        action, which = self.theirs
        name = self.change.moves[0][which == "new"]
        if action == "put":
            client.put(self.bucket, name, THEIRS)
        elif action == "delete":
            with contextlib.suppress(AssertionError):  # there is nothing under this name
                client.delete(self.bucket, name)

    def do_theirs_to(self, objects: Objects) -> Objects:
        action, which = self.theirs
        name = self.change.moves[0][which == "new"]
        return (
            (objects | {name: THEIRS}) if action == "put" else {k: v for k, v in objects.items() if k != name}
        )

    def ends(self) -> list[Objects]:
        """What there may be in the end; without others only what the call's result says."""
        before = self.change.before
        if not self.theirs[0]:
            return [before if self.errors else self.change.made_to(before)]
        if self.is_made:
            return [self.do_theirs_to(self.change.made_to(before))]
        ends = [self.do_theirs_to(before)]
        if self.errors and self.change.directories is not None:
            # The one that others have changed had moved already.
            ends.append(self.do_theirs_to({"b/f": before["a/f"], "a/g": before["a/g"]}))
        if not self.errors:
            ends = [self.do_theirs_to(self.change.made_to(before)), self.change.made_to(ends[0])]
            if self.change.directories is not None:
                # The entries move one by one: one that others have changed in this moment stays.
                ends.append(self.do_theirs_to({"a/f": before["a/f"], "b/g": before["a/g"]}))
        return ends

    def problem(self, mount: Mount, client: Client) -> str:
        """What is not as it should be; empty once all has settled."""
        names = client.names(self.bucket)
        directories = {name for name in names if name.endswith("/")}
        try:
            stored = {name: client.read(self.bucket, name) for name in names - directories}
        except AssertionError as error:
            return f"{self}: {error}"
        top = mount.path / self.bucket
        shown = {}
        try:
            for where, _, files in os.walk(top):
                for name in files:
                    path = Path(where) / name
                    shown[str(path.relative_to(top))] = path.read_bytes()
        except OSError as error:
            return f"{self}: {error}"
        ends = self.ends()
        if stored not in ends:
            return f"{self}: {kinds(stored)} is stored, not one of {[kinds(end) for end in ends]}"
        if shown != stored:
            return f"{self}: {kinds(shown)} is shown, {kinds(stored)} is stored"
        if self.change.directories is not None and not self.theirs[0]:
            wanted = self.change.directories[not self.errors]
            if directories != wanted or set(os.listdir(top)) != {name[:-1] for name in wanted}:
                return f"{self}: directories {directories}, not {wanted}"
        return ""


def kinds(objects: Objects) -> dict[str, str]:
    contents = {FIRST: "first", SECOND: "second", THEIRS: "theirs"}
    return {name: contents.get(content, "?") for name, content in objects.items()}


@pytest.fixture
def gate(nats_server: Server) -> Iterator[tuple[Server, Gate]]:
    """The server behind a gate."""
    gate = Gate(nats_server.port)
    server = Server()
    server.port = gate.port
    server._process = nats_server._process
    server._connected = nats_server.client
    yield server, gate
    gate.close()


def create_buckets(cases: list[Case], client: Client) -> None:
    for number, case in enumerate(cases):
        case.bucket = f"lost{number}"
        client.create_bucket(case.bucket)


def begun(
    cases: list[Case], mount: Mounter, client: Client, gate: tuple[Server, Gate], *options: str, dark: bool
) -> Mount:
    """All cases at a time, each in a bucket of its own: each waits for an answer that does not come."""
    create_buckets(cases, client)
    mounted = mount("", "purge_grace=0", *options, server=gate[0])
    mounted.allow(" WARNING ")
    for case in cases:
        case.fill(mounted)
        gate[1].keep(case.bucket, case.number, stored=case.stored, dark=dark)
        case.start(mounted)
    until(lambda: all(gate[1].has_kept(case.bucket) for case in cases), 20)
    return mounted


def ended(cases: list[Case]) -> None:
    for case in cases:
        assert case.thread is not None
        case.thread.join(30)
        assert not case.thread.is_alive(), case


def settled(cases: list[Case], mounted: Mount, client: Client) -> None:
    """Every bucket holds, and shows, what it may."""
    found: list[str] = []

    def fine() -> bool:
        found[:] = [problem for case in cases if (problem := case.problem(mounted, client))]
        return not found

    with contextlib.suppress(AssertionError):
        until(fine, 10)
    assert found == []


def unmounted(mounted: Mount) -> None:
    """Consumers of connections that were cut go after some seconds."""
    assert [problem for problem in mounted.finish() if not problem.startswith("consumer ")] == []


@pytest.fixture
def emptied(client: Client) -> Iterator[None]:
    yield
    for bucket in client.buckets():
        if bucket.startswith("lost"):
            client.delete_bucket(bucket)


@pytest.mark.semantics("renames-and-lost-answers")
@pytest.mark.usefixtures("emptied")
@pytest.mark.parametrize("kind", RENAMES)
def test_a_connection_that_is_cut_at_every_message(
    mount: Mounter, client: Client, gate: tuple[Server, Gate], kind: str
) -> None:
    """A message or its answer is lost; another client uses the name meanwhile: one of the two orders, and no loss."""
    cases = [
        Case(kind, number, stored, theirs)
        for number in range(1, CHANGES[kind].messages + 1)
        for stored in (False, True)
        for theirs in CHANGES[kind].theirs
    ]
    mounted = begun(cases, mount, client, gate, dark=False)
    for case in cases:
        case.do_theirs(client)
    gate[1].release(case.bucket for case in cases)
    gate[1].cut()
    ended(cases)
    assert {number for case in cases for number in case.errors} <= {
        errno.ESTALE,
        errno.ENOENT,
        errno.ENOTEMPTY,
    }
    assert [case for case in cases if case.errors and (case.is_made or not case.theirs[0])] == []
    settled(cases, mounted, client)
    unmounted(mounted)


@pytest.mark.semantics("renames-and-lost-answers")
@pytest.mark.usefixtures("emptied")
def test_an_outcome_that_stays_unknown(mount: Mounter, client: Client, gate: tuple[Server, Gate]) -> None:
    """What fails with ETIMEDOUT has not happened once the server answers again, and does not happen later."""
    cases = [
        Case(kind, number, stored)
        for kind in RENAMES
        for number in range(1, CHANGES[kind].messages + 1)
        for stored in (False, True)
    ]
    mounted = begun(cases, mount, client, gate, "timeout=1", dark=True)
    ended(cases)
    gate[1].release(case.bucket for case in cases)
    assert {number for case in cases for number in case.errors} == {errno.ETIMEDOUT}
    settled(cases, mounted, client)
    # What was kept comes out of some buffer in the end.
    with contextlib.closing(Client(gate[0].url)) as late:
        for frame in itertools.chain.from_iterable(gate[1].kept.values()):
            late.run(late.connection._send_command(frame))
        late.run(late.connection.flush())
    settled(cases, mounted, client)
    unmounted(mounted)


@pytest.mark.semantics("renames-and-lost-answers")
@pytest.mark.usefixtures("emptied")
@pytest.mark.parametrize("kind", ["replace", "exchange", "directory"])
def test_a_bucket_that_is_full_in_the_middle(mount: Mounter, client: Client, kind: str) -> None:
    """A rename that has room for some of its messages only fails, and leaves nothing once there is room."""
    cases = [Case(kind, number, stored=True) for number in range(16)]
    create_buckets(cases, client)
    mounted = mount("", "purge_grace=0")
    mounted.allow("no space")
    for case in cases:
        case.fill(mounted)
        room = int(client.info(case.bucket)["state"]["bytes"]) + 300 * case.number
        client.change_bucket(case.bucket, max_bytes=room)
        case.call(mounted)
        client.change_bucket(case.bucket, max_bytes=-1)
    assert {number for case in cases for number in case.errors} == {errno.ENOSPC}
    assert [] in [case.errors for case in cases]
    settled(cases, mounted, client)


@pytest.mark.semantics("exclusive-everywhere")
@pytest.mark.usefixtures("emptied")
@pytest.mark.parametrize("stored", [False, True])
def test_a_lock_file_that_nobody_knows_to_have_made(
    mount: Mounter, client: Client, gate: tuple[Server, Gate], stored: bool
) -> None:
    """An exclusive creation that fails with ETIMEDOUT leaves nothing behind: whoever tries again makes it."""
    case = Case("exclusive", 1, stored)
    mounted = begun([case], mount, client, gate, "timeout=1", dark=True)
    ended([case])
    assert case.errors == [errno.ETIMEDOUT]
    gate[1].release([case.bucket])
    until(lambda: (client.meta(case.bucket, "lock") or {}).get("deleted"), 10)
    settled([case], mounted, client)
    make_exclusively(mounted.path / case.bucket)
    assert client.names(case.bucket) == {"lock"}
    unmounted(mounted)


@pytest.mark.semantics("server-away")
@pytest.mark.usefixtures("emptied")
def test_the_content_of_a_file_whose_removal_was_not_answered(
    mount: Mounter, client: Client, gate: tuple[Server, Gate]
) -> None:
    """If it turns out that the name is gone the content goes, too."""
    case = Case("removal", 1, stored=True)
    mounted = begun([case], mount, client, gate, "timeout=1", dark=True)
    ended([case])
    assert case.errors == [errno.ETIMEDOUT]
    assert client.names(case.bucket) == set()
    gate[1].release([case.bucket])
    until(lambda: client.chunks(case.bucket) == {}, 10)
    assert os.listdir(mounted.path / case.bucket) == []
    unmounted(mounted)


@pytest.mark.semantics("appends-from-several-machines")
def test_an_append_whose_answer_is_lost(
    bucket: str, client: Client, gate: tuple[Server, Gate], mount: Mounter
) -> None:
    """It was stored, and others have appended to it since: its line is not in there twice."""
    server, proxy = gate
    mounts = [mount(f"/{bucket}", server=server) for _ in range(2)]
    for one in mounts:
        one.allow(" WARNING ")
    for first, between in itertools.product(("", "first\n"), (0, 1, 3)):
        here, there = (one.path / f"log{len(first)}{between}" for one in mounts)
        if first:
            append(here, first)
            until(there.exists)
        proxy.keep(bucket, 1, stored=True)
        with ThreadPoolExecutor() as threads:
            late = threads.submit(append, here, "late\n")
            until(lambda: proxy.has_kept(bucket))
            expected = first + "late\n"
            until(lambda: there.exists() and there.read_text() == expected)  # noqa: B023
            for number in range(between):
                append(there, f"{number}\n")
                expected += f"{number}\n"
            proxy.cut()
            late.result(30)
        proxy.release([bucket])
        proxy.answered.clear()
        assert client.read(bucket, here.name).decode() == expected
        for path in (here, there):
            until(lambda: path.read_text() == expected)  # noqa: B023
        append(here, "more\n")
        assert client.read(bucket, here.name).decode() == expected + "more\n"
    for one in mounts:
        unmounted(one)


@pytest.fixture
def two(bucket: str, gate: tuple[Server, Gate], mount: Mounter) -> Iterator[tuple[Path, Path, Gate]]:
    """Two mounts of a bucket behind the gate, which are taken down before it is."""
    server, proxy = gate
    mounts = [mount(f"/{bucket}", server=server) for _ in range(2)]
    for one in mounts:
        one.allow(" WARNING ")
    yield mounts[0].path, mounts[1].path, proxy
    for one in mounts:
        unmounted(one)


@pytest.mark.semantics("exclusive-everywhere")
@pytest.mark.parametrize("is_dir", [False, True], ids=["file", "directory"])
def test_a_lock_that_is_taken_before_its_removal_is_answered(
    bucket: str, client: Client, two: tuple[Path, Path, Gate], is_dir: bool
) -> None:
    """The removal was stored, and its answer lost: it must not remove what somebody else has made since."""
    here, there, proxy = two
    make = (lambda top: (top / "lock").mkdir()) if is_dir else make_exclusively
    make(here)
    until((there / "lock").exists)
    proxy.keep(bucket, 1, stored=True)
    with ThreadPoolExecutor() as threads:
        removal = threads.submit((here / "lock").rmdir if is_dir else (here / "lock").unlink)
        until(lambda: proxy.has_kept(bucket))
        until(lambda: not (there / "lock").exists())
        make(there)
        proxy.cut()
        removal.result(30)
    proxy.release([bucket])
    assert client.names(bucket) == {"lock/" if is_dir else "lock"}
    for top in (here, there):
        until((top / "lock").exists)


@pytest.mark.semantics("exclusive-everywhere")
@pytest.mark.parametrize("is_dir", [False, True], ids=["file", "directory"])
def test_a_lock_that_is_changed_before_its_maker_knows_of_it(
    bucket: str, client: Client, two: tuple[Path, Path, Gate], is_dir: bool
) -> None:
    """It is its maker's all the same: with EEXIST nobody would ever remove it."""
    here, there, proxy = two
    proxy.keep(bucket, 1, stored=True)
    with ThreadPoolExecutor() as threads:
        made = threads.submit((here / "lock").mkdir if is_dir else partial(make_exclusively, here))
        until(lambda: proxy.has_kept(bucket))
        until((there / "lock").exists)
        os.setxattr(there / "lock", "user.seen", b"1")
        proxy.cut()
        made.result(30)
    proxy.release([bucket])
    assert os.getxattr(here / "lock", "user.seen") == b"1"
    ((here / "lock").rmdir if is_dir else (here / "lock").unlink)()
    assert client.names(bucket) == set()

"""Who does the random operations: programs on mounts, and clients that know nothing of natsfs.

Every content says who wrote it and how many times that writer had written: a reading can be judged alone (it is one
version, whole), and by its digest against the store's order.

Some names are for some writers only, where what happens could not be judged otherwise: a client that renames or changes
metadata does so without a compare-and-swap, and takes back, or takes the chunks of, what somebody else stored under the
name after it had looked.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.coherence.history import ASIDE, History
from tests.posix.libc import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2
from tests.support import Client, encode

SHARED = [f"f{number}" for number in range(4)] + [f"d/g{number}" for number in range(3)]
PLAYERS = 5
GRACE = 5.0  # seconds for which the mounts keep the chunks of what they replaced
DIRECTORIES = ("p", "q")  # one of them, mostly
MOVING = [f"{top}/h{number}" for top in DIRECTORIES for number in range(3)]
OTHER = {name: f"{'qp'['pq'.index(name[0])]}{name[1:]}" for name in MOVING}
OURS = [f"m{number}" for number in range(3)] + MOVING  # of the mounts
THEIRS = [[f"x{client}{number}" for number in range(3)] for client in range(2)]  # of each direct client
KEPT = ["k0", "k1"]  # of the mounts, which replace them and never remove them
JUDGED = {*SHARED, *OURS[:3], *KEPT}  # whose removals all leave a message, and that no directory takes along
SLOTS, TAGS = "slots", "tags"  # with a line, or an attribute, of each player; nobody replaces or removes them
LINKS = ["l0", "l1"]
SIZES = (40, 4000, 200_000, 1_500_000)
SMALL = 1 << 20  # bytes; so much of a file is fetched before its open(2) returns
KINDS = ("file", "directory", "link", "name")  # of what is made exclusively
MODES = (0o600, 0o640, 0o644, 0o755)

# What a call may end with while others replace, remove and rename the same names.
FINE = {errno.ENOENT, errno.ESTALE, errno.EEXIST, errno.ENOTEMPTY, errno.EBUSY, errno.EISDIR}


def content(writer: int, number: int, size: int) -> bytes:
    """Of about `size` bytes: the same line again and again, which names its writer and version."""
    line = f"{writer:02} {number:06} {size:08}\n".encode()
    return line * (size // len(line))


def flaw(data: bytes) -> str | None:
    """What is wrong with a content; None if it is one version, whole."""
    line = data[:19]
    fields = line.split()
    if len(fields) != 3 or len(line) != 19:
        return f"{len(data)} bytes, beginning with {line!r}"
    if data != content(*map(int, fields)):
        other = next(
            (data[at : at + 19] for at in range(0, len(data), 19) if data[at : at + 19] != line), b""
        )
        return f"{len(data)} bytes of {line!r} with {other!r} in between"
    return None


def slots(numbers: list[int]) -> bytes:
    """What `SLOTS` holds: of each player, from 1 on, the number that it wrote last."""
    return b"".join(content(player, number, 19) for player, number in enumerate(numbers, 1))


class Player(threading.Thread):
    """Does one thing after the other on one mount, until the history says stop."""

    def __init__(
        self, number: int, mount: int, top: Path, history: History, seed: int, fine: set[int], *, alone: bool
    ) -> None:
        super().__init__(daemon=True)
        self.number = number
        self.mount = mount
        self.top = top
        self.history = history
        self.random = random.Random(seed)
        self.fine = fine
        self.alone = alone
        self.about: list[str] = []  # the names of the call
        self.written = 0

    def calls(self) -> list[Callable[[], None]]:
        """What it does, some of it more often."""
        return [
            *([self.read] * 8 + [self.slow_read] + [self.list] * 2 + [self.replace] * 3),
            *([self.write] * 3 + [self.rewrite] if self.alone else [self.replace]),
            *(self.remove, self.rename, self.rename, self.exchange, self.move_directory, self.clear),
            *(self.chmod, self.mark, self.append, self.append, self.read_log, self.exclude),
            *(self.link, self.read_link, self.map, self.change_slot, self.change_slot, self.tag, self.tag),
        ]

    def run(self) -> None:
        calls = self.calls()
        while not self.history.stop.is_set():
            call = self.random.choice(calls)
            self.about, began, outcome = [], time.time(), "done"
            try:
                call()
            except OSError as error:
                outcome = str(error)
                if error.errno not in self.fine:
                    self.history.wrong(f"mount {self.mount}: {call.__name__}: {error}")
            except Exception as error:
                outcome = repr(error)
                self.history.wrong(f"mount {self.mount}: {call.__name__}: {error!r}")
            else:
                self.history.done[call.__name__] += 1
            about = " ".join(self.about)
            who = f"player {self.number} on mount {self.mount}"
            self.history.note(f"{who}: {call.__name__} {about}: {outcome}", began)

    def choose(self, *pools: list[str]) -> str:
        self.about.append(self.random.choice(self.random.choice(pools)))
        return self.about[-1]

    def new(self) -> bytes:
        self.written += 1
        return content(self.number, self.written, self.random.choice(SIZES))

    def judge(self, name: str, since: int, data: bytes) -> None:
        wrong = flaw(data)
        if wrong is not None:
            self.history.wrong(f"mount {self.mount}: {name} is {wrong}")
        else:
            self.saw(name, since, data)

    def saw(self, name: str, since: int, data: bytes, how: str = "shows") -> None:
        self.history.saw(self.mount, name, since, data, how, OTHER.get(name))

    # --- reading ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[int]:
        """What the mount had shown to be before; a failure is judged, and raised."""
        since, began = self.history.shown(self.mount, name), time.monotonic()
        try:
            yield since
        except FileNotFoundError:
            if name in JUDGED:
                self.history.lacks(self.mount, name, since)
            raise
        except OSError as error:
            # What mounts have replaced is there for some more seconds.
            if name in KEPT and error.errno != errno.ETIMEDOUT and time.monotonic() - began < GRACE / 2:
                self.history.wrong(f"mount {self.mount}: {name} cannot be read: {error}")
            raise

    def read(self) -> None:
        name = self.choose(SHARED, OURS, KEPT, *THEIRS)
        with self.reading(name) as since:
            self.judge(name, since, (self.top / name).read_bytes())

    def slow_read(self) -> None:
        """In small pieces, over the time of some changes: still one version."""
        name = self.choose(SHARED, OURS, KEPT, *THEIRS)
        parts, pause = [], self.random.choice((0.01, 0.01, 0.1))
        with self.reading(name) as since, open(self.top / name, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            while part := file.read(size // 5 + 1):
                parts.append(part)
                time.sleep(pause)
        data = b"".join(parts)
        if len(data) != size:
            self.history.wrong(f"mount {self.mount}: {name} has {len(data)} bytes, and said {size}")
        self.judge(name, since, data)

    def map(self) -> None:
        """A mapping shows one version, also in pages that are touched later. Of small files nothing can be missing."""
        name = self.choose(SHARED, OURS, KEPT, *THEIRS)
        with self.reading(name) as since, open(self.top / name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not 0 < size <= SMALL:
                return
            mapped = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        copy = os.memfd_create("copy")  # a page that is missing is EFAULT so, and no signal
        try:
            middle = self.random.randrange(size)
            os.pwrite(copy, memoryview(mapped)[:middle], 0)
            time.sleep(self.random.uniform(0, 0.1))
            os.pwrite(copy, memoryview(mapped)[middle:], middle)
            self.judge(name, since, os.pread(copy, size, 0))
        finally:
            os.close(copy)

    def list(self) -> None:
        directory = self.random.choice(("", "d", *DIRECTORIES))
        names = os.listdir(self.top / directory)
        always = () if directory else (*KEPT, SLOTS, TAGS)
        if len(set(names)) != len(names) or not set(names).issuperset(always):
            self.history.wrong(f"mount {self.mount}: {directory!r} lists {sorted(names)}")

    # --- writing ----------------------------------------------------------------------------------------------

    def write(self) -> None:
        """In place: a second player on the mount would rightly see it half done."""
        name, data = self.choose(SHARED, OURS, KEPT), self.new()
        since = self.history.shown(self.mount, name)
        (self.top / name).write_bytes(data)
        self.saw(name, since, data, "has written")

    def replace(self) -> None:
        """As editors do."""
        name, data = self.choose(SHARED, OURS, KEPT), self.new()
        since = self.history.shown(self.mount, name)
        aside = f"{ASIDE}{self.number}"  # the same again and again: each name leaves a tombstone to be listed
        (self.top / aside).write_bytes(data)
        try:
            (self.top / aside).rename(self.top / name)
        except OSError:
            self.unlink(aside)
            raise
        self.saw(name, since, data, "has put in place")

    def rewrite(self) -> None:
        """Piece by piece, without O_TRUNC: a commit that builds on the version that is there."""
        name, data = self.choose(SHARED, OURS, KEPT), self.new()
        since = self.history.shown(self.mount, name)
        with open(self.top / name, "r+b", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            pieces = [data[at : at + 100_000] for at in range(0, len(data), 100_000)]
            for at in self.random.sample(range(len(pieces)), len(pieces)):
                os.pwrite(file.fileno(), pieces[at], at * 100_000)
            if size > len(data):
                file.truncate(len(data))
        self.saw(name, since, data, "has rewritten")

    def unlink(self, name: str) -> None:
        top, _, rest = name.partition("/")
        others = [f"{other}/{rest}" for other in DIRECTORIES if top in DIRECTORIES and other != top]
        with self.history.removing(name, self.mount, *others):
            (self.top / name).unlink()

    def remove(self) -> None:
        name = self.choose(SHARED, OURS)
        since = self.history.shown(self.mount, name)
        self.unlink(name)
        # One whose answer is lost may come to nothing because somebody replaces the file: that came after it, then.
        if name in JUDGED and errno.ETIMEDOUT not in self.fine:
            self.history.lacks(self.mount, name, since, "has removed")

    def rename(self) -> None:
        (self.top / self.choose(OURS)).rename(self.top / self.choose(OURS))

    def exchange(self) -> None:
        one, two = self.random.sample(OURS, 2)
        self.about = [one, two]
        renameat2(self.top / one, self.top / two, RENAME_EXCHANGE)

    def move_directory(self) -> None:
        one, two = self.random.sample(DIRECTORIES, 2)
        self.about = [one, two]
        try:
            with self.history.moving(self.mount):
                (self.top / one).rename(self.top / two)
        except FileNotFoundError:
            (self.top / one).mkdir()

    def clear(self) -> None:
        """As `rm -r` does: of two directories that are both in use none can be renamed to the other."""
        one, two = self.random.sample(DIRECTORIES, 2)
        self.about = [one, two]
        if os.listdir(self.top / two):
            for name in os.listdir(self.top / one):
                self.unlink(f"{one}/{name}")
            (self.top / one).rmdir()

    def change_slot(self) -> None:
        """Only its own line: a commit that builds on a version which is no longer there would take others' back.

        On one mount nobody reads meanwhile what may turn out to be a change of an old version.
        """
        with self.history.mutex[self.mount], open(self.top / SLOTS, "r+b", buffering=0) as file:
            seen = [self.history.seen(self.mount, f"slot {player}") for player in range(1, PLAYERS + 1)]
            data = os.pread(file.fileno(), 4096, 0)
            numbers = [int(line.split()[1]) for line in data.splitlines() if len(line.split()) == 3]
            if len(numbers) != PLAYERS or data != slots(numbers):
                self.history.wrong(f"mount {self.mount}: {SLOTS} is {data!r}")
                return
            for player, (since, number) in enumerate(zip(seen, numbers, strict=True), 1):
                self.history.saw_number(self.mount, f"slot {player}", since, number)
            self.written += 1
            with self.history.setting(self.mount, f"slot {self.number}", self.written):
                os.pwrite(file.fileno(), content(self.number, self.written, 19), (self.number - 1) * 19)
                file.close()

    # --- metadata ---------------------------------------------------------------------------------------------

    def chmod(self) -> None:
        (self.top / self.choose(SHARED, OURS, KEPT, [TAGS], *THEIRS)).chmod(self.random.choice(MODES))

    def mark(self) -> None:
        self.written += 1
        path = self.top / self.choose(SHARED, OURS, KEPT, *THEIRS)
        os.setxattr(path, "user.mark", f"{self.number} {self.written}".encode())

    def tag(self) -> None:
        """An attribute of its own: nobody's change takes another's back."""
        for player in range(1, PLAYERS + 1):
            since = self.history.seen(self.mount, f"tag {player}")
            number = int(os.getxattr(self.top / TAGS, f"user.tag{player}"))
            self.history.saw_number(self.mount, f"tag {player}", since, number)
        self.written += 1
        with self.history.setting(self.mount, f"tag {self.number}", self.written):
            os.setxattr(self.top / TAGS, f"user.tag{self.number}", b"%d" % self.written)

    def link(self) -> None:
        """A new one in place of the old."""
        name = self.random.choice(LINKS)
        self.written += 1
        text, aside = f"to {self.number} {self.written}", f"{ASIDE}{self.number}.link"
        since = self.history.shown(self.mount, name)
        try:
            (self.top / aside).symlink_to(text)
            (self.top / aside).rename(self.top / name)
        except OSError:
            self.unlink(aside)
            raise
        self.history.saw(self.mount, name, since, text, "has put in place")

    def read_link(self) -> None:
        name = self.random.choice(LINKS)
        since = self.history.shown(self.mount, name)
        self.history.saw(self.mount, name, since, os.readlink(self.top / name))

    # --- appending, and making exclusively ----------------------------------------------------------------------

    def append(self) -> None:
        log = self.history.log
        self.written += 1
        line = content(self.number, self.written, 19)
        self.history.append(log, line.decode())
        try:
            with open(self.top / log, "ab", buffering=0) as file:
                file.write(line)
        except OSError as error:
            # Nobody does anything but append.
            if error.errno != errno.ETIMEDOUT or error.errno not in self.fine:
                self.history.wrong(f"mount {self.mount}: appending to {log}: {error}")
            return
        self.history.appended(log, line.decode())

    def read_log(self) -> None:
        log = self.history.log
        fd = os.open(self.top / log, os.O_RDONLY)
        try:
            data = os.pread(fd, 1 << 16, 0)
        finally:
            os.close(fd)
        self.history.judge_log(f"mount {self.mount}", log, data)

    def make(self, kind: str, path: Path) -> None:
        if kind == "file":
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        elif kind == "directory":
            path.mkdir()
        elif kind == "link":
            path.symlink_to("nowhere")
        else:
            aside = self.top / f"{ASIDE}{self.number}.name"
            aside.touch()
            try:
                renameat2(aside, path, RENAME_NOREPLACE)
            except OSError:
                with contextlib.suppress(FileNotFoundError):
                    aside.unlink()
                raise

    def exclude(self) -> None:
        """Of all players one at a time."""
        kind = self.random.choice(KINDS)
        lock = self.history.lock(kind)
        path = self.top / lock
        try:
            self.make(kind, path)
        except FileExistsError:
            return
        except OSError:
            self.history.spoil(kind)
            raise
        with self.history.holding(lock, self.number):
            time.sleep(0.005)
        try:
            (path.rmdir if kind == "directory" else path.unlink)()
        except OSError as error:
            self.history.spoil(kind)
            if error.errno != errno.ETIMEDOUT:
                self.history.wrong(f"mount {self.mount}: {lock} was not its maker's: {error}")


class Direct(threading.Thread):
    """A client that knows nothing of natsfs: it puts, deletes, renames and changes metadata as Go does."""

    def __init__(self, number: int, url: str, bucket: str, history: History, seed: int) -> None:
        super().__init__(daemon=True)
        self.number = number
        self.client = Client(url)
        self.bucket = bucket
        self.history = history
        self.random = random.Random(seed)
        self.own = THEIRS[number % len(THEIRS)]
        self.written = 0

    def calls(self) -> list[Callable[[], None]]:
        return [*([self.put] * 7), *([self.delete] * 3 + [self.rename] * 3 + [self.update] * 3)]

    def run(self) -> None:
        calls = self.calls()
        while not self.history.stop.is_set():
            call = self.random.choice(calls)
            try:
                call()
            except AssertionError:
                pass  # there is nothing of this name
            except Exception as error:
                self.history.wrong(f"direct client {self.number}: {call.__name__}: {error!r}")
            else:
                self.history.done[f"direct {call.__name__}"] += 1
            time.sleep(0.01)

    def put(self) -> None:
        self.written += 1
        data = content(self.number, self.written, self.random.choice(SIZES[:3]))
        self.client.put(self.bucket, self.random.choice(SHARED + self.own), data)

    def delete(self) -> None:
        name = self.random.choice(SHARED + self.own)
        with self.history.removing(name):
            self.client.delete(self.bucket, name)

    def rename(self) -> None:
        """To a name that is free: another's chunks would stay behind."""
        old, new = self.random.sample(self.own, 2)
        there = self.client.meta(self.bucket, new)
        assert there is None or there.get("deleted")
        self.client.rename(self.bucket, old, new)

    def update(self) -> None:
        """As Go does, or as JavaScript does: without a rollup the message before stays in the stream."""
        self.written += 1
        meta = self.client.stored(self.bucket, self.random.choice(self.own))
        meta |= {"description": f"{self.number} {self.written}"}
        if self.random.random() < 0.5:
            self.client.publish_meta(meta)
        else:
            subject = f"$O.{self.bucket}.M.{encode(meta['name'])}"
            self.client.run(self.client.js.publish(subject, json.dumps(meta).encode()))

    def close(self) -> None:
        self.client.close()

"""Random operations on several mounts and by direct clients, and what each of them saw.

Every content says who wrote it and how many times that writer had written: so a reading can be judged alone (it is
one version, whole), against those before it on the same mount (never older), and against the end (nothing that was
committed is lost).
"""

from __future__ import annotations

import errno
import faulthandler
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.coherence.proxy import Proxy
from tests.support import Client, Mount, Server, until

NAMES = [f"f{number}" for number in range(4)] + [f"d/g{number}" for number in range(3)]
SIZES = (40, 4000, 200_000, 1_500_000)


def content(writer: int, number: int, size: int) -> bytes:
    """Of about `size` bytes: the same line again and again, which names its writer and version."""
    line = f"{writer:02} {number:06} {size:08}\n".encode()
    return line * (size // len(line))


def parse(data: bytes) -> tuple[int, int] | str:
    """(writer, number) of a content, or what is wrong with it."""
    line = data[:19]
    fields = line.split()
    if len(fields) != 3 or len(line) != 19:
        return f"{len(data)} bytes, beginning with {line!r}"
    writer, number, size = map(int, fields)
    if data != content(writer, number, size):
        other = next(
            (data[at : at + 19] for at in range(0, len(data), 19) if data[at : at + 19] != line), b""
        )
        return f"{len(data)} bytes of {line!r} with {other!r} in between"
    return writer, number


class Histories:
    """What was seen and written by all threads."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.lock = threading.Lock()
        # Per name the versions in the order of the store, as a direct watcher has them.
        self.order: dict[str, list[str]] = {}
        self.stop = threading.Event()
        self.operations = 0

    def wrong(self, text: str) -> None:
        with self.lock:
            self.problems.append(text)


# What a call may end with while others replace, remove and rename the same names.
FINE = {errno.ENOENT, errno.ESTALE, errno.EEXIST, errno.ENOTEMPTY, errno.EBUSY, errno.EISDIR}


class Player(threading.Thread):
    """Does one thing after the other on one mount."""

    def __init__(
        self, number: int, top: Path, histories: Histories, seed: int, fine: set[int], alone: bool
    ) -> None:
        super().__init__(daemon=True)
        self.number = number
        self.top = top
        self.histories = histories
        self.random = random.Random(seed)
        self.fine = fine
        self.alone = alone
        self.written = 0
        # The newest number that this mount has shown of each writer's versions under each name.
        self.seen: dict[tuple[str, int], int] = {}

    def run(self) -> None:
        calls = (
            [self.read] * 6 + [self.list] * 2 + [self.write] * 4 + [self.replace, self.remove, self.slow_read]
        )
        while not self.histories.stop.is_set():
            call = self.random.choice(calls)
            name = self.random.choice(NAMES)
            try:
                call(name)
            except OSError as error:
                if error.errno not in self.fine:
                    self.histories.wrong(f"mount {self.number}: {call.__name__} {name}: {error}")
            except Exception as error:
                self.histories.wrong(f"mount {self.number}: {call.__name__} {name}: {error!r}")
            self.histories.operations += 1

    def new(self) -> bytes:
        self.written += 1
        return content(self.number, self.written, self.random.choice(SIZES))

    def judge(self, name: str, data: bytes) -> None:
        found = parse(data)
        if isinstance(found, str):
            self.histories.wrong(f"mount {self.number}: {name} is {found}")
            return
        writer, number = found
        before = self.seen.get((name, writer), 0)
        if number < before:
            self.histories.wrong(
                f"mount {self.number}: {name} shows version {number} of {writer} after its {before}"
            )
        self.seen[name, writer] = number

    def read(self, name: str) -> None:
        data = (self.top / name).read_bytes()
        self.judge(name, data)

    def slow_read(self, name: str) -> None:
        """In small pieces, over the time of some changes: still one version."""
        parts = []
        with open(self.top / name, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            while part := file.read(size // 5 + 1):
                parts.append(part)
                time.sleep(0.01)
        data = b"".join(parts)
        if len(data) != size:
            self.histories.wrong(f"mount {self.number}: {name} has {len(data)} bytes, and said {size}")
        found = parse(data)
        if isinstance(found, str):
            self.histories.wrong(f"mount {self.number}: {name}, read slowly, is {found}")

    def list(self, name: str) -> None:
        directory = (self.top / name).parent
        names = os.listdir(directory)
        if len(set(names)) != len(names):
            self.histories.wrong(f"mount {self.number}: {directory.name} lists {sorted(names)}")

    def write(self, name: str) -> None:
        """In place; on a mount with a second player, who would rightly see it half done, as `replace`."""
        if not self.alone:
            self.replace(name)
            return
        data = self.new()
        (self.top / name).write_bytes(data)

    def replace(self, name: str) -> None:
        """As editors do."""
        path = self.top / name
        aside = path.with_name(f"{path.name}.{self.number}.{self.written}")
        data = self.new()
        aside.write_bytes(data)
        try:
            aside.rename(path)
        except OSError:
            aside.unlink()
            raise

    def remove(self, name: str) -> None:
        (self.top / name).unlink()


class Direct(threading.Thread):
    """A client that knows nothing of natsfs: it puts, deletes, and renames as Go does."""

    def __init__(self, number: int, url: str, bucket: str, histories: Histories, seed: int) -> None:
        super().__init__(daemon=True)
        self.number = number
        self.client = Client(url)
        self.bucket = bucket
        self.histories = histories
        self.random = random.Random(seed)
        self.written = 0

    def run(self) -> None:
        while not self.histories.stop.is_set():
            name = self.random.choice(NAMES)
            try:
                if self.random.random() < 0.7:
                    self.written += 1
                    data = content(self.number, self.written, self.random.choice(SIZES[:3]))
                    self.client.put(self.bucket, name, data)
                else:
                    self.client.delete(self.bucket, name)
            except AssertionError:
                pass  # there is nothing to delete
            except Exception as error:
                self.histories.wrong(f"direct client: {error!r}")
            self.histories.operations += 1
            time.sleep(0.01)

    def close(self) -> None:
        self.client.close()


@pytest.fixture
def proxied(nats_server: Server) -> Iterator[tuple[Server, Proxy]]:
    """The server behind a proxy."""
    proxy = Proxy(nats_server.port)
    server = Server()
    server.port = proxy.port
    server._process = nats_server._process
    server._connected = nats_server.client
    yield server, proxy
    proxy.close()


def mounted_all(server: Server, folder: Path, bucket: str, count: int) -> list[Mount]:
    return [
        Mount.make(server, folder / str(number), f"/{bucket}", "purge_grace=5") for number in range(count)
    ]


def everything(top: Path) -> dict[str, bytes]:
    return {
        str((Path(where) / name).relative_to(top)): (Path(where) / name).read_bytes()
        for where, _, names in os.walk(top)
        for name in names
    }


def agree(mounts: list[Mount], client: Client, bucket: str) -> bool:
    """All mounts and a fresh listing have the same names with the same contents."""
    stored = {name: client.read(bucket, name) for name in client.names(bucket) if not name.endswith("/")}
    try:
        return all(everything(mount.path) == stored for mount in mounts)
    except OSError:
        return False


def found(path: Path) -> bytes | None:
    """The content; None until the name shows. Any other error is one."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _ended(player: threading.Thread) -> bool:
    player.join(30)
    return not player.is_alive()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each half of --coherence-seconds may take as long as that says, and a test's usual time."""
    usual = float(metafunc.config.getini("timeout"))
    limit = pytest.mark.timeout(usual + metafunc.config.getoption("--coherence-seconds") / 2)
    halves = ((False, "whole connections"), (True, "cut connections"))
    metafunc.parametrize("cuts", [pytest.param(cuts, marks=limit, id=text) for cuts, text in halves])


@pytest.mark.semantics("one-truth")
def test_many_mounts(
    bucket: str,
    client: Client,
    nats_server: Server,
    proxied: tuple[Server, Proxy],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    cuts: bool,
) -> None:
    """No reading mixes versions or goes back in time, nothing is listed twice, and in the end all agree."""
    server, proxy = proxied
    # pytest's own limit for a test that is stuck in the kernel cannot be set for one test.
    faulthandler.cancel_dump_traceback_later()
    seconds = float(request.config.getoption("--coherence-seconds")) / 2
    seed = int(os.environ.get("COHERENCE_SEED") or time.time())
    print("COHERENCE_SEED", seed)
    mounts = mounted_all(server, tmp_path, bucket, 3)
    histories = Histories()
    fine = FINE | ({errno.ETIMEDOUT} if cuts else set())
    (mounts[0].path / "d").mkdir()
    for mount in mounts:
        mount.allow(" WARNING ")  # each call that meets another's change, and each cut, says so
        mount.allow_failed()
        until(lambda mount=mount: (mount.path / "d").is_dir())  # type: ignore[misc]
    players: list[Player | Direct] = [
        Player(number + 1, mounts[where].path, histories, seed + number, fine, alone=where == 0)
        for number, where in enumerate((0, 1, 1, 2, 2))
    ]
    players.append(Direct(9, nats_server.url, bucket, histories, seed))
    chance = random.Random(seed)
    try:
        for player in players:
            player.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(chance.uniform(0.3, 1.2))
            if cuts:
                proxy.cut()
    finally:
        histories.stop.set()
        hanging = [player for player in players if player.is_alive() and not _ended(player)]
        players[-1].close()  # type: ignore[union-attr]
    assert hanging == []
    assert histories.problems == []
    assert histories.operations > 50
    # In CI two cores do all of this.
    until(lambda: agree(mounts, client, bucket), 3 if not cuts else 10, "all mounts agree")
    # A write by each mount in turn is everybody's at once, and nothing of it was lost.
    for number, mount in enumerate(mounts):
        data = content(50 + number, 1, 4000)
        (mount.path / "last").write_bytes(data)
        for other in mounts:
            until(lambda other=other, data=data: found(other.path / "last") == data)  # type: ignore[misc]
    # A consumer that a cut connection has left behind goes by itself, after ten seconds.
    harmless = ("umount ended", "consumer ") if cuts else ("umount ended",)
    problems = [
        problem
        for mount in mounts
        for problem in mount.finish()
        if not problem.startswith(harmless) and "not saved" not in problem
    ]
    assert problems == []
    # Nobody's chunks were purged too early, and two names never share a nuid.
    nuids = [meta["nuid"] for meta in client.metas(bucket).values() if not meta.get("deleted")]
    assert len(set(nuids)) == len(nuids)

"""Random operations on several mounts and by direct clients, and what each of them saw."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import os
import random
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.coherence.history import History, key, republish
from tests.coherence.players import (
    FINE,
    GRACE,
    KEPT,
    KINDS,
    LINKS,
    PLAYERS,
    SLOTS,
    TAGS,
    Direct,
    Player,
    content,
    slots,
)
from tests.coherence.proxy import Proxy
from tests.support import Client, Mount, Server, until

AGREE = 1.0  # seconds after the last change, and the last cut, in which all mounts show what is stored
ENOUGH = 3000  # calls, of which every kind has succeeded at least once


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


@pytest.fixture
def history(bucket: str, client: Client, nats_server: Server, tmp_path: Path) -> Iterator[History]:
    """Of all that is stored in the bucket from now on."""
    client.change_bucket(bucket, **republish(bucket))
    made = History(nats_server.url, bucket, tmp_path / "history")
    yield made
    made.close()


def mounted_all(server: Server, folder: Path, bucket: str, count: int) -> list[Mount]:
    return [
        Mount.make(server, folder / str(number), f"/{bucket}", f"purge_grace={GRACE:g}")
        for number in range(count)
    ]


Shown = tuple[str, str | None, int]  # of a file or link the content, an attribute, and the mode


def shown(top: Path, names: Iterable[str]) -> dict[str, Shown | None]:
    """Of every file and link below `top`; None where a name of `names` leads to something that is not listed.

    The names are asked for first: a listing tells the kernel anew what each leads to.
    """
    found: dict[str, Shown | None] = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            found[name] = look(top / name)
    listed = {
        str((Path(where) / name).relative_to(top))
        for where, folders, files in os.walk(top)
        for name in [*files, *(folder for folder in folders if (Path(where) / folder).is_symlink())]
    }
    found |= {name: look(top / name) for name in listed - found.keys()}
    found |= dict.fromkeys(found.keys() - listed)
    return found


def look(path: Path) -> Shown:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return key(os.readlink(path)), None, mode
    mark = os.getxattr(path, "user.mark").decode() if "user.mark" in os.listxattr(path) else None
    return key(path.read_bytes()), mark, mode


def stored(client: Client, bucket: str) -> dict[str, tuple[str, str | None]]:
    """What a client without natsfs lists: of every object what `shown` has of it, but the mode."""
    found: dict[str, tuple[str, str | None]] = {}
    for name, meta in client.metas(bucket).items():
        if not meta.get("deleted") and not name.endswith("/"):
            attributes = meta.get("metadata") or {}
            text = attributes.get("symlink")
            found[name] = (str(meta["digest"])[8:20] if text is None else text, attributes.get("mark"))
    return found


def disagreements(mounts: list[Mount], client: Client, bucket: str) -> list[str]:
    listed = stored(client, bucket)
    try:
        looks = [shown(mount.path, listed) for mount in mounts]
    except OSError as error:
        return [str(error)]
    wrong = []
    for name in sorted(listed.keys() | looks[0].keys() | looks[1].keys() | looks[2].keys()):
        told = [look.get(name) for look in looks]
        if any(one is None or one != told[0] or one[:2] != listed.get(name) for one in told):
            wrong.append(f"{name}: stored as {listed.get(name)}, shown as {told}")
    return wrong


def agreed(mounts: list[Mount], client: Client, bucket: str, since: float) -> float:
    """Seconds from `since` to the end of the first look that finds all mounts right; it begins within `AGREE`."""
    while True:
        began = time.monotonic()
        wrong = disagreements(mounts, client, bucket)
        if not wrong:
            return time.monotonic() - since
        if began - since > AGREE:
            break
    while disagreements(mounts, client, bucket) and time.monotonic() - since < 30:
        time.sleep(0.05)
    took = time.monotonic() - since
    raise AssertionError("\n".join([f"not within {AGREE:g} s, but in {took:.2f} s:", *wrong]))


def tags(top: Path) -> list[int]:
    """The attributes of all players that show; the last of them was set last."""
    names = [f"user.tag{player}" for player in range(1, PLAYERS + 1)]
    try:
        return [int(os.getxattr(top / TAGS, name)) for name in names if name in os.listxattr(top / TAGS)]
    except FileNotFoundError:
        return []


def found(path: Path) -> bytes | None:
    """The content; None until the name shows. Any other error is one."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _ended(player: Player | Direct) -> bool:
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
    history: History,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    cuts: bool,
) -> None:
    """No reading mixes versions or goes back in time, nothing stored is lost, and in the end all agree at once."""
    server, proxy = proxied
    # pytest's own limit for a test that is stuck in the kernel cannot be set for one test.
    faulthandler.cancel_dump_traceback_later()
    seconds = float(request.config.getoption("--coherence-seconds")) / 2
    seed = int(os.environ.get("COHERENCE_SEED") or time.time())
    print("COHERENCE_SEED", seed)
    mounts = mounted_all(server, tmp_path, bucket, 3)
    fine = FINE | ({errno.ETIMEDOUT} if cuts else set())
    for name in ("d", "p"):
        (mounts[0].path / name).mkdir()
    for name in KEPT:
        (mounts[0].path / name).write_bytes(content(0, 1, 4000))
    (mounts[0].path / SLOTS).write_bytes(slots([0] * PLAYERS))
    (mounts[0].path / TAGS).touch()
    for number in range(1, PLAYERS + 1):
        os.setxattr(mounts[0].path / TAGS, f"user.tag{number}", b"0")
    for mount in mounts:
        mount.allow(" WARNING ")  # each call that meets another's change, and each cut, says so
        mount.allow_failed()
        until(lambda mount=mount: tags(mount.path) == [0] * PLAYERS)  # type: ignore[misc]
    players: list[Player | Direct] = [
        Player(number + 1, where, mounts[where].path, history, seed + number, fine, alone=where == 0)
        for number, where in enumerate((0, 1, 1, 2, 2))
    ]
    directs = [Direct(number, nats_server.url, bucket, history, seed + number) for number in (8, 9)]
    players += directs
    chance = random.Random(seed)
    try:
        for player in players:
            player.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end and not history.problems:
            time.sleep(chance.uniform(0.3, 1.2))
            if cuts:
                proxy.cut()
    finally:
        history.stop.set()
        hanging = [player for player in players if player.is_alive() and not _ended(player)]
        changed = time.monotonic()
        for direct in directs:
            direct.close()
    assert hanging == []
    if cuts:
        proxy.cut()
        changed = time.monotonic()
    took = agreed(mounts, client, bucket, changed)
    print(f"{history.done.total()} calls, all agreed within {took:.3f} s: {dict(history.done)}")
    history.ended()
    if history.problems:
        print(history.before_problem(1000))
    assert history.problems == []
    assert history.done.total() > 50
    if history.done.total() > ENOUGH:
        kinds = {call.__name__ for call in players[0].calls()}
        kinds |= {f"direct {call.__name__}" for call in directs[0].calls()}
        assert kinds - history.done.keys() == set(), "these never succeeded"
    # Each object is whole; and a log has every line of every call that succeeded.
    for name in stored(client, bucket).keys() - set(LINKS):
        data = client.read(bucket, name)
        if name in history.logs:
            history.judge_log("the store", name, data, whole=True)
    for number, tag in enumerate(tags(mounts[0].path), 1):
        history.judge_number(f"tag {number}", tag)
    for number, line in enumerate(client.read(bucket, SLOTS).splitlines(), 1):
        history.judge_number(f"slot {number}", int(line.split()[1]))
    left = [name for name in os.listdir(mounts[0].path) if name.startswith(KINDS)]
    assert [name for name in left if not history.is_unsure(name)] == []
    # A write by each mount in turn is everybody's at once, and nothing of it was lost.
    for number, mount in enumerate(mounts):
        data = content(50 + number, 1, 4000)
        (mount.path / "last").write_bytes(data)
        for other in mounts:
            until(lambda other=other, data=data: found(other.path / "last") == data)  # type: ignore[misc]
    assert disagreements(mounts, client, bucket) == []
    assert history.problems == []
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

"""What several mounts and clients saw and did, held against the order of the store.

The bucket republishes each metadata message that it stores: so the test knows all of them, those too that were replaced
a moment later, and judges every reading and every end of a version as it happens. What is kept are a few ten bytes for
each version.
"""

from __future__ import annotations

import errno
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from nats.aio.msg import Msg

from tests.support import Client, digest_of

ASIDE = "aside."  # begins the names under which content is written that is renamed then; nobody reads them
UNDONE = 60.0  # seconds within which a rename that fails is taken back
LAG = 5.0  # seconds in which a stored message has certainly been republished to the test


def republish(bucket: str) -> dict[str, object]:
    """The setting of the bucket's stream that a `History` needs."""
    return {"republish": {"src": f"$O.{bucket}.M.>", "dest": f"stored.{bucket}.>"}}


def key(content: bytes | str) -> str:
    """Enough to tell versions apart: of a digest, or the text of a link."""
    return content if isinstance(content, str) else digest_of(content)[8:20]


@dataclass(slots=True)
class _Version:
    names: set[str] = field(default_factory=set)  # that have led to it and were not seen to end
    ended: bool = False  # whether somebody has replaced or removed it under one of its names
    rewritten: float = 0.0  # when somebody wrote to its file under another name
    ino: str | None = None  # of the file, in metadata of natsfs


class History:
    """Everything that all threads did, a line each in the file `log`. `problems` is empty if all of it can be."""

    def __init__(self, url: str, bucket: str, log: Path) -> None:
        self.problems: list[str] = []
        self.stop = threading.Event()
        self.done: Counter[str] = Counter()  # calls that succeeded, by kind
        self._log_path = log
        self._log = log.open("w", buffering=1)
        self._client = Client(url)
        self._changed = threading.Condition(threading.RLock())
        # Per name the versions in the order of the store, "" for a removal. A purge leaves no message, so it is
        # not in here.
        self._stored: dict[str, list[str]] = {}
        # Per mount and name how far in that order it has shown to be.
        self._shown: dict[tuple[int, str], int] = {}
        self._live: dict[str, str] = {}  # nuid by name
        # By name the nuid that was replaced there last; and the one that was replaced by a version that had come to
        # its end before. A rename of what somebody replaces elsewhere in this moment brings such a one, and takes it
        # back.
        self._replaced: dict[str, str] = {}
        self._owed: dict[str, str] = {}
        self._versions: dict[str, _Version] = {}
        self._dead: set[str] = set()
        self._removing: Counter[str] = Counter()
        # Removals under way that may be about another name, that of the file in a directory which this mount renames
        # when the path has been resolved so far: that name, the mount, and when the call began.
        self._astray: dict[object, tuple[str, int, float]] = {}
        self._moves: Counter[int] = Counter()  # renames of directories that are under way, by mount
        self._moved: dict[int, float] = {}  # by mount, the time of the end of the last one
        self._removed: dict[str, float] = {}  # by name, the time of the end of the last removal
        # Appended lines, by the name of the log: those of calls that succeeded, and of those that may have.
        self._logs = 0
        self._lines: dict[str, dict[str, bool]] = {"log0": {}}
        # Numbers that one player each makes larger: what is stored for certain, what may be, and what is not.
        self._numbers: dict[str, int] = {}
        self._open: dict[str, set[int]] = {}
        self._refused: dict[str, set[int]] = {}
        self._seen: dict[tuple[int, str], int] = {}  # by mount
        self.mutex = [threading.Lock() for _ in range(3)]  # of each mount
        # Names that are made exclusively.
        self._locks: Counter[str] = Counter()
        self._unsure: set[str] = set()
        self._holder: dict[str, int] = {}
        self._client.run(self._client.connection.subscribe(f"stored.{bucket}.>", cb=self._take))
        self._client.run(self._client.connection.flush())

    def close(self) -> None:
        self._client.close()
        self._log.close()

    def note(self, text: str, began: float | None = None) -> None:
        """`began` is the time of the beginning of what is told, if that took any."""
        with self._changed:
            self._log.write(f"{began or time.time():.4f} {time.time():.4f} {text}\n")

    def wrong(self, text: str) -> None:
        self.note(f"WRONG {text}")
        with self._changed:
            self.problems.append(text)

    # --- the store --------------------------------------------------------------------------------------------

    async def _take(self, message: Msg) -> None:
        try:
            headers = message.headers or {}
            with self._changed:
                self._apply(
                    json.loads(message.data),
                    int(headers["Nats-Sequence"]),
                    datetime.fromisoformat(headers["Nats-Time-Stamp"]).timestamp(),
                )
                self._changed.notify_all()
        except Exception as error:
            self.wrong(f"a message that nobody foresaw: {error!r}, {message.data[:300]!r}")

    def _apply(self, meta: dict[str, object], seq: int, when: float) -> None:
        name, nuid, deleted = str(meta["name"]), str(meta["nuid"]), bool(meta.get("deleted"))
        attributes: dict[str, str] = meta.get("metadata") or {}  # type: ignore[assignment]
        text, ino = attributes.get("symlink"), attributes.get("ino")
        version = "" if deleted else str(meta["digest"])[8:20] if text is None else str(text)
        self.note(f"store: {seq} {name} {nuid} {version or 'deleted'} {ino or ''}", when)
        before = self._live.get(name)
        if deleted:
            self._stored.setdefault(name, []).append("")
            if before is not None:
                del self._live[name]
                removed = self._removing[name] > 0 or self._removed.get(name, 0.0) >= when - 0.001
                removed = removed or any(
                    astray == name and self._has_moved(mount, since)
                    for astray, mount, since in self._astray.values()
                )
                self._end(before, name, seq, when, removed=removed)
            return
        if text is None and not meta["size"]:
            return
        if not name.startswith(ASIDE):
            self._stored.setdefault(name, []).append(version)
        if text is not None or before == nuid:
            return
        came_back = nuid in self._dead
        # By a rename that met a conflict: what it had brought is under its old name, or replaced there.
        brought = self._versions.get(before or "", _Version())
        given_back = nuid == self._replaced.get(name) and (len(brought.names) > 1 or brought.ended)
        if not came_back or given_back or self._owed.get(name) == nuid:
            self._owed.pop(name, None)
        elif before is not None:
            self._owed.setdefault(name, before)
        self._replaced[name] = before or ""
        self._dead.discard(nuid)
        self._live[name] = nuid
        if nuid not in self._versions and not came_back and ino is not None:
            # Somebody has written to this file. Where that was under a name that a rename had just taken from it, what
            # it was is still under the other one, and ends there when the rename fails a moment later.
            for version_before in self._versions.values():
                if version_before.ino == ino:
                    version_before.rewritten = when
        known = self._versions.setdefault(nuid, _Version(ended=came_back, ino=ino))
        known.names.add(name)
        if before is not None:
            self._end(before, name, seq, when, removed=not given_back)

    def _end(self, nuid: str, name: str, seq: int, when: float, *, removed: bool) -> None:
        """`name` leads to another version, or to none; `removed` if that is what somebody wanted."""
        version = self._versions[nuid]
        version.names.discard(name)
        version.ended = version.ended or removed
        if version.names:
            return
        if not version.ended and when - version.rewritten > UNDONE:
            self.wrong(
                f"{name}: a version that nobody removed lost its last name with sequence {seq}: {nuid}"
            )
        del self._versions[nuid]
        self._dead.add(nuid)

    def before_problem(self, lines: int) -> str:
        """What was noted last before the first problem, and behind it a little."""
        noted = self._log_path.read_text().splitlines()
        at = next((number for number, line in enumerate(noted) if " WRONG " in line), len(noted))
        return "\n".join(noted[max(0, at - lines) : at + lines // 10])

    def ended(self) -> None:
        """Nobody does anything any more."""
        if self._client.connection.stats["reconnects"]:
            self.wrong("the test's own connection was lost, and what was stored meanwhile is not known to it")
        for name, nuid in self._owed.items():
            self.wrong(f"{name}: a version was lost to one that had been replaced before: {nuid}")

    def _has_moved(self, mount: int, since: float) -> bool:
        """Whether `mount` has renamed a directory at any time from `since` on."""
        return self._moves[mount] > 0 or self._moved.get(mount, 0.0) >= since

    @contextmanager
    def moving(self, mount: int) -> Iterator[None]:
        """For the time of a call that is to rename a directory."""
        with self._changed:
            self._moves[mount] += 1
        try:
            yield
        finally:
            with self._changed:
                self._moves[mount] -= 1
                self._moved[mount] = time.time()

    @contextmanager
    def removing(self, name: str, mount: int = 0, astray: str | None = None) -> Iterator[None]:
        """For the time of a call that is to remove `name`.

        `astray` is the name that the file has when `mount` renames its directory meanwhile.
        """
        token, began = object(), time.time()
        with self._changed:
            self._removing[name] += 1
            if astray is not None:
                self._astray[token] = astray, mount, began
        sure = True
        try:
            yield
        except OSError as error:
            sure = error.errno != errno.ETIMEDOUT
            raise
        finally:
            with self._changed:
                self._removing[name] -= 1
                self._astray.pop(token, None)
                if astray is not None and self._has_moved(mount, began):
                    self._removed[astray] = max(self._removed.get(astray, 0.0), time.time())
                if self._removed.get(name) != math.inf:
                    self._removed[name] = time.time() if sure else math.inf

    # --- readings ---------------------------------------------------------------------------------------------

    def shown(self, mount: int, name: str) -> int:
        """How far `mount` had shown to be, to be asked before a call whose result is judged."""
        return self._shown.get((mount, name), 0)

    def saw(
        self,
        mount: int,
        name: str,
        since: int,
        content: bytes | str,
        how: str = "shows",
        also: str | None = None,
    ) -> None:
        """A whole version that was not older than `since`; or that was written, and has to be stored then.

        `also` is another name that the call may have been about: that of the file in a directory that was renamed when
        the path had been resolved so far.
        """
        version = key(content)
        with self._changed:
            at = self._changed.wait_for(
                lambda: self._find(name, version, since) or (also and self._find(also, version, 0)), LAG
            )
            if at and self._find(name, version, since):
                self._shown[mount, name] = max(self._shown.get((mount, name), 0), int(at))
            if at:
                return
            older = version in self._stored.get(name, ())
        what = content[:19]
        why = "which is older than what it showed before" if older else "which was never stored there"
        self.wrong(f"mount {mount}: {how} {name} {what!r} ({version}), {why}")

    def lacks(self, mount: int, name: str, since: int, how: str = "does not show") -> None:
        """Nothing is there. Only for names that nobody purges: the store has a message for each removal."""
        if not since:
            return
        with self._changed:
            at = self._changed.wait_for(lambda: self._find(name, "", since), LAG)
            self._shown[mount, name] = max(self._shown.get((mount, name), 0), int(at or 0))
        if not at:
            self.wrong(f"mount {mount}: {how} {name}, which was not removed since it showed it last")

    def _find(self, name: str, version: str, since: int) -> int | None:
        """The first place from `since` on in the order of the store, counted from 1."""
        stored = self._stored.get(name, [])
        try:
            return stored.index(version, max(since - 1, 0)) + 1
        except ValueError:
            return None

    # --- logs -------------------------------------------------------------------------------------------------

    @property
    def log(self) -> str:
        """To append to now: a log stays so short that it is read with one request."""
        with self._changed:
            if len(self._lines[f"log{self._logs}"]) >= 150:
                self._logs += 1
                self._lines[f"log{self._logs}"] = {}
            return f"log{self._logs}"

    @property
    def logs(self) -> list[str]:
        return list(self._lines)

    def append(self, log: str, line: str) -> None:
        """Before the call: whether it is stored is not known."""
        with self._changed:
            self._lines[log][line] = False

    def appended(self, log: str, line: str) -> None:
        with self._changed:
            self._lines[log][line] = True

    def judge_log(self, where: str, log: str, data: bytes, *, whole: bool = False) -> None:
        """Every line once, no line torn, each writer's in its order; `whole` if all that was stored has to be there."""
        newest: dict[str, str] = {}
        lines = data.decode(errors="replace").splitlines(keepends=True)
        with self._changed:
            known = dict(self._lines[log])
        for line in lines:
            writer = line[:2]
            if line not in known:
                self.wrong(f"{where}: {log} has the line {line!r}, which nobody wrote")
            elif newest.get(writer, "") >= line:
                self.wrong(f"{where}: {log} has the line {line!r} behind {newest[writer]!r}")
            newest[writer] = line
        if whole:
            for line in sorted({line for line, stored in known.items() if stored} - set(lines)):
                self.wrong(f"{where}: {log} lacks the line {line!r}, which was stored")

    # --- numbers that only grow -------------------------------------------------------------------------------

    def seen(self, mount: int, what: str) -> int:
        """To be asked before a call whose result is judged, as `shown`."""
        return self._seen.get((mount, what), 0)

    @contextmanager
    def setting(self, mount: int, what: str, number: int) -> Iterator[None]:
        """For the time of the one call that is to store it."""
        with self._changed:
            self._open.setdefault(what, set()).add(number)
        try:
            yield
        except OSError as error:
            if error.errno != errno.ETIMEDOUT:
                with self._changed:
                    self._open[what].discard(number)
                    self._refused.setdefault(what, set()).add(number)
            raise
        with self._changed:
            self._open[what].discard(number)
            self._numbers[what] = number
            self._seen[mount, what] = number

    def saw_number(self, mount: int, what: str, since: int, number: int) -> None:
        with self._changed:
            newest = max(self._numbers.get(what, 0), *self._open.get(what, ()), 0)
            refused = number in self._refused.get(what, ())
            self._seen[mount, what] = max(self._seen.get((mount, what), 0), number)
        if number < since:
            self.wrong(f"mount {mount}: {what} is {number} after it was {since}")
        elif number > newest or refused:
            self.wrong(f"mount {mount}: {what} is {number}, which was not stored; {newest} is the newest")

    def judge_number(self, what: str, number: int) -> None:
        """What the store holds in the end."""
        sure = self._numbers.get(what, 0)
        if number != sure and not (number > sure and number in self._open.get(what, ())):
            self.wrong(f"the store: {what} is {number}, and {sure} was stored last")

    # --- what is made exclusively -----------------------------------------------------------------------------

    def lock(self, kind: str) -> str:
        """To be made now. A file and a directory of one name do not exclude each other: each kind has its own."""
        return f"{kind}{self._locks[kind]}"

    def spoil(self, kind: str) -> None:
        """Whether it was made or removed is not known: from now on another one is used."""
        with self._changed:
            self._unsure.add(self.lock(kind))
            self._locks[kind] += 1

    def is_unsure(self, name: str) -> bool:
        return name in self._unsure

    @contextmanager
    def holding(self, lock: str, player: int) -> Iterator[None]:
        with self._changed:
            other = self._holder.setdefault(lock, player)
        if other != player:
            self.wrong(f"{lock} was made by player {player} while {other} had it")
        try:
            yield
        finally:
            with self._changed:
                self._holder.pop(lock, None)

"""Chunks of versions that this mount replaced or removed, on their way out.

They stay for a grace time, in which readers elsewhere finish with the old version, and they outlive the daemon in a
journal: one JSON object a line, appended when a purge becomes due, and rewritten when the mount begins.
"""

from __future__ import annotations

import fcntl
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import TextIO

import trio

from natsfs.errors import BucketGone, Unreachable

log = logging.getLogger(__name__)

RETRY = 60.0  # seconds, at least, until a purge that was refused is tried again
REST = 1  # times as long as a purge took, before the next one
ROUND = 1.0  # seconds between two looks at what is due


@dataclass(slots=True, eq=False)
class Purge:
    """`subject` is where the version's metadata was; `seq` that of the message that ended it."""

    bucket: str
    created: str
    nuid: str
    subject: str
    seq: int
    due: float  # seconds since the epoch


# Whether a purge may go ahead: True, False for never (the nuid is live), None for not yet.
Verdict = Callable[[Purge], Awaitable[bool | None]]
Execute = Callable[[str, str], Awaitable[None]]


class Purges:
    """The queue belongs to the trio thread.

    `journal` is this mount's own file, locked for as long as the mount lives; the journals of mounts that have ended,
    `others`, are taken over. `execute` purges the chunks of a nuid in a bucket.
    """

    def __init__(self, journal: Path, others: str, grace: float, verdict: Verdict, execute: Execute) -> None:
        self._journal = journal
        self._others = others
        self._grace = grace
        self._verdict = verdict
        self._execute = execute
        self._waiting: dict[Purge, None] = {}  # a set in order: what is due first comes first
        self._any = trio.Event()
        self._file: TextIO | None = None

    def load(self) -> None:
        """Take over what earlier mounts left. Lines that a crash cut off are passed over."""
        for path in list(self._journal.parent.glob(self._others)):
            try:
                with path.open("r+") as left:
                    fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._read(left)
                    self._rewrite()
                    path.unlink()
            except BlockingIOError:
                continue  # of a mount that is alive
            except OSError as error:
                log.warning("the journal %s cannot be taken over: %s", path, error)
        if self._waiting:
            self._any.set()

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            try:
                self._waiting[Purge(**json.loads(line))] = None
            except (ValueError, TypeError):
                log.warning("a line of a purge journal cannot be read: %.80r", line)

    def _rewrite(self) -> None:
        """Bring the journal down to what still waits; without anything there is no file."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if not self._waiting:
            self._journal.unlink(missing_ok=True)
            return
        partial = self._journal.with_suffix(".new")
        partial.write_text("".join(json.dumps(asdict(purge)) + "\n" for purge in self._waiting))
        partial.replace(self._journal)
        self._open()

    def _open(self) -> TextIO:
        if self._file is None:
            self._file = self._journal.open("a", buffering=1)
            fcntl.flock(self._file, fcntl.LOCK_EX)
        return self._file

    def add(self, bucket: str, created: str, nuid: str, subject: str, seq: int) -> None:
        """A version was replaced or removed by the own message `seq` on `subject`."""
        purge = Purge(bucket, created, nuid, subject, seq, time.time() + self._grace)
        self._waiting[purge] = None
        try:
            self._open().write(json.dumps(asdict(purge)) + "\n")
        except OSError as error:
            # The purge itself is remembered; only after a crash would the chunks stay behind.
            log.warning("the purge journal cannot be written: %s", error)
        self._any.set()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def hurry(self, bucket: str) -> bool:
        """The bucket is full: everything that waits in it is due now. Whether there was anything."""
        first = {purge: None for purge in self._waiting if purge.bucket == bucket}
        for purge in first:
            purge.due = 0.0
        self._waiting = first | self._waiting
        return bool(first)

    async def settle(self, bucket: str) -> None:
        """Do at once what is due in a bucket; for callers that need the room."""
        await self._work([purge for purge in self._due() if purge.bucket == bucket])

    def _due(self) -> list[Purge]:
        now = time.time()
        return list(takewhile(lambda purge: purge.due <= now, self._waiting))

    async def run(self) -> None:
        while True:
            await self._any.wait()
            await self._work(self._due(), gently=True)
            if not self._waiting:
                self._any = trio.Event()
            await trio.sleep(ROUND)

    async def _work(self, due: list[Purge], *, gently: bool = False) -> None:
        """Purge what nothing leads to any more; `gently` leaves half of the time to those who wait for an answer."""
        done, began = 0, trio.current_time()
        for purge in due:
            if purge not in self._waiting:
                continue
            if gently and done:
                await trio.sleep(min(REST * (trio.current_time() - began), ROUND))
            began = trio.current_time()
            try:
                verdict = await self._verdict(purge)
                if verdict:
                    await self._execute(purge.bucket, purge.nuid)
            except BucketGone:
                verdict = False
            except Unreachable as error:
                log.warning("purging nuid %s of bucket %s waits: %s", purge.nuid, purge.bucket, error)
                break
            except Exception as error:
                # What is forbidden in one bucket must not hold up the others, nor end the daemon.
                log.warning("purging nuid %s of bucket %s waits: %s", purge.nuid, purge.bucket, error)
                if self._waiting.pop(purge, purge) is None:
                    purge.due = time.time() + max(RETRY, self._grace)
                    self._waiting[purge] = None
                continue
            if verdict is not None and self._waiting.pop(purge, purge) is None:
                done += 1
        if done:
            self._rewrite_if_possible()

    def _rewrite_if_possible(self) -> None:
        try:
            self._rewrite()
        except OSError as error:
            log.warning("the purge journal cannot be written: %s", error)

    def close(self) -> None:
        """What still waits is left to the next mount."""
        self._rewrite_if_possible()
        if self._file is not None:
            self._file.close()
            self._file = None

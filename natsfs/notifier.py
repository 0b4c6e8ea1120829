"""Telling the kernel what it must forget.

A notification blocks for as long as a call in that directory does, so it is never sent from a handler: a few threads
do it, and all notifications of one directory go to the same thread, in order. Those of content have threads of their
own: each waits for reads of that file which are under way, and these for the store. What is waiting is coalesced by
its key, so the queue cannot grow beyond the number of names that the kernel knows; it keeps its place, so what a
barrier was put behind is told before it. The threads are daemons: one that is stuck behind a dead mount must not
hold up the end of the process.

Where a file has grown the kernel hears of the new size only when it has dropped its pages: it fills what is read up to
the size that it knows with zeros, and that of a read under way ends where the file ended.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

import pyfuse3
import trio

from natsfs.catalog.inodes import AttributesChanged, ContentChanged, Effect, EntryChanged

log = logging.getLogger(__name__)

THREADS = 4  # for entries and attributes, and as many for content
PATIENCE = 0.1  # seconds; a notification may wait for a call in its directory, and that for the store


@dataclass(frozen=True, slots=True)
class _Barrier:
    """Not for the kernel: everything that was queued before has been told."""

    passed: Callable[[], None]


class _Sizes:
    """Of files whose content has changed: the size that the kernel may know. For all threads."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[int, ContentChanged]] = {}  # with the newest change
        self._lock = threading.Lock()

    def __contains__(self, ino: int) -> bool:
        return ino in self._kept

    def changed(self, effect: ContentChanged) -> None:
        with self._lock:
            size, _ = self._kept.get(effect.ino, (effect.before, effect))
            self._kept[effect.ino] = size, effect

    def told(self, effect: ContentChanged) -> None:
        with self._lock:
            size, newest = self._kept.get(effect.ino, (0, effect))
            if newest is not effect:
                self._kept[effect.ino] = max(size, effect.size), newest
            else:
                self._kept.pop(effect.ino, None)

    def raise_to(self, ino: int, size: int) -> None:
        if ino in self._kept:  # seldom; and each write comes by here
            with self._lock:
                if ino in self._kept:
                    known, newest = self._kept[ino]
                    self._kept[ino] = max(known, size), newest

    def of(self, ino: int, size: int) -> int:
        kept = self._kept.get(ino)
        return size if kept is None else min(kept[0], size)


class _Worker:
    def __init__(self, number: int, sizes: _Sizes) -> None:
        self._sizes = sizes
        self._waiting: OrderedDict[tuple[object, ...], Effect | _Barrier] = OrderedDict()
        self._telling: tuple[object, ...] | None = None
        self._since = 0.0  # when the kernel began to take that
        self._idle = True
        self._condition = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=f"natsfs-notify-{number}", daemon=True)
        self._thread.start()

    def add(self, key: tuple[object, ...], effect: Effect) -> None:
        with self._condition:
            known = self._waiting.get(key)
            if isinstance(known, EntryChanged) and isinstance(effect, EntryChanged) and not effect.gone:
                effect = known  # a removal that nobody has heard of yet, and then something new: one forgetting does
            self._waiting[key] = effect
            self._condition.notify()

    def behind(self, barrier: _Barrier, patience: float) -> bool:
        """Whether there is something that the barrier has to wait for; then it is queued.

        Not for what the kernel has not taken for longer than `patience` seconds: a call keeps that directory, and may
        itself wait for whoever would wait here.
        """
        with self._condition:
            if self._idle and not self._waiting:
                return False
            if self._telling is not None and time.monotonic() - self._since > patience:
                return False
            self._waiting[barrier,] = barrier
            self._condition.notify()
            return True

    def owes(self, key: tuple[object, ...]) -> bool:
        with self._condition:
            return key in self._waiting or key == self._telling

    def stop(self) -> None:
        with self._condition:
            self._stopped = True
            self._waiting.clear()
            self._condition.notify()

    def join(self, limit: float) -> None:
        self._thread.join(limit)

    def _run(self) -> None:
        while True:
            with self._condition:
                self._telling = None
                while not self._waiting and not self._stopped:
                    self._idle = True
                    self._condition.wait()
                if self._stopped:
                    return
                self._telling, effect = self._waiting.popitem(last=False)
                self._since = time.monotonic()
                self._idle = False
            if isinstance(effect, _Barrier):
                effect.passed()
                continue
            log.debug("telling the kernel: %s", effect)
            try:
                self._tell(effect)
            except OSError as error:
                # ENOENT: the kernel had forgotten it already; ENOTDIR, ENOTEMPTY: it knows better; the rest is
                # the end of the mount.
                if error.errno not in (
                    errno.ENOENT,
                    errno.ENOTDIR,
                    errno.ENOTEMPTY,
                    errno.EBADF,
                    errno.ENODEV,
                ):
                    log.warning("the kernel did not take %s: %s", effect, error)

    def _tell(self, effect: Effect) -> None:
        match effect:
            case EntryChanged(parent, name, gone):
                try:
                    pyfuse3.invalidate_entry(parent, name, gone)
                except OSError as error:
                    if not gone or error.errno == errno.ENOENT:
                        raise
                    # The name leads to another inode than the removed one, or to a directory in use.
                    pyfuse3.invalidate_entry(parent, name)
            case AttributesChanged(ino):
                pyfuse3.invalidate_inode(ino, attr_only=True)
            case ContentChanged(ino):
                try:
                    pyfuse3.invalidate_inode(ino)
                finally:
                    self._sizes.told(effect)
                pyfuse3.invalidate_inode(
                    ino, attr_only=True
                )  # somebody may have asked for the size meanwhile


class Notifier:
    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self._sizes = _Sizes()
        # Entries that have appeared, and how many of them the kernel has heard of.
        self._appeared = self._appeared_told = 0

    def start(self) -> None:
        """From the mount on; before it the kernel knows nothing that it could forget."""
        self._workers = [_Worker(number, self._sizes) for number in range(2 * THREADS)]

    def send(self, effects: Iterable[Effect]) -> None:
        """Queue what the kernel has to hear; returns at once. An entry of parent 0 is one it never asked about."""
        for effect in effects if self._workers else ():
            match effect:
                case EntryChanged(parent, name, gone):
                    if parent:
                        self._appeared += not gone
                        self._workers[parent % THREADS].add((parent, name), effect)
                case AttributesChanged(ino) | ContentChanged(ino):
                    first = 0
                    if isinstance(effect, ContentChanged):
                        self._sizes.changed(effect)
                        first = THREADS
                    self._workers[first + ino % THREADS].add((type(effect), ino), effect)

    def owes(self, parent: int, name: bytes) -> bool:
        """Whether the kernel may still take `name` in the directory `parent` for what it led to before."""
        return bool(self._workers) and self._workers[parent % THREADS].owes((parent, name))

    def keeps(self, ino: int) -> bool:
        """Whether the kernel may still show what a file held, or how long it was, before its content changed."""
        return ino in self._sizes

    def size_of(self, ino: int, size: int) -> int:
        """What to say of a file of this size."""
        return self._sizes.of(ino, size)

    def sized(self, ino: int, size: int) -> None:
        """The kernel's own call has made the file this long."""
        self._sizes.raise_to(ino, size)

    @property
    def has_entries_to_tell(self) -> bool:
        """Whether the kernel may not know yet of an entry that appeared."""
        return self._appeared_told < self._appeared

    async def entries_told(self) -> None:
        """Wait until the kernel has heard of every entry that appeared, within `PATIENCE`."""
        upto = self._appeared
        if self._appeared_told < upto:
            await self._told(self._workers[:THREADS])
            self._appeared_told = max(self._appeared_told, upto)

    async def told(self) -> None:
        """Wait until the kernel has heard of everything that was sent, within `PATIENCE`."""
        await self._told(self._workers)

    async def told_in(self, directories: Iterable[int]) -> None:
        """Wait until the kernel has heard of everything that was sent of names in these, within `PATIENCE`."""
        if self._workers:
            await self._told([self._workers[place] for place in {ino % THREADS for ino in directories}])

    async def told_of(self, ino: int, directory: int, limit: float) -> None:
        """Wait until the kernel has heard of everything that was sent of the content of `ino`, or of a directory.

        Not from a call that may keep that directory.
        """
        if self._workers:
            workers = [self._workers[THREADS + ino % THREADS], self._workers[directory % THREADS]]
            await self._told(workers, limit)

    async def _told(self, workers: list[_Worker], limit: float = PATIENCE) -> None:
        token = trio.lowlevel.current_trio_token()
        event = trio.Event()
        pending = 0

        def passed() -> None:
            nonlocal pending
            pending -= 1
            if not pending:
                event.set()

        def told() -> None:
            # The daemon may have ended meanwhile.
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(passed)

        pending = sum(worker.behind(_Barrier(told), limit) for worker in workers)
        if pending:
            with trio.move_on_after(limit) as scope:
                await event.wait()
            if scope.cancelled_caught:
                log.info("the kernel is slow to take what it has to forget")

    def stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.join(1)

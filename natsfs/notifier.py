"""Telling the kernel what it must forget.

A notification blocks for as long as a call in that directory does, so it is never sent from a handler: a few threads
do it. What there is to tell of one directory is told in order, one at a time, by whichever thread is free, so a call
that keeps its directory keeps the news of that one and no other; where such calls keep all threads, more are started.
What has waited longest comes first. Notifications of content have threads of their own: each waits for reads of that
file which are under way, and these for the store. What is waiting is coalesced by its key, so the queues cannot grow
beyond the number of names that the kernel knows; it keeps its place, so what a barrier was put behind is told before
it. The threads are daemons: one that is stuck behind a dead mount must not hold up the end of the process.

Where a file has grown the kernel hears of the new size only when it has dropped its pages: it fills what is read up to
the size that it knows with zeros, and that of a read under way ends where the file ended.
"""

from __future__ import annotations

import errno
import heapq
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

import pyfuse3
import trio

from natsfs.catalog.inodes import AttributesChanged, ContentChanged, Effect, EntryChanged

log = logging.getLogger(__name__)

THREADS = 4  # for entries and attributes, and as many for content
THREADS_MOST = 32  # where calls keep those
PATIENCE = 0.1  # seconds; a notification may wait for a call in its directory, and that for the store


@dataclass(eq=False, slots=True)
class _Queue:
    """What the kernel has to hear of one inode, in order: of the names in it and of itself, or of its content."""

    ino: int
    # By name, or None for the inode itself, each with its place among all that was ever queued.
    waiting: OrderedDict[bytes | None, tuple[int, Effect]] = field(default_factory=OrderedDict)
    telling: Effect | None = None
    since: float = 0.0  # when the kernel began to take that

    def __len__(self) -> int:
        return len(self.waiting) + (self.telling is not None)


@dataclass(eq=False, slots=True)
class _Barrier:
    """Passed when everything that it covers has been told."""

    upto: int  # the last place in front of it
    inos: Collection[int] | None  # None for all
    kept: Collection[int]  # not those
    left: int
    passed: Callable[[], None]

    def covers(self, ino: int, place: int) -> bool:
        return place <= self.upto and ino not in self.kept and (self.inos is None or ino in self.inos)


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


class _Threads:
    """Threads that tell; who holds the lock may change everything here."""

    def __init__(self, name: str, sizes: _Sizes) -> None:
        self._name = name
        self._sizes = sizes
        # Those that are not empty, by inode; of them those that wait for a thread, as a heap of places and inodes,
        # and those that have one.
        self._queues: dict[int, _Queue] = {}
        self._ready: list[tuple[int, int]] = []
        self._telling: set[_Queue] = set()
        self._owed = 0  # what is in all queues
        self._place = 0  # the last that was given
        self._barriers: list[_Barrier] = []
        self._stopped = False
        lock = threading.Lock()
        self._work = threading.Condition(lock)  # something is ready
        self._lack = threading.Condition(lock)  # and no thread is free
        self._lacking = False  # who waits for that has been told
        self._threads: list[threading.Thread] = []
        with lock:
            for _ in range(THREADS):
                self._start()
        self._lender = threading.Thread(target=self._lend, name=f"natsfs-{name}-lend", daemon=True)
        self._lender.start()

    def _start(self) -> None:
        """Raises RuntimeError where the system has no more threads."""
        thread = threading.Thread(target=self._run, name=f"natsfs-{self._name}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def add(self, ino: int, key: bytes | None, effect: Effect) -> None:
        with self._work:
            queue = self._queues.get(ino)
            if queue is None:
                queue = self._queues[ino] = _Queue(ino)
                heapq.heappush(self._ready, (self._place + 1, ino))
                self._work.notify()
                self._see_lack()
            known = queue.waiting.get(key)
            if known is None:
                self._place += 1
                self._owed += 1
                queue.waiting[key] = self._place, effect
                return
            place, told = known
            if isinstance(told, EntryChanged) and isinstance(effect, EntryChanged) and not effect.gone:
                effect = told  # a removal that nobody has heard of yet, and then something new: one forgetting does
            queue.waiting[key] = place, effect

    def behind(
        self, passed: Callable[[], None], patience: float, inos: Collection[int] | None = None
    ) -> _Barrier | None:
        """A barrier behind everything that is queued now, of all inodes or of some; None if there is nothing.

        Not behind what the kernel has not taken for longer than `patience` seconds: a call keeps that directory, and
        may itself wait for whoever would wait here. Nor behind anything where that goes for all threads that there
        can be.
        """
        with self._work:
            now = time.monotonic()
            kept = {queue.ino for queue in self._telling if now - queue.since > patience}
            if self._stopped or len(kept) >= THREADS_MOST:
                return None
            if inos is None:
                left = self._owed - sum(len(self._queues[ino]) for ino in kept)
            else:
                left = sum(len(self._queues[ino]) for ino in inos if ino in self._queues and ino not in kept)
            if not left:
                return None
            barrier = _Barrier(self._place, inos, kept, left, passed)
            self._barriers.append(barrier)
            return barrier

    def forget(self, barrier: _Barrier) -> None:
        """Nobody waits at it any more."""
        with self._work:
            if barrier in self._barriers:
                self._barriers.remove(barrier)

    def owes(self, ino: int, name: bytes) -> bool:
        with self._work:
            queue = self._queues.get(ino)
            if queue is None:
                return False
            told = queue.telling
            return name in queue.waiting or (isinstance(told, EntryChanged) and told.name == name)

    def stop(self) -> None:
        with self._work:
            self._stopped = True
            self._queues.clear()
            self._ready.clear()
            self._work.notify_all()
            self._lack.notify_all()

    def join(self, limit: float) -> None:
        """Wait for the threads, for `limit` seconds in all: one may be kept behind a dead mount."""
        until = time.monotonic() + limit
        for thread in [*self._threads, self._lender]:
            thread.join(max(0.0, until - time.monotonic()))

    def _see_lack(self) -> None:
        if self._ready and len(self._telling) == len(self._threads) and not self._lacking:
            self._lacking = True
            self._lack.notify()

    def _lend(self) -> None:
        """Start as many threads again whenever calls have kept all that there are for longer than `PATIENCE`."""
        while True:
            with self._lack:
                while not self._is_kept():
                    if self._stopped:
                        return
                most = min(2 * len(self._threads), THREADS_MOST)
                failure: RuntimeError | None = None
                try:
                    while len(self._threads) < most:
                        self._start()
                except RuntimeError as error:
                    failure = error
                    self._lack.wait(1)
            if failure is None:
                log.info("calls keep what the kernel has to hear of: up to %d threads tell it now", most)
            else:
                log.warning("no more threads to tell the kernel what it has to forget: %s", failure)

    def _is_kept(self) -> bool:
        """Wait; whether more threads are needed now."""
        if self._stopped:
            return False
        if not self._ready or not len(self._telling) == len(self._threads) < THREADS_MOST:
            self._lacking = False
            self._lack.wait()
            return False
        left = max(queue.since for queue in self._telling) + PATIENCE - time.monotonic()
        if left > 0:
            self._lack.wait(left)
        return left <= 0

    def _run(self) -> None:
        with self._work:
            try:
                while not self._stopped:
                    if self._ready:
                        self._tell_next(self._queues[heapq.heappop(self._ready)[1]])
                    elif len(self._threads) > max(THREADS, len(self._telling) + 1):
                        return  # it was lent, and another one is free as well
                    else:
                        self._work.wait()
            finally:
                self._threads.remove(threading.current_thread())

    def _tell_next(self, queue: _Queue) -> None:
        """Tell the first of what is in a queue, without the lock."""
        _, (place, effect) = queue.waiting.popitem(last=False)
        queue.telling, queue.since = effect, time.monotonic()
        self._telling.add(queue)
        self._see_lack()
        self._work.release()
        try:
            self._tell_or_log(effect)
        finally:
            self._work.acquire()
            self._telling.remove(queue)
            queue.telling = None
            if not self._stopped:
                if queue.waiting:
                    first, _ = next(iter(queue.waiting.values()))
                    heapq.heappush(self._ready, (first, queue.ino))
                else:
                    del self._queues[queue.ino]
                self._told(queue.ino, place)

    def _told(self, ino: int, place: int) -> None:
        self._owed -= 1
        for barrier in [one for one in self._barriers if one.covers(ino, place)]:
            barrier.left -= 1
            if not barrier.left:
                self._barriers.remove(barrier)
                barrier.passed()

    def _tell_or_log(self, effect: Effect) -> None:
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
        except Exception:
            log.exception("the kernel was not told %s", effect)

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
        self._sizes = _Sizes()
        self._names: _Threads | None = None
        self._content: _Threads | None = None
        # Entries that have appeared, and how many of them the kernel has heard of.
        self._appeared = self._appeared_told = 0

    def start(self) -> None:
        """From the mount on; before it the kernel knows nothing that it could forget."""
        self._names, self._content = _Threads("names", self._sizes), _Threads("content", self._sizes)

    def send(self, effects: Iterable[Effect]) -> None:
        """Queue what the kernel has to hear; returns at once. An entry of parent 0 is one it never asked about."""
        names, content = self._names, self._content
        if names is None or content is None:
            return
        for effect in effects:
            match effect:
                case EntryChanged(parent, name, gone):
                    if parent:
                        self._appeared += not gone
                        names.add(parent, name, effect)
                case AttributesChanged(ino):
                    names.add(ino, None, effect)
                case ContentChanged(ino):
                    self._sizes.changed(effect)
                    content.add(ino, None, effect)

    def owes(self, parent: int, name: bytes) -> bool:
        """Whether the kernel may still take `name` in the directory `parent` for what it led to before."""
        return self._names is not None and self._names.owes(parent, name)

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
            await self._told([(self._names, None)])
            self._appeared_told = max(self._appeared_told, upto)

    async def told(self) -> None:
        """Wait until the kernel has heard of everything that was sent, within `PATIENCE`."""
        await self._told([(self._names, None), (self._content, None)])

    async def told_in(self, directories: Iterable[int]) -> None:
        """Wait until the kernel has heard of everything that was sent of names in these, within `PATIENCE`."""
        await self._told([(self._names, {*directories})])

    async def told_of(self, ino: int, directory: int, limit: float) -> None:
        """Wait until the kernel has heard of everything that was sent of the content of `ino`, or of a directory.

        Not from a call that may keep that directory.
        """
        await self._told([(self._content, {ino}), (self._names, {directory})], limit)

    async def _told(
        self, wanted: list[tuple[_Threads | None, Collection[int] | None]], limit: float = PATIENCE
    ) -> None:
        token = trio.lowlevel.current_trio_token()
        event = trio.Event()
        barriers: list[tuple[_Threads, _Barrier]] = []
        passes = 0

        def passed() -> None:
            nonlocal passes
            passes += 1
            if passes == len(barriers):
                event.set()

        def told() -> None:
            # The daemon may have ended meanwhile.
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(passed)

        for threads, inos in wanted:
            barrier = None if threads is None else threads.behind(told, limit, inos)
            if threads is not None and barrier is not None:
                barriers.append((threads, barrier))
        if not barriers:
            return
        try:
            with trio.move_on_after(limit) as scope:
                await event.wait()
        finally:
            for threads, barrier in barriers:
                threads.forget(barrier)
        if scope.cancelled_caught:
            log.info("the kernel is slow to take what it has to forget")

    def stop(self) -> None:
        running = [threads for threads in (self._names, self._content) if threads is not None]
        for threads in running:
            threads.stop()
        for threads in running:
            threads.join(1)

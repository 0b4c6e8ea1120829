"""Telling the kernel what it must forget.

A notification blocks for as long as a call in that directory does, so it is never sent from a handler: a few threads
do it, and all notifications of one directory go to the same thread, in order. What is waiting is coalesced by
its key, so the queue cannot grow beyond the number of names that the kernel knows. The threads are daemons:
one that is stuck behind a dead mount must not hold up the end of the process.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable

import pyfuse3

from natsfs.catalog.inodes import AttributesChanged, ContentChanged, Effect, EntryChanged

log = logging.getLogger(__name__)

THREADS = 4


class _Worker:
    def __init__(self, number: int) -> None:
        self._waiting: OrderedDict[tuple[object, ...], Effect] = OrderedDict()
        self._condition = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=f"natsfs-notify-{number}", daemon=True)
        self._thread.start()

    def add(self, key: tuple[object, ...], effect: Effect) -> None:
        with self._condition:
            known = self._waiting.pop(key, None)
            if isinstance(known, EntryChanged) and isinstance(effect, EntryChanged) and not effect.gone:
                effect = known  # a removal that nobody has heard of yet, and then something new: one forgetting does
            self._waiting[key] = effect
            self._condition.notify()

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
                while not self._waiting and not self._stopped:
                    self._condition.wait()
                if self._stopped:
                    return
                _, effect = self._waiting.popitem(last=False)
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

    @staticmethod
    def _tell(effect: Effect) -> None:
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
                pyfuse3.invalidate_inode(ino)


class Notifier:
    def __init__(self) -> None:
        self._workers: list[_Worker] = []

    def start(self) -> None:
        """From the mount on; before it the kernel knows nothing that it could forget."""
        self._workers = [_Worker(number) for number in range(THREADS)]

    def send(self, effects: Iterable[Effect]) -> None:
        """Queue what the kernel has to hear; returns at once. An entry of parent 0 is one it never asked about."""
        for effect in effects if self._workers else ():
            match effect:
                case EntryChanged(parent, name, _):
                    if parent:
                        self._workers[parent % THREADS].add((parent, name), effect)
                case AttributesChanged(ino) | ContentChanged(ino):
                    self._workers[ino % THREADS].add((type(effect), ino), effect)

    def stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.join(1)

"""Digests of what is read, computed beside the event loop.

hashlib lets go of the interpreter's lock for the 70 us that a chunk of 128 KiB takes it. Only the end of a content
asks for an answer. A thread that answered for each chunk was tried and dropped: its answer came many times 70 us later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

import trio

THREAD = "natsfs-digest"
BACKLOG = 8 * 1024 * 1024  # bytes

_Work = tuple["hashlib._Hash", bytes] | Callable[[], None] | None


class Hasher:
    """One thread, in a task of `nursery`. All is called on the event loop."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._work: SimpleQueue[_Work] = SimpleQueue()
        self._given = 0  # bytes, in all
        self._done = 0  # of them; the thread alone writes it
        self._started = False

    def update(self, sha: hashlib._Hash, data: bytes) -> None:
        """Add `data` to `sha` in a moment: behind what was given before, and before `caught_up` returns."""
        if not self._started:
            self._started = True
            self._nursery.start_soon(self._run)
        self._given += len(data)
        self._work.put((sha, data))

    @property
    def is_behind(self) -> bool:
        """Whether so much waits that whoever gives more has to wait, too."""
        return self._given - self._done > BACKLOG

    async def caught_up(self) -> None:
        """Wait until all that was given is in its digest."""
        if self._given == self._done:
            return
        event, token = trio.Event(), trio.lowlevel.current_trio_token()

        def tell() -> None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(event.set)

        self._work.put(tell)
        await event.wait()

    async def _run(self) -> None:
        try:
            await trio.to_thread.run_sync(self._loop, abandon_on_cancel=True, thread_name=THREAD)
        finally:
            self._work.put(None)

    def _loop(self) -> None:
        while (work := self._work.get()) is not None:
            if isinstance(work, tuple):
                sha, data = work
                sha.update(data)
                self._done += len(data)
            else:
                work()

"""Work that may wait for a moment, so that what follows at once is stored with it: chmod, chown and utimensat."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

DELAY = 0.1  # seconds; `tar`, `rsync` and `cp -p` change owner, times and mode one after the other


class Deferred:
    """Each piece of work runs in a task of `nursery`, and reports its own failures."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._waiting = 0
        self._now = trio.Event()
        self._done = trio.Event()

    def later(self, work: Callable[[], Awaitable[None]]) -> None:
        self._waiting += 1
        self._nursery.start_soon(self._run, work)

    async def _run(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            with trio.move_on_after(DELAY):
                await self._now.wait()
            await work()
        finally:
            self._waiting -= 1
            self._done.set()

    async def settle(self) -> None:
        """Everything that waits is done when this returns; as long as the work's own limits allow."""
        while self._waiting:
            self._done = trio.Event()
            self._now.set()
            await self._done.wait()
        self._now = trio.Event()

"""Locks between tasks that cost nothing while nobody holds them.

trio.Lock gives every other task a turn at each acquisition. A commit takes four locks, most of them free, and waits for
the server all the same: those turns were a tenth of the processor time of a small file.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType

import trio


class Lock:
    """A trio.Lock, for `async with` only, that is no checkpoint where it is free. First come, first served."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = trio.Lock()

    def locked(self) -> bool:
        return self._lock.locked()

    async def __aenter__(self) -> None:
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


class SharedLock:
    """Many holders of one kind or one of the other: publishing under a name, and moving a directory's names."""

    def __init__(self) -> None:
        self._holders = 0
        self._door = Lock()
        self._empty = trio.Event()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        async with self._door:
            self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            if not self._holders:
                self._empty.set()

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        async with self._door:
            while self._holders:
                self._empty = trio.Event()
                await self._empty.wait()
            yield

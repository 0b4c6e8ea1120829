"""How pyfuse3's workers take turns at reading the kernel's requests.

pyfuse3 lets a worker read one request and hands the reading over to the next worker before it answers: one more turn of
the loop for every request. Nearly all requests are answered without a wait. So here a worker keeps the reading for as
long as its answers do not wait, and hands it over when one does. It also looks for the next request for a moment before
it goes to sleep: a program that writes in small pieces sends it within some microseconds, and to sleep and to be woken
costs more than the answer.

pyfuse3 takes trio through its attribute ``trio``, which its own asyncio mode replaces, too.
"""

from __future__ import annotations

import select
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from time import perf_counter
from types import TracebackType
from typing import Any, TypeVar

import pyfuse3
import trio

from natsfs.handshake import Handshake

LOOK = 60e-6  # seconds; a process that runs on another core comes back within 20 to 50
MOST_SKIPPED = 63  # waits without a look
# Seconds that requests are answered one after another while other tasks wait. With 2 ms, beside a large copy, stat(2)
# saw news a quarter later; with 0.2 ms small writes lost a sixth of their speed.
TURN = 0.5e-3

R = TypeVar("R")


class Reading:
    """The right to read the next request: one worker has it, those that have nothing to do are parked."""

    def __init__(self) -> None:
        self._free = True
        self._answering = False
        self._lot = trio.lowlevel.ParkingLot()
        self._handshake: Handshake | None = None
        self._poll: select.poll | None = None
        self._turn_ends = 0.0
        self._in_vain = self._skip = 0

    def hand_over(self) -> None:
        """Whoever has read the last request does not come back soon: somebody else is to read."""
        self._turn_ends = 0.0  # what that one waits for must not wait for us
        if self._free and self._lot:
            self._free = False
            self._lot.unpark()

    async def wait_readable(self, fd: int) -> None:
        """Wait for a request. The worker that holds this is going to answer it, and may come back."""
        if self._poll is None:
            await self._open(fd)
        else:
            now = perf_counter()
            if now > self._turn_ends or not self._comes(self._poll.poll, now + LOOK):
                await trio.lowlevel.wait_readable(fd)
                self._turn_ends = perf_counter() + TURN
        self._answering = True

    async def _open(self, fd: int) -> None:
        """The session's first request is FUSE_INIT. libfuse answers it at once: before anybody waits for a second."""
        if self._handshake is not None:
            self._handshake.finish()
            self._poll = select.poll()
            self._poll.register(fd, select.POLLIN)
        await trio.lowlevel.wait_readable(fd)
        if self._handshake is None:
            with suppress(OSError):  # the session meets the same error when it reads
                self._handshake = Handshake(fd)

    def is_over(self) -> bool:
        """Whether the kernel has let go of the mount."""
        return self._poll is not None and any(event & select.POLLERR for _, event in self._poll.poll(0))

    def _comes(self, poll: Callable[[int], object], deadline: float) -> bool:
        """Whether there is a request until then. Not looked for where it was in vain again and again."""
        if self._skip:
            self._skip -= 1
            return False
        while not poll(0):
            if perf_counter() > deadline:
                self._skip = self._in_vain
                self._in_vain = min(2 * self._in_vain + 1, MOST_SKIPPED)
                return False
        self._in_vain = 0
        return True

    # --- the lock that pyfuse3 takes around its wait for a request --------------------------------------------

    async def __aenter__(self) -> None:
        if self._free:
            self._free = False
        else:
            await self._lot.park()  # `hand_over` has taken it for this one
        self._answering = False

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._free = True
        if not self._answering:
            self.hand_over()  # the session ends: the others have to see that


_reading = Reading()
_on_end: Callable[[], None]


class _Lowlevel:
    """trio.lowlevel for pyfuse3."""

    current_task = staticmethod(trio.lowlevel.current_task)
    current_trio_token = staticmethod(trio.lowlevel.current_trio_token)
    notify_closing = staticmethod(trio.lowlevel.notify_closing)

    @staticmethod
    async def wait_readable(fd: int) -> None:
        await _reading.wait_readable(fd)


class _Nursery:
    """A nursery in which a worker that ends does not take the reading with it."""

    def __init__(self) -> None:
        self._manager = trio.open_nursery()
        self._nursery: trio.Nursery

    async def __aenter__(self) -> _Nursery:
        self._nursery = await self._manager.__aenter__()
        return self

    async def __aexit__(self, *about: Any) -> bool | None:
        return await self._manager.__aexit__(*about)

    def start_soon(self, function: Callable[..., Awaitable[object]], *args: object, name: str) -> None:
        async def worker() -> None:
            try:
                await function(*args)
            finally:
                _reading.hand_over()
                if _reading.is_over():
                    _on_end()

        self._nursery.start_soon(worker, name=name)


class _Trio:
    """What pyfuse3 uses of trio."""

    Lock = staticmethod(lambda: _reading)
    ClosedResourceError = trio.ClosedResourceError
    open_nursery = _Nursery
    lowlevel = _Lowlevel
    from_thread = trio.from_thread


async def main(*, idle: int, most: int, on_end: Callable[[], None]) -> None:
    """Answer requests until the session ends, with up to `most` of them at a time; `idle` workers stay.

    What is being answered when the kernel lets go of the mount is waited for; `on_end` is called then, more than once.
    """
    global _reading, _on_end
    _reading, _on_end = Reading(), on_end
    pyfuse3.trio = _Trio  # type: ignore[attr-defined]
    await pyfuse3.main(min_tasks=idle, max_tasks=most)


class answering(Awaitable[R]):
    """Await a handler; at its first wait another worker gets the reading."""

    __slots__ = ("_handler",)

    def __init__(self, handler: Coroutine[Any, Any, R]) -> None:
        self._handler = handler

    def __await__(self) -> Generator[Any, Any, R]:
        handler = self._handler
        try:
            request = handler.send(None)
        except StopIteration as done:
            result: R = done.value
            return result
        _reading.hand_over()
        try:
            while True:
                try:
                    reply = yield request
                except BaseException as error:
                    request = handler.throw(error)
                else:
                    request = handler.send(reply)
        except StopIteration as done:
            result = done.value
            return result

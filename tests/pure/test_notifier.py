"""Who waits until the kernel has heard of entries, where the kernel takes its time."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import pyfuse3
import pytest
import trio

from natsfs.catalog.inodes import EntryChanged, Ino
from natsfs.notifier import PATIENCE, Notifier

Work = Callable[[Notifier], Awaitable[None]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Work], None]:
    """run(work): `work` gets a notifier of a kernel in which a call keeps every directory for a second."""

    def keep(parent: int, name: bytes, gone: int = 0) -> None:
        time.sleep(1)

    monkeypatch.setattr(pyfuse3, "invalidate_entry", keep)

    def run(work: Work) -> None:
        told = Notifier()
        told.start()
        try:
            trio.run(work, told)
        finally:
            told.stop()

    return run


async def waited(told: Notifier) -> float:
    started = trio.current_time()
    await told.entries_told()
    return trio.current_time() - started


def test_two_wait_for_one_entry(run: Callable[[Work], None]) -> None:
    """The watches of two buckets: each waits, although the other one does."""

    async def work(told: Notifier) -> None:
        took: list[float] = []

        async def wait() -> None:
            took.append(await waited(told))

        told.send([EntryChanged(Ino(4), b"new")])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            nursery.start_soon(wait)
        assert min(took) > PATIENCE / 2

    run(work)


def test_who_is_cancelled_has_not_told(run: Callable[[Work], None]) -> None:
    async def work(told: Notifier) -> None:
        told.send([EntryChanged(Ino(4), b"new")])
        with trio.move_on_after(PATIENCE / 10):
            await told.entries_told()
        assert told.has_entries_to_tell
        assert await waited(told) > PATIENCE / 2
        assert not told.has_entries_to_tell

    run(work)


def test_a_call_that_keeps_its_directory_is_waited_for_once(run: Callable[[Work], None]) -> None:
    """It may itself wait for news, which would come one by one."""

    async def work(told: Notifier) -> None:
        took = []
        for number in range(4):
            told.send([EntryChanged(Ino(4), b"%d" % number)])
            took.append(await waited(told))
        assert took[0] > PATIENCE / 2
        assert sum(took[2:]) < PATIENCE

    run(work)

"""Who waits until the kernel has heard of entries, where the kernel takes its time."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable

import pyfuse3
import pytest
import trio

from natsfs.catalog.inodes import EntryChanged, Ino
from natsfs.notifier import PATIENCE, THREADS, THREADS_MOST, Notifier

Work = Callable[[Notifier], Awaitable[None]]


def with_notifier(work: Work) -> None:
    told = Notifier()
    told.start()
    try:
        trio.run(work, told)
    finally:
        told.stop()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Work], None]:
    """run(work): `work` gets a notifier of a kernel in which a call keeps every directory for a second."""

    def keep(parent: int, name: bytes, gone: int = 0) -> None:
        time.sleep(1)

    monkeypatch.setattr(pyfuse3, "invalidate_entry", keep)

    return with_notifier


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


class Kernel:
    """In it calls keep directories until they are let go."""

    def __init__(self) -> None:
        self.told: defaultdict[int, list[bytes]] = defaultdict(list)
        self.asked: list[int] = []
        self.takes = 0.0  # seconds
        self._kept: dict[int, threading.Event] = {}

    def invalidate_entry(self, parent: int, name: bytes, gone: int = 0) -> None:
        self.asked.append(parent)
        time.sleep(self.takes)
        if parent in self._kept:
            self._kept[parent].wait(10)
        self.told[parent].append(name)

    def keep(self, *parents: int) -> None:
        self._kept.update((parent, threading.Event()) for parent in parents)

    def let_go(self, *parents: int) -> None:
        for parent in parents:
            self._kept.pop(parent).set()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(pyfuse3, "invalidate_entry", kernel.invalidate_entry)
    return kernel


async def until(true: Callable[[], bool], limit: float = 10) -> None:
    with trio.fail_after(limit):
        while not true():  # noqa: ASYNC110 - the kernel has no event for tests
            await trio.sleep(0.001)


def telling() -> int:
    return sum(thread.name == "natsfs-names" for thread in threading.enumerate())


def news(told: Notifier, parent: int, *names: bytes) -> None:
    told.send(EntryChanged(Ino(parent), name) for name in names)


def test_directories_that_calls_keep_do_not_delay_the_news_of_others(kernel: Kernel) -> None:
    """Also where there are more of them than threads."""

    async def work(told: Notifier) -> None:
        kept, free = range(1, 3 * THREADS), range(100, 120)
        kernel.keep(*kept)
        for parent in [*kept, *free]:
            news(told, parent, b"a", b"b")
        await until(lambda: all(len(kernel.told[parent]) == 2 for parent in free), 10 * THREADS * PATIENCE)
        started = trio.current_time()
        for parent in free:
            news(told, parent, b"c")
            await told.told_in([parent])
            assert kernel.told[parent] == [b"a", b"b", b"c"]
        assert trio.current_time() - started < PATIENCE
        assert not any(kernel.told[parent] for parent in kept)
        kernel.let_go(*kept)
        await until(lambda: all(kernel.told[parent] == [b"a", b"b"] for parent in kept))
        news(told, 100, *(b"%d" % number for number in range(100)))
        await told.told()
        await until(lambda: telling() <= THREADS + 1)  # those that were started for this have ended

    with_notifier(work)


def test_what_waits_for_a_directory_is_behind_its_own_news_only(kernel: Kernel) -> None:
    async def work(told: Notifier) -> None:
        kernel.keep(1)
        news(told, 1, b"a")
        await until(lambda: kernel.asked == [1])
        news(told, 5, b"b")
        started = trio.current_time()
        await told.told_in([5, 6])
        assert kernel.told[5] == [b"b"]
        assert trio.current_time() - started < PATIENCE / 2
        await told.told_in([1, 5])
        assert trio.current_time() - started > PATIENCE / 2
        assert told.owes(1, b"a")
        assert not told.owes(1, b"b")
        kernel.let_go(1)
        await until(lambda: not told.owes(1, b"a"))

    with_notifier(work)


def test_where_nothing_can_be_told_nobody_waits_for_long(kernel: Kernel) -> None:
    """The watch waits behind what appeared, for each removal."""

    async def work(told: Notifier) -> None:
        kept = range(1, THREADS_MOST + 10)
        kernel.keep(*kept)
        for parent in kept:
            news(told, parent, b"a")
        started = trio.current_time()
        for _ in range(50):
            news(told, 1000, b"b")
            await told.entries_told()
        assert trio.current_time() - started < 10 * PATIENCE
        kernel.let_go(*kept)
        await until(lambda: all(kernel.told[parent] == [b"a"] for parent in kept))

    with_notifier(work)


def test_what_waits_longest_is_told_first(kernel: Kernel) -> None:
    async def work(told: Notifier) -> None:
        busy = range(1, THREADS + 1)
        kernel.keep(*busy)
        kernel.takes = 0.002
        for parent in busy:
            news(told, parent, b"a")
        news(told, 99, *(b"%d" % number for number in range(5)))
        for number in range(1000, 1100):
            news(told, number, b"b")
        await until(lambda: len(kernel.asked) == THREADS + 105)
        # Not in turn with the other directories.
        assert max(place for place, parent in enumerate(kernel.asked) if parent == 99) < 100
        kernel.let_go(*busy)

    with_notifier(work)


def test_an_error_that_nobody_foresaw_ends_no_thread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[bytes] = []

    def fail(parent: int, name: bytes, gone: int = 0) -> None:
        asked.append(name)
        raise ValueError(name)

    monkeypatch.setattr(pyfuse3, "invalidate_entry", fail)

    async def work(told: Notifier) -> None:
        for number in range(3 * THREADS):
            news(told, 1, b"%d" % number)
            await told.told_in([1])
        assert len(asked) == 3 * THREADS
        assert telling() == THREADS

    with_notifier(work)
    assert "was not told" in caplog.text


def test_everything_is_told_in_the_order_of_its_directory(kernel: Kernel) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)

    async def work(told: Notifier) -> None:
        sent: defaultdict[int, list[bytes]] = defaultdict(list)
        for number in range(2000):
            parent = chance.randrange(1, 30)
            sent[parent].append(b"%d" % number)
            news(told, parent, sent[parent][-1])
            if not chance.randrange(20):
                some = chance.sample(range(1, 30), 5)
                await told.told_in(some)
                assert all(kernel.told[one] == sent[one] for one in some), seed
            if not chance.randrange(200):
                await told.told()
                assert kernel.told == sent, seed
        await told.told()
        assert kernel.told == sent, seed

    with_notifier(work)

"""trio and asyncio side by side: results, errors and cancellation cross in both directions."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.lowlevel

from natsfs.errors import Unreachable
from natsfs.store.bridge import Bridge


def with_bridge(work: Callable[[Bridge], Awaitable[None]]) -> None:
    async def main() -> None:
        bridge = Bridge()
        bridge.start()
        try:
            with trio.fail_after(20):
                await work(bridge)
        finally:
            await bridge.stop()
        assert not [thread for thread in threading.enumerate() if thread.name == "natsfs-store"]

    trio.run(main)


def test_values_and_errors_come_back() -> None:
    async def double(value: int) -> int:
        await asyncio.sleep(0.001)
        return value * 2

    async def fail() -> None:
        await asyncio.sleep(0)
        raise KeyError("gone")

    async def work(bridge: Bridge) -> None:
        assert await bridge.call(double, 21) == 42
        with pytest.raises(KeyError, match="gone"):
            await bridge.call(fail)
        assert await bridge.call(double, 1) == 2

    with_bridge(work)


def test_cancelling_the_caller_ends_the_task_before_the_caller_goes_on() -> None:
    ended: list[str] = []

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            ended.append("task")

    async def work(bridge: Bridge) -> None:
        for _ in range(20):
            with trio.move_on_after(0.01) as scope:
                await bridge.call(slow)
            assert scope.cancelled_caught
            assert ended.pop() == "task"
        assert not bridge._tasks

    with_bridge(work)


def test_cancelling_before_the_task_has_begun() -> None:
    async def slow() -> None:
        await asyncio.sleep(60)

    async def work(bridge: Bridge) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await bridge.call(slow)
        assert scope.cancelled_caught
        assert not bridge._tasks

    with_bridge(work)


def test_a_result_that_was_there_before_the_cancellation_is_not_lost() -> None:
    """What was published was published: the caller must hear of it."""
    done = threading.Event()

    async def stubborn() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            done.set()
        return "published"

    async def work(bridge: Bridge) -> None:
        with trio.move_on_after(0.05) as scope:
            assert await bridge.call(stubborn) == "published"
        assert not scope.cancelled_caught
        assert done.is_set()

    with_bridge(work)


def test_a_task_cancelled_on_its_own_side_is_an_ordinary_error() -> None:
    """asyncio's CancelledError is no Exception; in a trio task it would take the whole daemon along."""

    async def cancelled() -> None:
        raise asyncio.CancelledError

    async def work(bridge: Bridge) -> None:
        with pytest.raises(Unreachable):
            await bridge.call(cancelled)

    with_bridge(work)


def test_stopping_ends_calls_that_are_under_way() -> None:
    heard: list[type[BaseException]] = []

    async def main() -> None:
        bridge = Bridge()
        bridge.start()

        async def caller() -> None:
            try:
                await bridge.call(asyncio.sleep, 60)
            except Exception as error:
                heard.append(type(error))

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(caller)
                await trio.sleep(0.05)
                await bridge.stop()
            with pytest.raises(Unreachable):
                await bridge.call(asyncio.sleep, 0)

    trio.run(main)
    assert heard == [Unreachable]


def test_bursts_in_both_directions_keep_their_order() -> None:
    async def work(bridge: Bridge) -> None:
        sent: list[int] = []
        posted: list[int] = []
        all_posted = trio.Event()

        def post(number: int) -> None:
            sent.append(number)
            bridge.post(lambda: posted.append(number))
            if number == 19_999:
                bridge.post(all_posted.set)

        for number in range(20_000):
            bridge.send(lambda number=number: post(number))  # type: ignore[misc]
            if number % 1000 == 0:
                await trio.lowlevel.checkpoint()
        await all_posted.wait()
        assert sent == posted == list(range(20_000))

    with_bridge(work)


def test_many_calls_at_once() -> None:
    results: list[int] = []

    async def echo(value: int) -> int:
        await asyncio.sleep(value % 7 / 1000)
        return value

    async def work(bridge: Bridge) -> None:
        async def one(value: int) -> None:
            results.append(await bridge.call(echo, value))
            gc.collect(0)

        async with trio.open_nursery() as nursery:
            for value in range(2000):
                nursery.start_soon(one, value)
        assert sorted(results) == list(range(2000))
        assert not bridge._tasks

    with_bridge(work)

"""The one place where trio and asyncio meet.

pyfuse3 runs on trio, nats-py on asyncio; the asyncio loop runs in a thread of its own. A call from trio becomes a
task there. Cancelling the trio side cancels the task and waits until it has ended, so nothing is left behind. Both
directions hand over in batches: a burst of calls or events wakes the other loop once.

Ownership: `_calls` and `_posts` are deques, whose append and popleft are atomic under the GIL; each side only
appends to one and only pops from the other. Every task is held in `_tasks`: asyncio itself keeps weak references
only.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import outcome
import trio
import uvloop

from natsfs.errors import Unreachable

T = TypeVar("T")


class Bridge:
    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="natsfs-store", daemon=True)
        self._calls: deque[Callable[[], object]] = deque()
        self._calls_wake = False
        self._posts: deque[Callable[[], object]] = deque()
        self._posts_wake = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._token: trio.lowlevel.TrioToken | None = None
        self._stopped = False

    def start(self) -> None:
        """To be called from trio; events are delivered to the running trio loop."""
        self._token = trio.lowlevel.current_trio_token()
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    async def stop(self) -> None:
        """End the thread. Calls must have returned before; tasks still held are cancelled and awaited."""

        async def finish() -> None:
            tasks = self.others()
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=5)

        with trio.CancelScope(shield=True):
            await self.call(finish)
            self._stopped = True
            self.loop.call_soon_threadsafe(self.loop.stop)
            await trio.to_thread.run_sync(self._thread.join, 10)

    # --- trio to asyncio --------------------------------------------------------------------------------------

    def _submit(self, function: Callable[[], object]) -> None:
        self._calls.append(function)
        if not self._calls_wake:
            self._calls_wake = True
            self.loop.call_soon_threadsafe(self._drain_calls)

    def _drain_calls(self) -> None:
        # The flag goes down first: a call that is appended after the last popleft wakes the loop again.
        self._calls_wake = False
        while self._calls:
            self._calls.popleft()()

    def own(self, coroutine: Coroutine[Any, Any, T], name: str | None = None) -> asyncio.Task[T]:
        """On the asyncio side: a task that cannot vanish, and that ends with the bridge at the latest."""
        task = self.loop.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def others(self) -> list[asyncio.Task[Any]]:
        """On the asyncio side: every task that has not ended, but the one that asks."""
        own = asyncio.current_task()
        return [task for task in self._tasks if task is not own]

    async def call(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run `function(*args)` on the asyncio side and wait for its result. Cancellable in both directions."""
        trio_task = trio.lowlevel.current_task()
        running: list[asyncio.Task[T]] = []
        cancelled: list[Callable[[], None]] = []

        def done(task: asyncio.Task[T]) -> None:
            if task.cancelled():
                result: outcome.Outcome[T] = outcome.Error(asyncio.CancelledError())
            else:
                error = task.exception()
                result = outcome.Error(error) if error is not None else outcome.Value(task.result())
            self.post(lambda: trio.lowlevel.reschedule(trio_task, outcome.Value(result)))

        def begin() -> None:
            async def run() -> T:
                return await function(*args)

            task = self.own(run())
            running.append(task)
            task.add_done_callback(done)

        def abort(raise_cancel: Callable[[], None]) -> trio.lowlevel.Abort:
            cancelled.append(raise_cancel)
            self._submit(lambda: running[0].cancel())
            return trio.lowlevel.Abort.FAILED

        if self._stopped:
            raise Unreachable("the connection to the NATS server is closed")
        self._submit(begin)
        result: outcome.Outcome[T] = await trio.lowlevel.wait_task_rescheduled(abort)
        if isinstance(result, outcome.Error) and isinstance(result.error, asyncio.CancelledError):
            if cancelled:
                cancelled[0]()
            # The task was cancelled on its own side. trio would take asyncio's exception for a crash.
            raise Unreachable("the connection to the NATS server is being closed")
        return result.unwrap()

    def send(self, function: Callable[[], object]) -> None:
        """Run a plain function on the asyncio side, some time soon."""
        self._submit(function)

    # --- asyncio to trio --------------------------------------------------------------------------------------

    def post(self, function: Callable[[], object]) -> None:
        """On the asyncio side: run a plain function on the trio side, in order of posting."""
        self._posts.append(function)
        if not self._posts_wake:
            self._posts_wake = True
            assert self._token is not None
            # The mount is going down when the trio loop is closed; nobody is left to tell.
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._drain_posts)

    def _drain_posts(self) -> None:
        self._posts_wake = False
        while self._posts:
            self._posts.popleft()()

"""The store under trio, without a mount, against a real server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest
import trio

from natsfs.catalog.metadata import Metadata
from natsfs.config import Config, Credentials
from natsfs.options import Options
from natsfs.store.frames import Message
from natsfs.store.store import Store
from natsfs.store.watch import Event, Hint, Messages, decode_message
from tests.support import Server

T = TypeVar("T")
LIMIT = 60.0


@dataclass
class Events:
    """What the store has told, in order."""

    all: list[Event | Hint] = field(default_factory=list)
    _more: trio.Event = field(default_factory=trio.Event)

    async def take(self, event: Event) -> None:
        self.hint(event)

    def take_now(self, bucket: str, message: Message) -> bool:
        self.hint(Messages(bucket, [message]))
        return True

    def hint(self, hint: Event | Hint) -> None:
        self.all.append(hint)
        self._more.set()

    async def until(
        self, condition: Callable[[Event | Hint], bool], limit: float = 5.0, start: int = 0
    ) -> Event | Hint:
        """The first event from number `start` on for which the condition holds."""
        with trio.fail_after(limit):
            while True:
                for event in self.all[start:]:
                    if condition(event):
                        return event
                    start += 1
                self._more = trio.Event()
                await self._more.wait()

    def metas(self, start: int = 0) -> list[Metadata]:
        return [meta for event in self.all[start:] for meta in metas_of(event)]

    def names(self) -> list[str]:
        return [meta.name for meta in self.metas()]


def metas_of(event: Event | Hint) -> list[Metadata]:
    messages = event.messages if isinstance(event, Messages) else []
    return [meta for message in messages if (meta := decode_message(message)) is not None]


class Stores(Protocol):
    def __call__(
        self,
        work: Callable[[Store, Events], Awaitable[T]],
        *,
        server: Server | None = None,
        credentials: Credentials | None = None,
        **options: Any,
    ) -> T: ...


@pytest.fixture
def with_store(request: pytest.FixtureRequest, tmp_path: Path) -> Stores:
    """with_store(work) runs `await work(store, events)` with an open store, and closes it."""

    def run(
        work: Callable[[Store, Events], Awaitable[T]],
        *,
        server: Server | None = None,
        credentials: Credentials | None = None,
        **options: Any,
    ) -> T:
        used = server or request.getfixturevalue("nats_server")

        async def main() -> T:
            config = Config(
                servers=(used.url,),
                bucket=None,
                prefix="",
                mountpoint="/nowhere",
                display_source="test",
                credentials=credentials or Credentials(),
                options=Options(spool_dir=str(tmp_path), **{"timeout": 20.0} | options),
            )
            events = Events()
            store = Store(config)
            with trio.fail_after(LIMIT):
                async with trio.open_nursery() as nursery:
                    await store.open(nursery, events)
                    try:
                        return await work(store, events)
                    finally:
                        await store.close()
                        nursery.cancel_scope.cancel()

        return trio.run(main)

    return run

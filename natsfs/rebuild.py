"""The bytes of a version in the store that kept content was a change to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from natsfs.catalog.metadata import Metadata
from natsfs.config import Config
from natsfs.errors import NatsfsError
from natsfs.files.manifest import Range, subtract
from natsfs.files.reader import Reader
from natsfs.files.reader import Sequence as Sequential
from natsfs.store.store import Store

STEP = 1024 * 1024  # bytes that are read at a time
CACHE = 16 * 1024 * 1024


def fetch(
    config: Config, base: Metadata, ranges: Sequence[Range], write: Callable[[bytes, int], None]
) -> tuple[tuple[Range, ...], str]:
    """`write` gets bytes and their offset. Returns the ranges that are not to be had, and why.

    Raises what `write` raises.
    """
    got: list[Range] = []
    failed: list[Exception] = []

    async def read(store: Store, nursery: trio.Nursery) -> None:
        reader = Reader(store, CACHE, nursery, None, lambda bucket: None)
        version, sequence = reader.acquire(base), Sequential()
        for start, end in ranges:
            for at in range(start, end, STEP):
                stop = min(at + STEP, end)
                write(await reader.read(version, at, stop, sequence), at)
                got.append((at, stop))

    async def work() -> None:
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as nursery:
                try:
                    store = Store(config)
                    await store.open(connections)
                    await read(store, nursery)
                except (NatsfsError, OSError) as error:
                    failed.append(error)
                nursery.cancel_scope.cancel()
            connections.cancel_scope.cancel()

    try:
        trio.run(work)
    except BaseExceptionGroup as group:
        if group.subgroup(KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    if failed and isinstance(failed[0], OSError):
        raise failed[0]
    return subtract(ranges, got), str(failed[0]) if failed else ""

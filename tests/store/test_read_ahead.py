"""Reading ahead of sequential readers, against a real server, without a kernel that reads ahead as well."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio

from natsfs.catalog.metadata import Metadata
from natsfs.files.reader import LAST_WINDOW, RUN, Reader, Sequence
from natsfs.names import encode_subject
from natsfs.store.fetch import BUDGET
from natsfs.store.store import Store
from tests.store.conftest import Events, Stores
from tests.support import CHUNK, Client, Server, noise

STEP = CHUNK  # bytes of one read; few enough for the connection of the metadata
SIZE = 24 * 1024 * 1024
CACHE = 64 * 1024 * 1024

Work = Callable[[Store, Reader, Metadata], Awaitable[None]]


@pytest.fixture
def with_reader(with_store: Stores, bucket: str, client: Client) -> Callable[[Work], None]:
    """with_reader(work): `work` gets a reader, and an object of `SIZE` bytes."""
    client.put(bucket, "o", noise(SIZE, 5))

    def run(work: Work) -> None:
        async def main(store: Store, events: Events) -> None:
            meta = await store.metadata(bucket, f"$O.{bucket}.M.{encode_subject('o')}")
            assert meta is not None
            async with trio.open_nursery() as nursery:
                reader = Reader(store, CACHE, nursery, None, lambda bucket: None)
                await work(store, reader, meta)
                nursery.cancel_scope.cancel()

        with_store(main)

    return run


async def read_on(reader: Reader, meta: Metadata, sequence: Sequence, count: int) -> None:
    version = reader.acquire(meta)
    for _ in range(count):
        assert len(await reader.read(version, sequence.next, sequence.next + STEP, sequence)) == STEP
    reader.release(version)


def test_what_is_read_in_order_is_asked_for_in_few_requests(
    with_reader: Callable[[Work], None], nats_server: Server
) -> None:
    async def work(store: Store, reader: Reader, meta: Metadata) -> None:
        before = nats_server.received()
        await read_on(reader, meta, Sequence(), SIZE // STEP)
        assert nats_server.received() - before < 2 * SIZE // RUN

    with_reader(work)


def test_a_seek_takes_back_what_was_not_asked_for_yet(
    with_reader: Callable[[Work], None], nats_server: Server
) -> None:
    async def work(store: Store, reader: Reader, meta: Metadata) -> None:
        sequence = Sequence()
        async with store._fetcher._budget.take(BUDGET):
            # Others have all that may be on its way.
            await read_on(reader, meta, sequence, 1)
            assert sequence.ahead > sequence.next
            await trio.sleep(0.1)
            before = nats_server.chunk_requests()
            version = reader.acquire(meta)
            await reader.read(version, SIZE // 2, SIZE // 2 + STEP, sequence)
            reader.release(version)
        await trio.sleep(0.3)
        assert nats_server.chunk_requests() == before
        await read_on(reader, meta, sequence, 20)
        assert nats_server.chunk_requests() > before

    with_reader(work)


def test_a_reader_that_waits_for_what_is_taken_back_asks_for_itself(
    with_reader: Callable[[Work], None],
) -> None:
    async def work(store: Store, reader: Reader, meta: Metadata) -> None:
        first = Sequence()
        async with store._fetcher._budget.take(BUDGET):
            await read_on(reader, meta, first, 1)
            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(read_on, reader, meta, Sequence(next=first.next), 1)
                    await trio.sleep(0.1)
                    reader.turned(first)

    with_reader(work)


def test_many_readers_share_what_is_read_ahead(with_reader: Callable[[Work], None]) -> None:
    async def work(store: Store, reader: Reader, meta: Metadata) -> None:
        several = [Sequence(next=number * RUN) for number in range(16)]
        async with trio.open_nursery() as nursery:
            for sequence in several:
                nursery.start_soon(read_on, reader, meta, sequence, 60)
        assert sum(sequence.ahead - sequence.next for sequence in several) <= 2 * LAST_WINDOW + 16 * RUN
        for sequence in several:
            reader.turned(sequence)
        alone = Sequence()
        await read_on(reader, meta, alone, 100)
        assert alone.ahead - alone.next > LAST_WINDOW // 2

    with_reader(work)

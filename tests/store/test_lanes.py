"""Which reads wait behind an upload, and which do not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio

from natsfs.store.lanes import QUICK_ROOM
from natsfs.store.segments import Spooled
from natsfs.store.store import Store
from tests.coherence.proxy import Proxy
from tests.store.conftest import Events, Stores
from tests.store.test_fetch import open_object, read
from tests.support import CHUNK, Client, Server, noise

SIZE = 20 * CHUNK


@pytest.fixture
def proxied(nats_server: Server) -> Iterator[tuple[Server, Proxy]]:
    """The server behind a proxy."""
    proxy = Proxy(nats_server.port)
    server = Server()
    server.port = proxy.port
    yield server, proxy
    proxy.close()


def test_a_small_read_does_not_wait_behind_an_upload(
    with_store: Stores, bucket: str, client: Client, proxied: tuple[Server, Proxy]
) -> None:
    """Of a connection on which the first chunk of an upload gets no further nothing else does."""
    server, proxy = proxied
    large, small = noise(SIZE, 1), noise(5000, 2)
    client.put(bucket, "large", large)
    client.put(bucket, "small", small)
    written = noise(SIZE, 3)

    async def work(store: Store, events: Events) -> None:
        meta, layout, _ = await open_object(store, bucket, "large")
        whole: list[bytes] = []
        upload = store.new_upload(bucket)

        async def write() -> None:
            await upload.append([Spooled(0, SIZE)], lambda start, end: written[start:end])
            await upload.finish()

        async def read_whole() -> None:
            whole.append(await read(store, meta, layout, 0, SIZE))

        with proxy.holding(f"PUB $O.{bucket}.C.".encode()) as hold:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                assert await trio.to_thread.run_sync(hold.holds.wait, 10)
                nursery.start_soon(read_whole)
                for start in range(0, SIZE - CHUNK, CHUNK):
                    two = await read(store, meta, layout, start, start + 2 * CHUNK)
                    assert two == large[start : start + 2 * CHUNK]
                found, _, chunks = await open_object(store, bucket, "small")
                assert chunks == [small]
                assert (await store.single([found]))[found.nuid][1] == small
                _, _, none = await open_object(store, bucket, "large")
                assert none == []
                assert not whole, "the large read has taken the connection of the metadata"
                assert not upload.stored
                hold.release()
        assert whole == [large]
        assert upload.stored == SIZE

    with_store(work, server=server)


def test_many_small_reads_take_both_connections(
    with_store: Stores, bucket: str, client: Client, proxied: tuple[Server, Proxy]
) -> None:
    """More of them than the connection of the metadata is to carry: the others do not wait for it."""
    server, proxy = proxied
    data = noise(SIZE, 4)
    client.put(bucket, "o", data)

    async def work(store: Store, events: Events) -> None:
        meta, layout, _ = await open_object(store, bucket, "o")
        read_of: set[int] = set()
        enough = trio.Event()

        async def one(start: int) -> None:
            assert await read(store, meta, layout, start, start + 10) == data[start : start + 10]
            read_of.add(start)
            if len(read_of) == (SIZE - QUICK_ROOM) // CHUNK:
                enough.set()

        async with trio.open_nursery() as nursery:
            with proxy.holding(b"DIRECT.GET") as hold:
                nursery.start_soon(one, 0)
                assert await trio.to_thread.run_sync(hold.holds.wait, 10)
                for start in range(CHUNK, SIZE, CHUNK):
                    nursery.start_soon(one, start)
                with trio.fail_after(10):
                    await enough.wait()
                assert 0 not in read_of
        assert len(read_of) == SIZE // CHUNK

    with_store(work, server=server)

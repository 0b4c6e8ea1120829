"""Reading ranges of objects of every layout, and what happens when chunks are not where they were."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import trio

from natsfs.catalog.metadata import Metadata
from natsfs.errors import ChunksGone, StoreError
from natsfs.names import encode_subject
from natsfs.store.layout import Layout
from natsfs.store.store import Store
from tests.store.conftest import Events, Stores
from tests.support import Client, noise, split

SMALL = 1000  # bytes in a chunk, so that a little data makes many of them


async def open_object(store: Store, bucket: str, name: str) -> tuple[Metadata, Layout, list[bytes]]:
    meta = await store.metadata(bucket, f"$O.{bucket}.M.{encode_subject(name)}")
    assert meta is not None
    return (meta, *await store.layout(meta))


async def read(store: Store, meta: Metadata, layout: Layout, start: int, end: int) -> bytes:
    first, last = layout.index(start), layout.index(end - 1)
    chunks = await store.chunks(meta.bucket, meta.nuid, layout, first, last - first + 1)
    skip = start - layout.start(first)
    return b"".join(chunks)[skip : skip + end - start]


async def check_ranges(store: Store, bucket: str, name: str, data: bytes, rounds: int = 60) -> Layout:
    """Random ranges, each compared."""
    meta, layout, chunks = await open_object(store, bucket, name)
    if chunks:
        assert b"".join(chunks) == data
    dice = random.Random(len(data))
    if data:
        for _ in range(rounds):
            start = dice.randrange(len(data))
            end = min(len(data), start + dice.choice([1, 10, SMALL, 5 * SMALL, 40 * SMALL]))
            assert await read(store, meta, layout, start, end) == data[start:end]
        assert await read(store, meta, layout, len(data) - 1, len(data)) == data[-1:]
        assert await read(store, meta, layout, 0, len(data)) == data
    return layout


def put(client: Client, bucket: str, name: str, chunks: list[bytes], **more: Any) -> None:
    client.put(bucket, name, chunks, {"options": {"max_chunk_size": SMALL}} | more)


def put_as_dotnet(client: Client, bucket: str, name: str, data: bytes) -> None:
    """With an empty chunk behind full ones, which is not counted, and without what is zero."""
    full = split(data, SMALL)
    more: dict[str, Any] = {"options": {"max_chunk_size": SMALL}, "chunks": len(full)}
    client.put(bucket, name, [*full, b""], more)


def put_scattered(client: Client, bucket: str, contents: dict[str, bytes]) -> None:
    """All objects at the same time, chunk by chunk, as many writers leave them."""

    async def writer(name: str, data: bytes) -> None:
        nuid = f"{name}scattered000000000000"[:22]
        for chunk in split(data, SMALL):
            await client.js.publish(f"$O.{bucket}.C.{nuid}", chunk)
            await asyncio.sleep(0)
        meta = {"name": name, "bucket": bucket, "nuid": nuid, "size": len(data), "mtime": ""}
        meta |= {"chunks": -(-len(data) // SMALL), "options": {"max_chunk_size": SMALL}}
        await client._publish_meta(meta)

    async def all_writers() -> None:
        await asyncio.gather(*(writer(name, data) for name, data in contents.items()))

    client.run(all_writers())


@pytest.mark.parametrize("size", [0, 1, SMALL, SMALL + 1, 8 * SMALL, 9 * SMALL, 200 * SMALL + 17])
def test_contiguous(with_store: Stores, bucket: str, client: Client, size: int) -> None:
    data = noise(size, 3)
    put(client, bucket, "o", split(data, SMALL))
    layout = with_store(lambda store, _: check_ranges(store, bucket, "o", data))
    assert layout.first is not None


def test_scattered_among_many_writers(with_store: Stores, bucket: str, client: Client) -> None:
    contents = {f"o{n}": noise((40 + 60 * n) * SMALL + n, n) for n in range(6)}
    put_scattered(client, bucket, contents)

    async def work(store: Store, events: Events) -> None:
        for name, data in contents.items():
            layout = await check_ranges(store, bucket, name, data)
            assert layout.first is None, "the writers did not run at the same time"

    with_store(work)


def test_irregular(with_store: Stores, bucket: str, client: Client) -> None:
    dice = random.Random(4)
    chunks = [noise(dice.choice([1, 7, 300, SMALL]), n) for n in range(300)]
    put(client, bucket, "o", chunks)
    layout = with_store(lambda store, _: check_ranges(store, bucket, "o", b"".join(chunks)))
    assert layout.starts is not None


@pytest.mark.parametrize("chunks", [0, 1, 5, 40])
def test_the_empty_chunk_that_dotnet_adds(
    with_store: Stores, bucket: str, client: Client, chunks: int
) -> None:
    data = noise(chunks * SMALL, 5)
    put_as_dotnet(client, bucket, "o", data)
    with_store(lambda store, _: check_ranges(store, bucket, "o", data))


def test_empty_chunks_in_between(with_store: Stores, bucket: str, client: Client) -> None:
    chunks = [noise(SMALL, n) if n % 3 else b"" for n in range(60)]
    put(client, bucket, "o", chunks)
    with_store(lambda store, _: check_ranges(store, bucket, "o", b"".join(chunks)))


@pytest.mark.parametrize("layout", ["contiguous", "irregular", "scattered"])
def test_without_direct_get_the_leader_is_asked(
    with_store: Stores, bucket: str, client: Client, layout: str
) -> None:
    client.change_bucket(bucket, allow_direct=False)
    data = noise(30 * SMALL + 1, 6)
    if layout == "scattered":
        put_scattered(client, bucket, {"o": data, "p": noise(40 * SMALL, 7)})
    else:
        put(
            client,
            bucket,
            "o",
            split(data, SMALL) if layout == "contiguous" else [data[:10], *split(data[10:], 999)],
        )

    async def work(store: Store, events: Events) -> None:
        with trio.fail_after(10):  # and not after the time limit of a server that is away
            await check_ranges(store, bucket, "o", data, rounds=10)

    with_store(work, timeout=30.0)


@pytest.mark.parametrize("chunks", [3, 50])
def test_a_purged_object_is_gone(with_store: Stores, bucket: str, client: Client, chunks: int) -> None:
    data = noise(chunks * SMALL, 8)
    put(client, bucket, "o", split(data, SMALL))

    async def work(store: Store, events: Events) -> None:
        meta, layout, _ = await open_object(store, bucket, "o")
        client.delete(bucket, "o")
        with pytest.raises(ChunksGone):
            await read(store, meta, layout, 0, len(data))
        with pytest.raises(ChunksGone):
            await store.layout(meta)

    with_store(work)


@pytest.mark.parametrize(("scattered", "gone"), [(False, 0), (False, 7), (True, 0)])
def test_later_chunks_are_never_taken_for_one_that_is_gone(
    with_store: Stores, bucket: str, client: Client, scattered: bool, gone: int
) -> None:
    """A limit on age removes chunks one by one, from the start; they all have the same length.

    (Of scattered chunks one in the middle that somebody removed by hand is found out only by the digest.)
    """
    data = noise(40 * SMALL, 9)
    if scattered:
        put_scattered(client, bucket, {"o": data, "p": noise(60 * SMALL, 10)})
    else:
        put(client, bucket, "o", split(data, SMALL))

    async def work(store: Store, events: Events) -> None:
        meta, layout, _ = await open_object(store, bucket, "o")
        subject = f"$O.{bucket}.C.{meta.nuid}"
        seq = 0
        for _ in range(gone + 1):
            message = client.api(f"STREAM.MSG.GET.OBJ_{bucket}", {"seq": seq + 1, "next_by_subj": subject})[
                "message"
            ]
            seq = message["seq"]
        client.api(f"STREAM.MSG.DELETE.OBJ_{bucket}", {"seq": seq})
        for first in range(40):
            for count in (1, 3):
                start, end = first * SMALL, min(40, first + count) * SMALL
                try:
                    found = await read(store, meta, layout, start, end)
                except (ChunksGone, StoreError):
                    assert start <= gone * SMALL or scattered, f"chunk {first} is there"
                else:
                    assert found == data[start:end], f"chunk {first}: the bytes of another one"

    with_store(work)


def test_many_readers_at_once_within_the_budget(with_store: Stores, bucket: str, client: Client) -> None:
    """More is asked for than may be outstanding on a connection; the server would close it."""
    data = noise(24 * 1024 * 1024, 11)
    client.put(bucket, "o", data)

    async def work(store: Store, events: Events) -> None:
        meta, layout, _ = await open_object(store, bucket, "o")
        generation = store._bulk.generation

        async def whole() -> None:
            for first in range(0, layout.count, 64):
                chunks = await store.chunks(bucket, meta.nuid, layout, first, 64)
                start = layout.start(first)
                assert b"".join(chunks) == data[start : start + 64 * layout.chunk_size]

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(whole)
        assert store._bulk.generation == generation, "the connection was closed"

    with_store(work)


def test_a_cancelled_read_leaves_room_for_others(with_store: Stores, bucket: str, client: Client) -> None:
    data = noise(16 * 1024 * 1024, 12)
    client.put(bucket, "o", data)

    async def work(store: Store, events: Events) -> None:
        meta, layout, _ = await open_object(store, bucket, "o")
        for wait in (0.0, 0.001, 0.005, 0.01):
            async with trio.open_nursery() as nursery:
                for first in range(0, layout.count, 16):
                    nursery.start_soon(store.chunks, bucket, meta.nuid, layout, first, 16)
                await trio.sleep(wait)
                nursery.cancel_scope.cancel()
        with trio.fail_after(10):
            for first in range(0, layout.count, 32):
                await store.chunks(bucket, meta.nuid, layout, first, 32)
        assert not store._bulk._waiters

    with_store(work)

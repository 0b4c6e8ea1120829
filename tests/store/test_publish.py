"""Metadata by compare-and-swap, and chunks, as they arrive at a real server."""

from __future__ import annotations

import base64
import hashlib
import os
import signal

import pytest
import trio

from natsfs.catalog.metadata import Metadata, new_nuid, tombstone
from natsfs.errors import BucketFull, BucketGone, ChunksGone, Conflict, StoreError, TooLarge, Unreachable
from natsfs.names import encode_subject
from natsfs.store.layout import uniform
from natsfs.store.publish import WINDOW, Known, Uploaded, small
from natsfs.store.segments import Kept, Spooled, Zeros
from natsfs.store.store import Store
from tests.store.conftest import Events, Stores
from tests.support import CHUNK, Client, Server, noise


def metadata(bucket: str, name: str, uploaded: Uploaded | None = None) -> Metadata:
    meta = Metadata(
        name=name, bucket=bucket, nuid=new_nuid(), subject=f"$O.{bucket}.M.{encode_subject(name)}"
    )
    if uploaded is None:
        return meta
    return Metadata(
        name=name,
        bucket=bucket,
        nuid=uploaded.nuid,
        size=uploaded.size,
        chunks=uploaded.chunks,
        chunk_size=uploaded.chunk_size,
        digest=uploaded.digest,
        subject=meta.subject,
    )


class Content(bytearray):
    """In place of a spool file."""

    def read(self, start: int, end: int) -> bytes:
        return bytes(self[start:end])


@pytest.fixture
def spool() -> Content:
    return Content()


async def store_object(
    store: Store, bucket: str, name: str, data: bytes, spool: Content, piece: int = 0
) -> Metadata:
    spool[:] = data
    upload = store.new_upload(bucket)
    for start in range(0, len(data), piece or max(1, len(data))):
        await upload.append([Spooled(start, min(len(data), start + (piece or len(data))))], spool.read)
    meta = metadata(bucket, name, await upload.finish())
    await store.publish(meta, Known(0), store.new_op())
    return meta


# --- metadata -----------------------------------------------------------------------------------------------------


def test_publish_with_compare_and_swap(with_store: Stores, bucket: str, client: Client) -> None:
    async def work(store: Store, events: Events) -> None:
        first = await store.publish(metadata(bucket, "o"), Known(0), store.new_op())
        with pytest.raises(Conflict) as refused:
            await store.publish(metadata(bucket, "o"), Known(0), store.new_op())
        assert refused.value.seq == first
        with pytest.raises(Conflict):
            await store.publish(metadata(bucket, "o"), Known(first + 1), store.new_op())
        second = await store.publish(metadata(bucket, "o"), Known(first), store.new_op())
        grave = await store.publish(tombstone(metadata(bucket, "o")), Known(second), store.new_op())
        with pytest.raises(Conflict):
            await store.publish(metadata(bucket, "o"), Known(0), store.new_op())
        op = store.new_op()
        last = await store.publish(metadata(bucket, "o"), Known(grave), op)
        read = await store.metadata(bucket, f"$O.{bucket}.M.{encode_subject('o')}")
        assert read is not None
        assert (read.name, read.seq, read.op) == ("o", last, op)
        assert await store.metadata(bucket, f"$O.{bucket}.M.{encode_subject('other')}") is None

    with_store(work)
    assert client.subjects(bucket, "M") == {f"$O.{bucket}.M.{encode_subject('o')}": 1}, (
        "the rollup left one message"
    )


def test_a_bucket_that_does_not_exist(with_store: Stores) -> None:
    async def work(store: Store, events: Events) -> None:
        with pytest.raises(BucketGone):
            await store.bucket("nosuch")
        with pytest.raises(BucketGone):
            await store.metadata("nosuch", "$O.nosuch.M.bw==")

    with_store(work)


def test_metadata_that_is_too_large(with_store: Stores, bucket: str) -> None:
    async def work(store: Store, events: Events) -> None:
        big = Metadata(
            name="o",
            bucket=bucket,
            nuid=new_nuid(),
            attributes={"k": "v" * 1_100_000},
            subject=f"$O.{bucket}.M.bw==",
        )
        with pytest.raises(TooLarge):
            await store.publish(big, Known(0), store.new_op())
        await store.publish(metadata(bucket, "o"), Known(0), store.new_op())  # the connection stands

    with_store(work)


@pytest.mark.parametrize("watched", [False, True])
def test_lost_acknowledgements_are_settled(fresh_server: Server, with_store: Stores, watched: bool) -> None:
    """The server is killed again and again while one name is written; every answer has to be true."""
    client = fresh_server.client
    client.create_bucket("b")

    async def work(store: Store, events: Events) -> tuple[int, str]:
        if watched:
            await store.watch("b")
        stop = False
        expected, last, count = 0, "", 0

        async def disturb() -> None:
            nonlocal stop
            for _ in range(4):
                await trio.sleep(0.3)
                await trio.to_thread.run_sync(kill)
                await trio.to_thread.run_sync(fresh_server.start)
            await trio.sleep(0.5)
            stop = True

        def kill() -> None:
            os.kill(fresh_server.pid, signal.SIGKILL)
            fresh_server.stop()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(disturb)
            while not stop:
                meta = metadata("b", "o")
                # Nobody else writes: a conflict here would mean that an own message was not recognised.
                expected = await store.publish(meta, Known(expected), store.new_op())
                last = meta.nuid
                count += 1
        assert count > 20
        return expected, last

    seq, nuid = with_store(work, server=fresh_server)
    stored = client.stored("b", "o")
    assert stored["nuid"] == nuid
    assert client.api("STREAM.MSG.GET.OBJ_b", {"last_by_subj": "$O.b.M.bw=="})["message"]["seq"] == seq


def test_without_a_server_there_is_a_limit(fresh_server: Server, with_store: Stores) -> None:
    fresh_server.client.create_bucket("b")

    async def work(store: Store, events: Events) -> None:
        fresh_server.stop()
        with trio.fail_after(6), pytest.raises(Unreachable):
            await store.publish(metadata("b", "o"), Known(0), store.new_op())
        with trio.fail_after(6), pytest.raises(Unreachable):
            await store.metadata("b", "$O.b.M.bw==")

    with_store(work, server=fresh_server, timeout=2.0)


def test_a_server_that_does_not_answer_has_a_limit_too(fresh_server: Server, with_store: Stores) -> None:
    """Stopped in its tracks: the connection stands, and nothing comes."""
    fresh_server.client.create_bucket("b")

    async def work(store: Store, events: Events) -> None:
        fresh_server.pause()
        try:
            with trio.fail_after(10), pytest.raises(Unreachable):
                await store.publish(metadata("b", "o"), Known(0), store.new_op())
        finally:
            fresh_server.resume()
        # It may have been stored all the same, and may still be on its way while what is there is looked at; from the
        # next look on there is nothing left that could come between.
        for last in (False, True):
            found = await store.metadata("b", "$O.b.M.bw==")
            try:
                await store.publish(metadata("b", "o"), Known(found.seq if found else 0), store.new_op())
            except Conflict:
                assert not last
            else:
                break

    with_store(work, server=fresh_server, timeout=2.0)


# --- objects of one chunk -----------------------------------------------------------------------------------------


async def store_small(store: Store, bucket: str, name: str, data: bytes, expected: int = 0) -> Metadata:
    uploaded = small(data, CHUNK)
    meta = metadata(bucket, name, uploaded)
    await store.publish(meta, Known(expected), store.new_op(), uploaded.content)
    return meta


def test_small_objects_side_by_side(with_store: Stores, bucket: str, client: Client) -> None:
    """Where the chunk of one comes between chunk and metadata of another, the metadata follows in a second step."""

    async def work(store: Store, events: Events) -> None:
        async def disturb() -> None:
            upload = store.new_upload(bucket)
            noises = Content(noise(4_000_000))
            for start in range(0, 4_000_000, 200_000):
                await upload.append([Spooled(start, start + 200_000)], noises.read)
            await upload.finish()

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(disturb)
                for number in range(60):
                    nursery.start_soon(store_small, store, bucket, f"o{number}", noise(3000, number))

    with_store(work)
    for number in range(60):
        assert client.read(bucket, f"o{number}") == noise(3000, number)


def test_a_small_object_over_another(with_store: Stores, bucket: str, client: Client) -> None:
    async def work(store: Store, events: Events) -> None:
        await store_small(store, bucket, "o", b"first")
        with pytest.raises(Conflict) as refused:
            await store_small(store, bucket, "o", b"second")
        await store_small(store, bucket, "o", b"third", refused.value.seq)

    with_store(work)
    assert client.read(bucket, "o") == b"third"


def test_a_small_object_in_a_full_bucket(with_store: Stores, client: Client) -> None:
    """Neither its chunk nor its metadata is stored."""
    client.create_bucket("brim", max_bytes=100_000)
    try:

        async def work(store: Store, events: Events) -> None:
            await store_small(store, "brim", "o", noise(60_000))
            with pytest.raises(BucketFull):
                await store_small(store, "brim", "p", noise(60_000))

        with_store(work)
        assert client.names("brim") == {"o"}
        assert len(client.chunks("brim")) == 1
    finally:
        client.delete_bucket("brim")


# --- chunks -------------------------------------------------------------------------------------------------------


def test_an_upload_of_very_many_chunks(
    with_store: Stores, bucket: str, client: Client, spool: Content
) -> None:
    """More pieces than one system call takes."""
    data = noise(3_000_000)
    meta = with_store(lambda store, _: store_object(store, bucket, "o", data, spool), chunk_size=1024)
    assert meta.chunks == -(-len(data) // 1024)
    assert client.read(bucket, "o") == data


@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 8 * CHUNK + 5, WINDOW * 3 + 7])
@pytest.mark.parametrize("piece", [0, 1_000_003])
def test_uploads(
    with_store: Stores, bucket: str, client: Client, spool: Content, size: int, piece: int
) -> None:
    data = noise(size, size)
    meta = with_store(lambda store, _: store_object(store, bucket, "o", data, spool, piece))
    assert meta.chunks == -(-size // CHUNK)
    assert client.chunks(bucket) == {meta.nuid: meta.chunks}
    assert client.read(bucket, "o") == data
    digest = "SHA-256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()
    assert client.stored(bucket, "o")["digest"] == digest


def test_an_upload_of_all_kinds_of_segments(
    with_store: Stores, bucket: str, client: Client, spool: Content
) -> None:
    old = noise(5 * CHUNK + 100, 1)
    client.put(bucket, "old", old)

    async def work(store: Store, events: Events) -> None:
        base = await store.metadata(bucket, f"$O.{bucket}.M.{encode_subject('old')}")
        assert base is not None
        layout, _ = await store.layout(base)
        spool[:] = bytes(CHUNK - 500) + b"n" * 1000
        upload = store.new_upload(bucket)
        await upload.append(
            [
                Kept(0, CHUNK - 500),
                Spooled(CHUNK - 500, CHUNK + 500),
                Kept(CHUNK + 500, 4 * CHUNK + 1),
                Zeros(4 * CHUNK + 1, 7 * CHUNK),
            ],
            spool.read,
            (base, layout),
        )
        await store.publish(metadata(bucket, "new", await upload.finish()), Known(0), store.new_op())

    with_store(work)
    expected = old[: CHUNK - 500] + b"n" * 1000 + old[CHUNK + 500 : 4 * CHUNK + 1]
    assert client.read(bucket, "new") == expected.ljust(7 * CHUNK, b"\0")


def test_an_upload_that_is_given_up_leaves_nothing(
    with_store: Stores, bucket: str, client: Client, spool: Content
) -> None:
    async def work(store: Store, events: Events) -> None:
        spool[:] = noise(3 * CHUNK)
        upload = store.new_upload(bucket)
        await upload.append([Spooled(0, 3 * CHUNK)], spool.read)
        await upload.abort()

    with_store(work)
    assert client.chunks(bucket) == {}


def test_a_base_that_was_purged_fails_the_upload(
    with_store: Stores, bucket: str, client: Client, spool: Content
) -> None:
    client.put(bucket, "old", noise(20 * CHUNK))

    async def work(store: Store, events: Events) -> None:
        base = await store.metadata(bucket, f"$O.{bucket}.M.{encode_subject('old')}")
        assert base is not None
        layout, _ = await store.layout(base)
        client.delete(bucket, "old")
        upload = store.new_upload(bucket)
        with pytest.raises(ChunksGone):
            await upload.append([Kept(0, 20 * CHUNK)], spool.read, (base, layout))
        await upload.abort()

    with_store(work)
    assert client.chunks(bucket) == {}


@pytest.mark.semantics("errors-of-the-store")
def test_a_full_bucket(with_store: Stores, bucket: str, client: Client, spool: Content) -> None:
    client.change_bucket(bucket, max_bytes=1_000_000)

    async def work(store: Store, events: Events) -> None:
        spool[:] = noise(20 * CHUNK)
        upload = store.new_upload(bucket)

        async def whole() -> None:
            await upload.append([Spooled(0, 20 * CHUNK)], spool.read)
            await upload.finish()

        with pytest.raises(BucketFull):
            await whole()
        await upload.abort()

    with_store(work)
    assert client.chunks(bucket) == {}


def test_chunks_that_were_lost_before_the_end_are_noticed(
    fresh_server: Server, with_store: Stores, spool: Content
) -> None:
    """The server goes away while an upload waits for its writer, and has lost some of its chunks when it is back."""
    client = fresh_server.client
    client.create_bucket("b")

    async def work(store: Store, events: Events) -> None:
        spool[:] = noise(4 * CHUNK)
        upload = store.new_upload("b")
        await upload.append([Spooled(0, 2 * CHUNK)], spool.read)
        with trio.fail_after(5):
            while upload.stored < 2 * CHUNK:
                await upload.append([], spool.read)
                await trio.sleep(0.01)
                if await store.prove("b", Uploaded(upload._upload.nuid, 0, 2, CHUNK, "")):
                    break
        fresh_server.stop()
        fresh_server.start()
        (subject,) = client.subjects("b", "C")
        client.api("STREAM.PURGE.OBJ_b", {"filter": subject, "keep": 1})

        async def rest() -> None:
            await upload.append([Spooled(2 * CHUNK, 4 * CHUNK)], spool.read)
            await upload.finish()

        with pytest.raises(Unreachable):
            await rest()

    with_store(work, server=fresh_server)


def test_a_purge_takes_no_wildcard(with_store: Stores, bucket: str, client: Client) -> None:
    """A nuid is what other clients wrote."""
    client.put(bucket, "o", b"x")

    async def work(store: Store, events: Events) -> None:
        for nuid in (">", "*", "", "a.>"):
            with pytest.raises(StoreError):
                await store.purge_chunks(bucket, nuid)

    with_store(work)
    assert client.read(bucket, "o") == b"x"


def test_uniform_layouts_are_what_uploads_make(with_store: Stores, bucket: str, spool: Content) -> None:
    async def work(store: Store, events: Events) -> None:
        meta = await store_object(store, bucket, "o", noise(30 * CHUNK + 9), spool)
        layout, _ = await store.layout(meta)
        assert layout.first is not None
        assert layout == uniform(meta.size, meta.chunks, CHUNK, layout.first, layout.first + 30)

    with_store(work)

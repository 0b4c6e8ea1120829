"""The watch: events in order, over restarts and re-created buckets, without anything left on the server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
import trio

from natsfs.config import Credentials
from natsfs.errors import BucketGone, Unreachable
from natsfs.names import encode_subject
from natsfs.store.consumer import Consumer, parse_ack
from natsfs.store.login import Login
from natsfs.store.publish import Known
from natsfs.store.store import Store
from natsfs.store.watch import BucketsChanged, Event, Gone, Hint, Loaded, Loading, Suspect
from natsfs.store.wire import Wire
from tests.store.conftest import Events, Stores, metas_of
from tests.store.test_publish import metadata
from tests.support import Client, Server, program, until


def names(name: str) -> object:
    return lambda event: any(meta.name == name for meta in metas_of(event))


def is_loaded(event: Event | Hint) -> bool:
    return isinstance(event, Loaded)


def test_listing_then_changes_in_order(with_store: Stores, bucket: str, client: Client) -> None:
    client.put_many(bucket, [f"old/{n}" for n in range(300)])
    client.delete(bucket, "old/7")

    async def work(store: Store, events: Events) -> None:
        await store.watch(bucket)
        await events.until(is_loaded)
        assert isinstance(events.all[0], Loading)
        assert events.all[0].identity.name == bucket
        listed = {meta.name: meta for meta in events.metas()}
        assert listed.keys() == {f"old/{n}" for n in range(300)}
        assert [name for name, meta in listed.items() if meta.deleted] == ["old/7"]
        place = len(events.all)
        for number in range(50):
            client.put(bucket, f"new/{number}", b"x")
        await events.until(names("new/49"), start=place)  # type: ignore[arg-type]
        later = events.metas(place)
        assert [meta.name for meta in later] == [f"new/{n}" for n in range(50)]
        assert [meta.seq for meta in later] == sorted(meta.seq for meta in later)
        assert sum(map(is_loaded, events.all)) == 1

    with_store(work)
    assert client.consumers(bucket) == []


@pytest.mark.parametrize(("before", "behind"), [("", ""), ("domain.hash.", ""), ("_.hash.", ".token")])
def test_where_a_message_is_stored(before: str, behind: str) -> None:
    """By its reply subject in the old form and in both new ones."""
    reply = f"$JS.ACK.{before}OBJ_b.natsfs-x.1.12.34.56.7{behind}"
    assert parse_ack(reply.encode()) == (12, 34, 56)


def test_an_empty_bucket_is_loaded_at_once(with_store: Stores, bucket: str) -> None:
    async def work(store: Store, events: Events) -> None:
        await store.watch(bucket)
        with trio.fail_after(1):
            await events.until(is_loaded)
        assert events.names() == []

    with_store(work)


def test_malformed_metadata_is_passed_over(with_store: Stores, bucket: str, client: Client) -> None:
    for number, body in enumerate([b"", b"nonsense", b"{}", b'{"name":3}', b"\xff", b"[" * 10000]):
        client.run(client.js.publish(f"$O.{bucket}.M.bad{number}", body))
    client.put(bucket, "good", b"x")
    client.run(client.js.publish(f"$O.{bucket}.M.zzz", b"nonsense"))

    async def work(store: Store, events: Events) -> None:
        await store.watch(bucket)
        await events.until(is_loaded)
        assert events.names() == ["good"]
        client.run(client.js.publish(f"$O.{bucket}.M.more", b"{"))
        client.put(bucket, "better", b"x")
        await events.until(names("better"))  # type: ignore[arg-type]
        assert sum(map(is_loaded, events.all)) == 1, "the watch was interrupted"

    with_store(work)


def test_it_goes_on_soon_after_a_restart_of_the_server(fresh_server: Server, with_store: Stores) -> None:
    client = fresh_server.client
    client.create_bucket("b")
    client.put("b", "one", b"x")

    async def work(store: Store, events: Events) -> None:
        await store.watch("b")
        await events.until(is_loaded)
        for number in range(3):
            place = len(events.all)
            os.kill(fresh_server.pid, signal.SIGKILL if number == 1 else signal.SIGTERM)
            fresh_server.stop()
            fresh_server.start()
            started = trio.current_time()
            await trio.to_thread.run_sync(client.put, "b", f"after{number}", b"x")
            await events.until(names(f"after{number}"), limit=5, start=place)  # type: ignore[arg-type]
            assert trio.current_time() - started < 3, "that took longer than a reconnect"
            await events.until(is_loaded, start=place)
        identities = {event.identity for event in events.all if isinstance(event, Loading)}
        assert len(identities) == 1, "a restart is no new bucket"

    with_store(work, server=fresh_server)
    until(lambda: not client.consumers("b"), limit=15)


def test_a_bucket_made_anew_has_a_new_identity(with_store: Stores, bucket: str, client: Client) -> None:
    client.put(bucket, "old", b"x")

    async def work(store: Store, events: Events) -> None:
        await store.watch(bucket)
        await events.until(is_loaded)
        place = len(events.all)
        client.delete_bucket(bucket)
        client.create_bucket(bucket)
        client.put(bucket, "new", b"x")
        event = await events.until(lambda e: isinstance(e, Loading | Gone), limit=6, start=place)
        if isinstance(event, Gone):
            await store.unwatch(bucket)
            await store.watch(bucket)
        await events.until(names("new"), limit=6, start=place)  # type: ignore[arg-type]
        first, *_, last = [event.identity for event in events.all if isinstance(event, Loading)]
        assert first.created != last.created

    with_store(work)


def test_a_deleted_bucket_is_gone(with_store: Stores, bucket: str, client: Client) -> None:
    async def work(store: Store, events: Events) -> None:
        await store.watch(bucket)
        await events.until(is_loaded)
        client.delete_bucket(bucket)
        await events.until(lambda event: isinstance(event, Gone), limit=6)
        assert any(isinstance(event, BucketsChanged) for event in events.all)

    with_store(work)


def test_a_purge_of_metadata_makes_a_suspect(with_store: Stores, bucket: str, client: Client) -> None:
    client.put(bucket, "a", b"x")

    async def work(store: Store, events: Events) -> None:
        await store.watch(bucket)
        await events.until(is_loaded)
        client.rename(bucket, "a", "b")
        expected = Suspect(bucket, f"$O.{bucket}.M.{encode_subject('a')}")
        await events.until(lambda event: event == expected)
        client.api(f"STREAM.PURGE.OBJ_{bucket}")
        await events.until(lambda event: event == Suspect(bucket, None))

    with_store(work)


def test_own_messages_are_recognised(with_store: Stores, bucket: str) -> None:
    async def work(store: Store, events: Events) -> None:
        await store.watch(bucket)
        await events.until(is_loaded)
        ops = {}
        for number in range(50):
            op = store.new_op()
            ops[op] = await store.publish(metadata(bucket, f"o{number}"), Known(0), op)
        await events.until(names("o49"))  # type: ignore[arg-type]
        seen = {meta.op: meta.seq for meta in events.metas()}
        assert seen == ops

    with_store(work)


def test_no_consumer_stays(with_store: Stores, bucket: str, client: Client) -> None:
    async def work(store: Store, events: Events) -> None:
        for _ in range(3):
            place = len(events.all)
            await store.watch(bucket)
            await store.watch(bucket)
            await events.until(is_loaded, start=place)
            assert len(client.consumers(bucket)) == 1
            await store.unwatch(bucket)
            until(lambda: not client.consumers(bucket))
        await store.watch(bucket)
        await events.until(is_loaded, start=len(events.all) - 1)

    with_store(work)
    assert client.consumers(bucket) == []


def test_an_account_that_may_not_hear_advisories(tmp_path: Path, with_store: Stores) -> None:
    config = tmp_path / "server.conf"
    config.write_text(
        """
        authorization { users: [
          { user: free, password: x }
          { user: bound, password: x, permissions: {
              publish: { allow: ["$JS.API.>", "$O.>", "_INBOX.>"] },
              subscribe: { allow: ["_INBOX.>"] } } }
        ] }
        """
    )
    ports = tmp_path / "ports"
    ports.mkdir()
    command = [
        program("nats-server"),
        "-c",
        config,
        "-a",
        "127.0.0.1",
        "-p",
        "-1",
        "-js",
        "-sd",
        tmp_path / "js",
    ]
    process = subprocess.Popen(
        [*map(str, command), "--ports_file_dir", str(ports)], stderr=subprocess.DEVNULL
    )
    try:
        (told,) = until(lambda: [p for p in ports.glob("*.ports") if p.read_text().endswith("}")], limit=20)
        server = Server()
        server.port = int(json.loads(told.read_text())["nats"][0].rpartition(":")[2])

        async def work(store: Store, events: Events) -> None:
            await store.create_bucket("b")
            await store.watch("b")
            await events.until(is_loaded)
            await store.publish(metadata("b", "o"), Known(0), store.new_op())
            await events.until(names("o"))  # type: ignore[arg-type]
            assert store._news.generation == 0, "the connection was closed"

        with_store(work, server=server, credentials=Credentials(user="bound", password="x"))
    finally:
        process.terminate()
        process.wait(20)


def test_watches_that_come_and_go_at_the_close_leave_no_consumer(
    fresh_server: Server, with_store: Stores
) -> None:
    """A bucket that was made again is followed anew; the mount may be taken down in the middle of that."""
    client = fresh_server.client
    buckets = [f"b{number}" for number in range(40)]
    for bucket in buckets:
        client.create_bucket(bucket)

    async def work(store: Store, events: Events) -> None:
        for bucket in buckets[::2]:
            await store.watch(bucket)
        await events.until(lambda _: sum(map(is_loaded, events.all)) == len(buckets) // 2)

        async def follow_anew(bucket: str) -> None:
            # What comes too late fails.
            with contextlib.suppress(Unreachable):
                await store.unwatch(bucket)
                await store.watch(bucket)

        async with trio.open_nursery() as nursery:
            for bucket in buckets:
                nursery.start_soon(follow_anew, bucket)
            await trio.lowlevel.checkpoint()
            await store.close()

    with_store(work, server=fresh_server)
    assert [client.consumers(bucket) for bucket in buckets] == [[]] * len(buckets)


def test_a_consumer_that_ends_while_its_stream_is_made_anew(bucket: str, nats_server: Server) -> None:
    """The server handles such a creation behind the deletion that was sent after it, unless its answer is awaited."""
    client = nats_server.client

    async def follow(wire: Wire, scope: trio.CancelScope) -> None:
        consumer = Consumer(wire, "$JS.API", bucket, f"$O.{bucket}.M.>")
        with scope, contextlib.suppress(BucketGone):
            async with consumer.running(deliver_policy="all"):
                await trio.sleep(60)

    async def work() -> list[int]:
        login = Login((nats_server.url,), Credentials())
        await login.check()
        wire = Wire("test", (nats_server.url,), login)
        left = []
        async with trio.open_nursery() as wires:
            await wires.start(wire.run)
            for number in range(60):
                await trio.to_thread.run_sync(client.delete_bucket, bucket)
                scope = trio.CancelScope()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(follow, wire, scope)
                    # The request is sent in the second turn.
                    for _ in range(2 + number % 2):
                        await trio.lowlevel.checkpoint()
                    nursery.start_soon(trio.to_thread.run_sync, partial(client.create_bucket, bucket))
                    await trio.lowlevel.checkpoint()
                    scope.cancel()
                left.append(len(client.consumers(bucket)))
            wires.cancel_scope.cancel()
        return left

    assert trio.run(work) == [0] * 60


@pytest.mark.parametrize("direct", [True, False])
def test_metadata_is_counted_without_a_listing(
    with_store: Stores, bucket: str, client: Client, direct: bool
) -> None:
    client.change_bucket(bucket, allow_direct=direct)

    async def work(store: Store, events: Events) -> None:
        assert await store.count_metadata(bucket) == 0
        client.put_many(bucket, [f"o{n}" for n in range(30)])
        client.put(bucket, "o3", b"again")
        client.delete(bucket, "o7")
        assert await store.count_metadata(bucket) == 30, "a tombstone is a message, too"
        client.rename(bucket, "o1", "o30")
        client.rename(bucket, "o2", "o3")
        assert await store.count_metadata(bucket) == 29
        assert client.consumers(bucket) == []
        client.delete_bucket(bucket)
        with pytest.raises(BucketGone):
            await store.count_metadata(bucket)

    with_store(work)

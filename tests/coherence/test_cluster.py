"""Three servers in a cluster, a bucket with three replicas, and mounts that are connected to different ones."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from nats.errors import TimeoutError as NoAnswer

from tests.coherence.proxy import Behind, Lagging, Older, Proxy, Short
from tests.coherence.test_seen_at_once import entry, view, whole
from tests.support import (
    CHUNK,
    Client,
    Mount,
    Mounter,
    Server,
    digest_of,
    encode,
    new_nuid,
    noise,
    opened,
    split,
    until,
)

SETTINGS = """
server_name: n{number}
cluster {{
  name: c
  listen: "127.0.0.1:{own}"
  routes: [{routes}]
}}
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[Server]]:
    """Three nodes with one bucket `b` on all of them."""
    routes = free_ports(3)
    urls = ", ".join(f'"nats://127.0.0.1:{port}"' for port in routes)
    nodes = [
        Server(SETTINGS.format(number=number, own=port, routes=urls)) for number, port in enumerate(routes)
    ]
    try:
        for node in nodes:
            node.start()

        def has_leader() -> bool:
            with urllib.request.urlopen(f"{nodes[0].monitoring}/jsz", timeout=10) as answer:
                meta = json.load(answer).get("meta_cluster") or {}
            return bool(meta.get("leader")) and meta.get("cluster_size") == 3

        until(has_leader, 60, "the cluster has a leader")
        deadline = time.monotonic() + 90
        while True:
            try:
                nodes[0].client.create_bucket("b", num_replicas=3)
                break
            except (RuntimeError, NoAnswer) as error:
                # The leader has still to hear of the others, or there is a new one, which knows of no request.
                fits = isinstance(error, NoAnswer) or "no suitable peers" in str(error)
                if not fits or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        yield nodes
    finally:
        for node in nodes:
            node.close()


class Several(Server):
    """The URL of a mount names several nodes."""

    def __init__(self, nodes: list[Server]) -> None:
        super().__init__()
        self._nodes = nodes
        self._process = nodes[0]._process
        self._connected = nodes[0].client

    @property
    def url(self) -> str:
        return "nats://" + ",".join(f"127.0.0.1:{node.port}" for node in self._nodes)


def ended(mounted: list[Mount], cluster: list[Server]) -> None:
    """Take the mounts down. Each sees the consumers of those at other nodes, so they are looked for in the end."""
    for one in mounted:
        assert [problem for problem in one.finish() if not problem.startswith("consumer ")] == []
    until(lambda: cluster[0].client.consumers("b") == [])


@pytest.mark.semantics("clusters")
def test_written_on_one_node_read_on_another(cluster: list[Server], mount: Mounter) -> None:
    """What a close on one mount has committed is read on mounts at other nodes as soon as its name shows there."""
    mounted = [mount("/b", server=node) for node in cluster]
    writer, *readers = mounted
    for number in range(60):
        size = (10, 100_000, 300_000, 2_000_000)[number % 4]
        data = noise(size, number)
        (writer.path / f"f{number}").write_bytes(data)
        for reader in readers:
            path = reader.path / f"f{number}"
            until(path.exists)
            assert path.read_bytes() == data
    for one in mounted:
        assert len(os.listdir(one.path)) == 60
    for path in writer.path.iterdir():
        path.unlink()
    for one in readers:
        until(lambda one=one: os.listdir(one.path) == [])  # type: ignore[misc]
    ended(mounted, cluster)


@pytest.mark.semantics("clusters")
def test_overwritten_on_one_node(cluster: list[Server], mount: Mounter) -> None:
    """Readers at other nodes see each overwritten file whole, never an error, and never an older one after a newer."""
    writer, *readers = (mount("/b", server=node) for node in cluster)
    stop = threading.Event()
    problems: list[str] = []
    readings = [0, 0]
    line = 16

    def content(number: int) -> bytes:
        return f"{number:015}\n".encode() * (150_000 // line)

    (writer.path / "f").write_bytes(content(0))
    for one in readers:
        until((one.path / "f").exists)

    def read(which: int, path: Path) -> None:
        newest = 0
        while not stop.is_set():
            try:
                data = path.read_bytes()
            except OSError as error:
                problems.append(str(error))
                continue
            number = int(data[:line])
            if data != content(number):
                problems.append(f"{len(data)} bytes are no version")
            if number < newest:
                problems.append(f"{number} after {newest}")
            newest = number
            readings[which] += 1

    threads = [threading.Thread(target=read, args=(n, one.path / "f")) for n, one in enumerate(readers)]
    for thread in threads:
        thread.start()
    try:
        for number in range(1, 41):
            (writer.path / "f").write_bytes(content(number))
        for one in readers:
            until(lambda one=one: entry(one.path / "f") == whole(content(40)))  # type: ignore[misc]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert problems == []
    assert min(readings) > 5
    (writer.path / "f").unlink()
    ended([*readers, writer], cluster)


@pytest.mark.semantics("clusters")
def test_a_node_stops(cluster: list[Server], mount: Mounter) -> None:
    """The node that a mount is connected to goes away: the mount goes on at another one; nothing is lost."""
    nodes = [cluster[1], cluster[2], cluster[0]]
    several = Several(nodes)
    mounted: Mount = mount("/b", server=several)
    mounted.allow(" WARNING ")
    other = mount("/b", server=Several([cluster[0]]))
    other.allow(" WARNING ")
    (mounted.path / "before").write_bytes(noise(500_000))
    written: list[int] = []
    problems: list[str] = []
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            try:
                (mounted.path / f"n{number}").write_bytes(noise(20_000, number))
            except OSError as error:
                problems.append(str(error))
            else:
                written.append(number)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        until(lambda: len(written) > 3, 10)
        nodes[0].stop()
        at = len(written)
        until(lambda: len(written) > at + 5, 20, "writing goes on")
        nodes[0].start()
        at = len(written)
        until(lambda: len(written) > at + 5, 20)
    finally:
        stop.set()
        thread.join(30)
    assert problems == []
    expected = {"before", *(f"n{number}" for number in written)}
    for one in (mounted, other):
        until(lambda one=one: set(os.listdir(one.path)) == expected, 10)  # type: ignore[misc]
        for number in written:
            assert (one.path / f"n{number}").read_bytes() == noise(20_000, number)
    assert (other.path / "before").read_bytes() == noise(500_000)
    for one in (mounted, other):
        assert [problem for problem in one.finish() if not problem.startswith("consumer ")] == []


class Writing(threading.Thread):
    """Another client, at `node`, which puts, replaces, renames and removes; what is not acknowledged it repeats."""

    def __init__(self, node: Server) -> None:
        super().__init__(daemon=True)
        self.node = node
        self.rounds = 0
        self.ends = threading.Event()

    def run(self) -> None:
        while not self.ends.is_set():
            self._round(self.rounds + 1)
            self.rounds += 1

    def _round(self, number: int) -> None:
        name, data = f"n{number}", str(number).encode()
        self._put("again", data)
        meta = self._put(name, data)
        if number % 3 == 1:
            self._publish(meta | {"name": f"r{number}"})
            purge = {"filter": f"$O.b.M.{encode(name)}"}
            self._insist(lambda client: client._api("STREAM.PURGE.OBJ_b", purge))
        elif number % 3 == 2:
            self._publish(meta | {"size": 0, "chunks": 0, "deleted": True})

    def _put(self, name: str, data: bytes) -> dict[str, Any]:
        """What it replaces keeps its chunks, so that whoever reads it meanwhile gets no ESTALE."""
        nuid = new_nuid()
        meta = {"name": name, "bucket": "b", "nuid": nuid, "size": len(data), "chunks": 1}
        # One that is stored twice would be two chunks, were it not for its id.
        headers = {"Nats-Msg-Id": nuid}
        self._insist(lambda client: client.js.publish(f"$O.b.C.{nuid}", data, headers=headers))
        self._publish(meta := meta | {"digest": digest_of(data)})
        return meta

    def _publish(self, meta: dict[str, Any]) -> None:
        self._insist(lambda client: client._publish_meta(meta))

    def _insist(self, work: Callable[[Client], Coroutine[Any, Any, object]]) -> None:
        while not self.ends.is_set():
            client = self.node.client
            with contextlib.suppress(Exception):
                client.run(asyncio.wait_for(work(client), 2))
                return
            time.sleep(0.05)


def differing(client: Client, folder: Path) -> list[str]:
    """Names that a mount shows and that are not stored, or the reverse."""
    return sorted(set(os.listdir(folder)) ^ client.names("b"))


def healthy(nodes: list[Server]) -> bool:
    """Whether the bucket's stream has a leader, and replicas that have all of it."""
    try:
        cluster = nodes[0].client.info("b")["cluster"]
    except Exception:  # an election is under way
        return False
    return bool(cluster.get("leader")) and all(
        replica.get("current") and not replica.get("offline") for replica in cluster["replicas"]
    )


@pytest.mark.semantics("clusters", "changes-by-others-show")
def test_another_writes_while_the_watch_moves(cluster: list[Server], mount: Mounter) -> None:
    """Leaders step down, and the nodes stop that a watch is connected to and that serve it: no change is lost."""
    cluster[0].client.api("STREAM.PURGE.OBJ_b")
    mounted = mount("/b", server=Several(cluster))
    mounted.allow(" WARNING ")
    writing = Writing(cluster[0])
    problems: list[str] = []

    def read() -> None:
        newest = 0
        while not writing.ends.is_set():
            try:
                number = int((mounted.path / "again").read_bytes())
            except OSError as error:
                problems.append(str(error))
                continue
            if number < newest:
                problems.append(f"{number} after {newest}")
            newest = number
            time.sleep(0.002)

    def goes_on(what: str) -> None:
        """Some rounds more, and what they made shows."""
        at = writing.rounds
        until(lambda: writing.rounds > at + 6, 40, f"writing goes on, {what}")
        until(lambda: int((mounted.path / "again").read_bytes()) > at + 6, 20, f"changes show, {what}")

    def connected() -> Server | None:
        return next((node for node in cluster if node.has_connection("natsfs watches")), None)

    def serving() -> Server | None:
        bound = [one for one in cluster[0].client.consumers("b") if one.get("push_bound")]
        return cluster[int(bound[0]["cluster"]["leader"].removeprefix("n"))] if len(bound) == 1 else None

    writing.start()
    reader = threading.Thread(target=read)
    try:
        until((mounted.path / "again").exists, 20)
        reader.start()
        writing.node.client.api("STREAM.LEADER.STEPDOWN.OBJ_b")
        goes_on("after the stream's leader has stepped down")
        for find in (connected, serving):
            until(lambda: healthy(cluster), 60)
            node = until(find, 20)
            assert node is not None
            writing.node = next(other for other in cluster if other is not node)
            time.sleep(0.2)
            node.stop()
            goes_on("without a node")
            node.start()
        goes_on("with all nodes")
    finally:
        writing.ends.set()
        writing.join(30)
        reader.join(30)
    until(lambda: healthy(cluster), 60)
    with contextlib.suppress(AssertionError):
        until(lambda: not differing(cluster[0].client, mounted.path), 10)
    assert differing(cluster[0].client, mounted.path) == []
    for name in os.listdir(mounted.path):
        assert (mounted.path / name).read_bytes() == cluster[0].client.read("b", name)
    assert problems == []
    assert [problem for problem in mounted.finish() if not problem.startswith("consumer ")] == []


@pytest.mark.semantics("clusters", "changes-by-others-show")
def test_a_listing_of_a_replica_that_lags(
    nats_server: Server, bucket: str, client: Client, mount: Mounter
) -> None:
    """What is known stays, with its inode, though a listing does not have it; what was purged meanwhile goes."""
    proxy = Lagging(nats_server.port)
    server = Server()
    server.port, server._process, server._connected = proxy.port, nats_server._process, client
    mounted = mount(f"/{bucket}", server=server)
    mounted.allow(" WARNING ")
    names = ["a", "b", "c"]
    for name in names:
        (mounted.path / name).write_text(name)
    try:
        with opened(mounted.path / "b", os.O_RDWR) as fd:
            inos = {name: (mounted.path / name).stat().st_ino for name in names}
            proxy.lags = True
            proxy.cut()
            until(lambda: len(client.consumers(bucket)) > 1, 10, "the watch begins anew")
            client.put(bucket, "news", b"news")
            until((mounted.path / "news").exists, 10)
            assert sorted(os.listdir(mounted.path)) == [*names, "news"]
            assert {name: (mounted.path / name).stat().st_ino for name in names} == inos
            os.pwrite(fd, b"B", 0)
        assert client.read(bucket, "b") == b"B"
        proxy.lags = False
        proxy.away = True
        proxy.cut()
        for name in ("b", "c"):
            client.api(f"STREAM.PURGE.OBJ_{bucket}", {"filter": f"$O.{bucket}.M.{encode(name)}"})
        proxy.away = False
        until(lambda: sorted(os.listdir(mounted.path)) == ["a", "news"], 10)
        assert [problem for problem in mounted.finish() if not problem.startswith("consumer ")] == []
    finally:
        proxy.close()


def behind(proxy: Proxy, nats_server: Server) -> Server:
    """The server as it is through a proxy."""
    server = Server()
    server.port, server._process, server._connected = proxy.port, nats_server._process, nats_server.client
    return server


@pytest.fixture
def replica(nats_server: Server) -> Iterator[Behind]:
    proxy = Behind(nats_server.port)
    yield proxy
    proxy.close()


@pytest.mark.semantics("clusters")
@pytest.mark.parametrize("has", [0, 1])
def test_chunks_that_a_replica_lacks(
    nats_server: Server, bucket: str, mount: Mounter, replica: Behind, has: int
) -> None:
    """A replica that answers 404, or has fewer chunks, makes no error, whatever the size and the chunks' lengths."""
    mounted = mount(f"/{bucket}", server=behind(replica, nats_server))
    data = noise(4_000_000)
    pieces = {
        "one": [data[:10]],
        "few": split(data[:300_000]),
        "many": split(data),
        "odd": [data[at * at * 1000 : (at + 1) * (at + 1) * 1000] for at in range(20)],
    }
    replica.has = has
    for name, chunks in pieces.items():
        nats_server.client.put(bucket, name, chunks)
        until((mounted.path / name).exists)
        asked = replica.reads
        assert (mounted.path / name).read_bytes() == b"".join(chunks)
        assert replica.reads > asked or (name, has) == ("one", 1)
    assert replica.scans
    assert mounted.finish() == []


@pytest.mark.semantics("clusters")
@pytest.mark.parametrize("has", [0, 1])
def test_a_replica_falls_behind_while_a_file_is_read(
    nats_server: Server, bucket: str, mount: Mounter, replica: Behind, has: int
) -> None:
    """The chunks that it does not have any more come from the leader, also those on which a change is built."""
    mounted = mount(f"/{bucket}", server=behind(replica, nats_server))
    data = noise(20_000_000)
    nats_server.client.put(bucket, "f", data)
    until((mounted.path / "f").exists)
    with opened(mounted.path / "f", os.O_RDWR) as fd:
        assert os.pread(fd, 10, 0) == data[:10]
        replica.has = has
        assert os.pread(fd, 3_000_000, 9_000_000) == data[9_000_000:12_000_000]
        assert replica.reads > 0
        asked = replica.reads
        os.pwrite(fd, b"changed", 15_000_000)
    assert replica.reads > asked
    expected = data[:15_000_000] + b"changed" + data[15_000_007:]
    assert nats_server.client.read(bucket, "f") == expected
    assert mounted.finish() == []


@pytest.mark.semantics("clusters")
@pytest.mark.parametrize("lacks", [1, 3])
def test_scattered_chunks_at_a_replica_that_lacks_the_last(
    cluster: list[Server], mount: Mounter, lacks: int
) -> None:
    """It counts too few behind each, but nobody reads one chunk for another."""
    proxy = Short(cluster[0].port)
    mounted = mount("/b", server=behind(proxy, cluster[0]))
    contents = {f"s{number}": noise(6_000_000, number) for number in range(3)}
    try:
        cluster[0].client.put_scattered("b", contents, lacks)
        generator = random.Random(lacks)
        for name, content in contents.items():
            until((mounted.path / name).exists)
            with opened(mounted.path / name, os.O_RDONLY) as fd:
                assert os.pread(fd, 10, 0) == content[:10]
                proxy.lacks = lacks
                for _ in range(40):
                    at = generator.randrange(len(content))
                    assert os.pread(fd, 1000, at) == content[at : at + 1000]
                proxy.lacks = 0
        assert proxy.counted
        for name in contents:
            (mounted.path / name).unlink()
        ended([mounted], cluster)
    finally:
        proxy.close()


@pytest.mark.semantics("clusters")
@pytest.mark.parametrize("lacks", [slice(-2, None), slice(1, 3), slice(0, 2)], ids=["end", "middle", "begin"])
def test_scattered_chunks_at_a_mirror_that_lacks_some(
    nats_server: Server, bucket: str, client: Client, mount: Mounter, lacks: slice
) -> None:
    """A mirror with `mirror_direct` answers for its bucket, and what it counts is its own."""
    contents = {f"s{number}": noise(1_500_000, number) for number in range(16)}
    client.put_scattered(bucket, contents)
    settings = {"name": "OBJ_behind", "mirror": {"name": f"OBJ_{bucket}"}, "storage": "file"}
    client.api("STREAM.CREATE.OBJ_behind", settings | {"mirror_direct": True, "allow_direct": True})
    try:
        messages = int(client.info(bucket)["state"]["messages"])
        until(lambda: int(client.info("behind")["state"]["messages"]) == messages)
        for name in contents:
            subject, seqs = f"$O.{bucket}.C.{client.stored(bucket, name)['nuid']}", [0]
            for _ in range(12):
                request = {"seq": seqs[-1] + 1, "next_by_subj": subject}
                seqs.append(client.api("STREAM.MSG.GET.OBJ_behind", request)["message"]["seq"])
            for seq in seqs[1:][lacks]:
                client.delete_message("behind", seq)
        mounted = mount(f"/{bucket}")
        generator = random.Random(1)
        for name, content in contents.items():
            with opened(mounted.path / name, os.O_RDONLY) as fd:
                for _ in range(30):
                    at = generator.randrange(len(content))
                    assert os.pread(fd, 1000, at) == content[at : at + 1000]
        assert mounted.finish() == []
    finally:
        client.delete_bucket("behind")


@pytest.mark.semantics("clusters")
def test_full_chunks_at_a_replica_that_lacks_the_last(cluster: list[Server], mount: Mounter) -> None:
    """It takes another full one for the last, as far behind the first as if nothing lay between them."""
    proxy, client = Short(cluster[0].port), cluster[0].client
    mounted = mount("/b", server=behind(proxy, cluster[0]))
    chunks, nuid = split(noise(12 * CHUNK)), new_nuid()
    subject = f"$O.b.C.{nuid}"
    try:
        for number, chunk in enumerate(chunks):
            client.publish_chunk("b", nuid, chunk)
            if number == 4:
                client.publish_chunk("b", "STRANGER", b"x")
        first = client.api("STREAM.MSG.GET.OBJ_b", {"seq": 1, "next_by_subj": subject})["message"]["seq"]
        proxy.last[subject] = first + 11  # the last but one
        content = b"".join(chunks)
        meta = {"name": "full", "bucket": "b", "nuid": nuid, "size": len(content), "chunks": 12}
        client.publish_meta(meta | {"digest": digest_of(content), "options": {"max_chunk_size": CHUNK}})
        until((mounted.path / "full").exists)
        with opened(mounted.path / "full", os.O_RDONLY) as fd:
            for at in (11, 0, 7, 4, 5):
                assert os.pread(fd, 1000, at * CHUNK) == content[at * CHUNK : at * CHUNK + 1000]
        assert proxy.counted
        (mounted.path / "full").unlink()
        client.api("STREAM.PURGE.OBJ_b", {"filter": "$O.b.C.STRANGER"})
        ended([mounted], cluster)
    finally:
        proxy.close()


@pytest.mark.semantics("clusters")
def test_a_listing_with_older_versions(nats_server: Server, bucket: str, mount: Mounter) -> None:
    """A watch that begins anew at a replica that has the versions before: no reading goes back to one of them."""
    proxy = Older(nats_server.port)
    client = nats_server.client
    mounted = mount(f"/{bucket}", server=behind(proxy, nats_server))
    mounted.allow(" WARNING ")
    old, new = noise(1000, 1), noise(2000, 2)
    for name in ("replaced", "removed"):
        client.put(bucket, name, old)
        until((mounted.path / name).exists)
    client.put(bucket, "replaced", new)
    client.delete(bucket, "removed")
    expected = {"replaced": whole(new), "removed": None}
    until(lambda: view(mounted.path, "removed") == expected)
    ino = (mounted.path / "replaced").stat().st_ino
    proxy.lags = True
    proxy.cut()
    try:

        def goes_on() -> bool:
            assert view(mounted.path, "removed") == expected
            return len(proxy.listed) == 2

        until(goes_on, 10, "the watch begins anew")
        client.put(bucket, "last", b"1")
        until((mounted.path / "last").exists, 10)
        assert view(mounted.path, "removed") == expected | {"last": whole(b"1")}
        assert (mounted.path / "replaced").stat().st_ino == ino
        proxy.lags = False
        (mounted.path / "replaced").chmod(0o600)  # on top of the newest one
        assert client.stored(bucket, "replaced")["digest"] == digest_of(new)
        assert [problem for problem in mounted.finish() if not problem.startswith("consumer ")] == []
    finally:
        proxy.close()

"""Stores that were restored, rolled back, re-created or badly set up: nobody's object is overwritten or hidden."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from natsfs.catalog.bucket import Bucket
from natsfs.config import Config, Credentials
from natsfs.errors import ReadOnlyBucket
from natsfs.options import Options
from natsfs.volume import Volume
from tests.coherence.test_seen_at_once import Writers, entry, view, whole
from tests.support import Client, Mount, Mounter, Server, encode, noise, opened, raises, until


class History:
    """A server whose data can be set back to what it was."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server = server
        self.folder = folder / "saved"

    def save(self) -> None:
        self.server.stop()
        shutil.copytree(self.server.data / "jetstream", self.folder)
        self.server.start()

    def back(self, before_the_start: Callable[[], None] = lambda: None) -> None:
        self.server.stop()
        shutil.rmtree(self.server.data / "jetstream")
        shutil.copytree(self.folder, self.server.data / "jetstream")
        before_the_start()
        self.server.start()


@pytest.fixture
def history(fresh_server: Server, tmp_path: Path) -> History:
    fresh_server.client.create_bucket("b")
    return History(fresh_server, tmp_path)


EXPECTED = (
    "was restored|re-created or restored|interrupted|lost|connection|answer|cannot be read|compared|starts again|"
    "does not exist"
)


def connected(client: Client) -> bool:
    try:
        client.info("b")
    except Exception:
        return False
    return True


@pytest.mark.semantics("restored-stores")
def test_a_store_that_was_set_back(history: History, mount: Mounter) -> None:
    """After the server comes back with an older store the mount shows that store, with new inodes where it differs."""
    server = history.server
    mounted = mount("/b", server=server)
    mounted.allow(EXPECTED)
    (mounted.path / "kept").write_bytes(noise(300_000))
    (mounted.path / "changed").write_bytes(b"old")
    (mounted.path / "removed").write_bytes(b"was there")
    history.save()
    until(lambda: connected(server.client), 10)
    until(lambda: entry(mounted.path / "changed") == whole(b"old"), 10)
    (mounted.path / "changed").write_bytes(b"newer")
    (mounted.path / "later").write_bytes(b"only for a while")
    (mounted.path / "removed").unlink()
    view(mounted.path)
    history.back()
    shows_soon = {
        "kept": whole(noise(300_000)),
        "changed": whole(b"old"),
        "removed": whole(b"was there"),
    }
    until(lambda: view(mounted.path, "later") == shows_soon | {"later": None}, 15)
    # Everything can be written, read and removed again.
    (mounted.path / "changed").write_bytes(b"after")
    (mounted.path / "later").write_bytes(b"again")
    (mounted.path / "kept").unlink()
    assert server.client.read("b", "changed") == b"after"
    assert server.client.read("b", "later") == b"again"
    assert sorted(server.client.names("b")) == ["changed", "later", "removed"]
    assert mounted.finish() == []


@pytest.mark.semantics("restored-stores")
def test_a_sequence_that_is_given_out_again(history: History, mount: Mounter) -> None:
    """Another client's object that has the very sequence that this mount knew is not overwritten by a change."""
    server = history.server
    client = server.client
    mounted = mount("/b", server=server)
    mounted.allow(EXPECTED + "|replaced by somebody else|are gone")
    mounted.allow_failed()
    (mounted.path / "f").write_bytes(noise(2000))
    until(lambda: entry(mounted.path / "f") == whole(noise(2000)))
    history.save()
    until(lambda: connected(client), 10)
    until(lambda: entry(mounted.path / "f") == whole(noise(2000)), 10)
    (mounted.path / "f").write_bytes(b"version two")
    seq = client.info("b")["state"]["last_seq"]
    assert (mounted.path / "f").read_bytes() == b"version two"
    fd = os.open(mounted.path / "f", os.O_RDWR)
    # Nothing is dirty while the server is started: each fork closes its copy of the descriptor, and that commits.
    history.back()
    os.pwrite(fd, b"VERSION", 0)
    until(lambda: connected(client), 10)
    # The same two messages as natsfs sent, by somebody else: chunk and metadata get the same sequences.
    client.put("b", "f", b"a stranger's")
    assert client.info("b")["state"]["last_seq"] == seq
    with raises(errno.ESTALE):
        os.close(fd)
    assert client.read("b", "f") == b"a stranger's"
    until(lambda: entry(mounted.path / "f") == whole(b"a stranger's"), 10)
    assert [manifest["name"] for manifest in mounted.failed()] == ["f"]
    mounted.finish()


@pytest.mark.semantics("restored-stores")
def test_a_store_that_was_set_back_and_has_gone_on(history: History, mount: Mounter) -> None:
    """Also if others have written since, so that the store has more messages than were known before."""
    server = history.server
    client = server.client
    mounted = mount("/b", server=server)
    mounted.allow(EXPECTED)
    for name in ("rewritten", "removed"):
        (mounted.path / name).write_bytes(b"old")
    history.save()
    until(lambda: connected(client), 10)
    until(lambda: entry(mounted.path / "removed") == whole(b"old"), 10)
    (mounted.path / "rewritten").write_bytes(b"newer")
    (mounted.path / "removed").unlink()
    (mounted.path / "made").write_bytes(b"later")
    view(mounted.path)
    # It goes on before the mount can see it: a server that comes back on another port is not found.
    port = server.port

    history.server.stop()
    server.port = 0
    history.back()
    with contextlib.closing(Client(server.url)) as other:
        for number in range(10):
            other.put("b", "theirs", b"theirs" * number)
    history.server.stop()
    server.port = port
    history.server.start()
    expected = {"rewritten": whole(b"old"), "removed": whole(b"old"), "theirs": whole(b"theirs" * 9)}
    until(lambda: view(mounted.path, "made") == expected | {"made": None}, 15)
    for name in ("rewritten", "removed", "made"):
        (mounted.path / name).write_bytes(b"goes on")
        assert client.read("b", name) == b"goes on"
    mounted.finish()


@pytest.mark.semantics("restored-stores")
@pytest.mark.parametrize("change", ["unlink", "rename", "rename over", "chmod", "excl"])
def test_changes_by_name_after_a_store_was_set_back(history: History, mount: Mounter, change: str) -> None:
    """Calls that follow the return of the server at once act on what is there, and never bury a stranger's object."""
    server = history.server
    client = server.client
    mounted = mount("/b", server=server)
    mounted.allow(EXPECTED + "|replaced by somebody else|are gone|changed meanwhile")
    top = mounted.path
    (top / "other").write_bytes(b"other")
    history.save()
    until(lambda: connected(client), 10)
    until(lambda: entry(top / "other") == whole(b"other"), 10)
    (top / "f").write_bytes(b"mine")
    seq = client.info("b")["state"]["last_seq"]
    view(top, "g")
    history.back()
    until(lambda: connected(client), 10)
    client.put("b", "f", b"a stranger's")
    assert client.info("b")["state"]["last_seq"] == seq
    calls: dict[str, Callable[[], object]] = {
        "unlink": (top / "f").unlink,
        "rename": lambda: (top / "f").rename(top / "g"),
        "rename over": lambda: (top / "other").rename(top / "f"),
        "chmod": lambda: (top / "f").chmod(0o640),
        "excl": lambda: os.close(os.open(top / "f", os.O_CREAT | os.O_EXCL | os.O_WRONLY)),
    }
    try:
        calls[change]()
    except OSError as error:
        assert error.errno in (errno.EEXIST, errno.ESTALE, errno.ENOENT, errno.ETIMEDOUT), error  # noqa: PT017
        if change == "excl":
            assert error.errno == errno.EEXIST  # noqa: PT017
        assert client.read("b", "f") == b"a stranger's"
    else:
        # It was looked up after the news: then the call did what it says, to the stranger's object.
        if change == "rename":
            assert client.read("b", "g") == b"a stranger's"
        elif change == "rename over":
            assert client.read("b", "f") == b"other"
        elif change == "chmod":
            assert client.read("b", "f") == b"a stranger's"
    until(lambda: set(os.listdir(top)) == client.names("b"), 10)
    for name in client.names("b"):
        until(lambda name=name: entry(top / name) == whole(client.read("b", name)), 10)  # type: ignore[misc]
    mounted.finish()


@pytest.mark.semantics("restored-stores")
@pytest.mark.parametrize("alone", [True, False])
def test_a_bucket_made_again_at_once(bucket: str, client: Client, mount: Mounter, alone: bool) -> None:
    """An open file's change does not overwrite the object that has its name and sequence in the new bucket."""
    mounted = mount(f"/{bucket}" if alone else "")
    mounted.allow(
        "does not exist any more|was restored|re-created or restored|replaced by somebody else|are gone|interrupted"
    )
    mounted.allow_failed()
    top = mounted.path if alone else mounted.path / bucket
    (top / "f").write_bytes(b"first")
    assert (top / "f").read_bytes() == b"first"
    seq = client.info(bucket)["state"]["last_seq"]
    fd = os.open(top / "f", os.O_RDWR)
    os.pwrite(fd, b"F", 0)
    client.delete_bucket(bucket)
    client.create_bucket(bucket)
    client.put(bucket, "f", b"a stranger's")
    assert client.info(bucket)["state"]["last_seq"] == seq
    with raises(errno.ESTALE, errno.ENOENT):
        os.close(fd)
    assert client.read(bucket, "f") == b"a stranger's"
    until(lambda: entry(top / "f") == whole(b"a stranger's"), 5)
    assert mounted.finish() == []


@pytest.mark.semantics("streams-that-drop-data")
@pytest.mark.parametrize(
    "settings",
    [
        {"max_msgs_per_subject": 1},
        {"discard": "old", "max_bytes": 1_000_000},
        {"discard": "old", "max_msgs": 100},
    ],
    ids=["max_msgs_per_subject", "discard old at max_bytes", "discard old at max_msgs"],
)
def test_a_stream_that_drops_data(client: Client, mount: Mounter, settings: dict[str, object]) -> None:
    """A bucket whose settings would drop chunks silently is read-only, and says why in the log; reading works."""
    client.create_bucket("drops", **settings)
    try:
        client.put("drops", "f", b"x" * 1000)
        mounted = mount("/drops")
        mounted.allow("read-only|does not exist any more")
        with raises(errno.EROFS):
            (mounted.path / "g").write_bytes(b"y")
        with raises(errno.EROFS):
            (mounted.path / "f").unlink()
        assert entry(mounted.path / "f") == whole(b"x" * 1000)
        client.put("drops", "h", b"z" * 1000)
        until(lambda: entry(mounted.path / "h") == whole(b"z" * 1000))
        if "discard" in settings:
            # As soon as it drops nothing it takes writes.
            client.change_bucket("drops", discard="new")

            def takes() -> bool:
                try:
                    (mounted.path / "g").write_bytes(b"y")
                except OSError as error:
                    return error.errno != errno.EROFS
                return True

            until(takes)
            assert client.read("drops", "g") == b"y"
    finally:
        client.delete_bucket("drops")


@pytest.mark.semantics("streams-that-drop-data")
@pytest.mark.parametrize("limit", ["max_msgs", "max_bytes"])
def test_what_a_stream_drops_goes(client: Client, mount: Mounter, limit: str) -> None:
    """The oldest objects go soon, though nothing tells of it; one that has lost chunks cannot be opened any more."""
    client.create_bucket("drops", discard="old", **{limit: {"max_msgs": 40, "max_bytes": 4_000_000}[limit]})
    try:
        mounted = mount("/drops")
        mounted.allow("read-only|does not exist any more|are gone")
        top = mounted.path
        client.put("drops", "first", b"x" * 1000)
        large = noise(2_000_000)
        client.put("drops", "large", large)
        until(lambda: (top / "large").exists() and entry(top / "first") == whole(b"x" * 1000))
        with opened(top / "large", os.O_RDONLY) as fd:
            if limit == "max_msgs":
                client.put_many("drops", [f"new{number}" for number in range(15)], b"y")
            else:
                client.put_many("drops", [f"new{number}" for number in range(20)], noise(130_000))
            until(lambda: not (top / "first").exists(), 5)
            assert sorted(os.listdir(top)) == sorted(client.names("drops"))
            assert 0 < client.chunks("drops")[client.stored("drops", "large")["nuid"]] < 16
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            with raises(errno.ESTALE):
                os.pread(fd, 1000, 0)
            with raises(errno.ENOENT, errno.ESTALE):
                (top / "large").read_bytes()
        for name in client.names("drops") - {"large"}:
            assert entry(top / name) == whole(client.read("drops", name))
    finally:
        client.delete_bucket("drops")


@pytest.mark.semantics("old-names-after-a-rename")
@pytest.mark.parametrize("kind", ["natsfs", "go", "rust", "javascript", "python"])
@pytest.mark.parametrize("then", ["put", "delete", "put and delete"])
def test_the_old_name_after_a_rename(
    folders: tuple[Path, Path],
    writers: Writers,
    mounts: tuple[Mount, Mount],
    client: Client,
    kind: str,
    then: str,
) -> None:
    """After a rename here others may put and delete the old name: the renamed file stays whole, in every directory."""
    here, there = folders
    writer = writers(kind, mounts[1])
    data = noise(300_000)
    (here / "d").mkdir()
    for name in ("a", "d/a"):
        (here / name).write_bytes(data)
    (here / "a").rename(here / "b")
    (here / "d").rename(here / "e")
    until(lambda: (there / "e/a").exists() and (there / "b").exists())
    if kind == "natsfs" and "put" in then:
        until(lambda: not (there / "d").exists())
        (there / "d").mkdir()
    for name in ("a", "d/a"):
        if "put" in then:
            writer.put(here.name, name, b"new")
            until(lambda name=name: entry(here / name) == whole(b"new"))  # type: ignore[misc]
        if "delete" in then:
            try:
                writer.delete(here.name, name)
            except Exception:
                assert then == "delete"  # some refuse to delete what is deleted already
    for name in ("b", "e/a"):
        assert client.read(here.name, name) == data
        with opened(here / name, os.O_RDONLY) as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(fd, len(data), 0) == data
        assert entry(there / name) == whole(data)


@pytest.fixture
def unheard() -> Iterator[tuple[Server, Client]]:
    """A server whose accounts' mounts hear no advisories, with a bucket `b`, and a client that may do all."""
    server = Server(
        "authorization { users: [{ user: all, password: all }, { user: u, password: u, permissions: "
        '{ subscribe: { deny: "$JS.EVENT.>" } } }] }\nno_auth_user: u\n'
    )
    server.start()
    client = Client(server.url.replace("//", "//all:all@"))
    try:
        client.create_bucket("b")
        yield server, client
    finally:
        client.close()
        server.close()


@asynccontextmanager
async def volume_of(server: Server, spool: Path, bucket: str | None = "b") -> AsyncIterator[Volume]:
    """A mount without a kernel, for as long as the block takes."""
    config = Config(
        servers=(server.url,),
        bucket=bucket,
        prefix="",
        mountpoint="/nowhere",
        display_source="test",
        credentials=Credentials(),
        options=Options(spool_dir=str(spool)),
    )
    async with trio.open_nursery() as connections, trio.open_nursery() as nursery:
        volume = Volume(config, nursery)
        await volume.start(connections)
        try:
            yield volume
        finally:
            await volume.close()
            nursery.cancel_scope.cancel()
            connections.cancel_scope.cancel()


def catalog_of(volume: Volume, bucket: str = "b") -> Bucket:
    catalog = volume.buckets[bucket].catalog
    assert catalog is not None
    return catalog


def sizes(volume: Volume) -> dict[str, int]:
    """Names and sizes of all objects that the volume shows."""
    catalog = catalog_of(volume)
    metas = [catalog.live(subject) for subject in catalog.live_subjects()]
    return {meta.name: meta.size for meta in metas if meta is not None}


async def eventually(condition: Callable[[], bool]) -> None:
    await trio.to_thread.run_sync(lambda: until(condition, 10))


@pytest.mark.semantics("purges-show-at-once", "changes-by-others-show")
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("change", ["one", "all", "message", "tombstone", "renamed"])
def test_a_purge_that_nobody_tells_of(
    unheard: tuple[Server, Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, direct: bool
) -> None:
    """The next comparison finds it, which is made each minute; an old name is found by its nuid, soon."""
    server, client = unheard
    client.change_bucket("b", allow_direct=direct)
    monkeypatch.setattr("natsfs.volume.RECONCILE", 0.3 if change != "renamed" else 3600.0)
    first = client.put("b", "f", noise(1000))
    client.put("b", "g", noise(1000))
    seq = 0
    if change == "message":
        seq = client.publish_beside(first | {"size": 2000})
    if change == "tombstone":
        seq = client.publish_beside(first | {"size": 0, "chunks": 0, "deleted": True})

    def make() -> None:
        if change == "renamed":
            client.rename("b", "f", "h")
        elif seq:
            client.delete_message("b", seq)
        else:
            pattern = {"one": encode("f"), "all": ">"}[change]
            client.api("STREAM.PURGE.OBJ_b", {"filter": f"$O.b.M.{pattern}"})

    both = {"f": 1000, "g": 1000}
    before = {"message": both | {"f": 2000}, "tombstone": {"g": 1000}}.get(change, both)
    after = {"one": {"g": 1000}, "all": {}, "renamed": {"g": 1000, "h": 1000}}.get(change, both)

    async def main() -> None:
        async with volume_of(server, tmp_path) as volume:
            assert sizes(volume) == before
            await eventually(lambda: volume.buckets["b"].surplus == bool(seq))
            await trio.to_thread.run_sync(make)
            await eventually(lambda: sizes(volume) == after)

    trio.run(main)


@dataclass
class Reconciled:
    """A volume whose comparisons are made by hand, and how many of them have listed everything."""

    volume: Volume
    listings: int = 0

    def __post_init__(self) -> None:
        refresh_all = self.volume.refresh_all

        async def counted(catalog: Bucket) -> None:
            self.listings += 1
            await refresh_all(catalog)

        self.volume.refresh_all = counted  # type: ignore[method-assign]

    async def listings_of(self, comparisons: int) -> int:
        before = self.listings
        for _ in range(comparisons):
            await self.volume._reconcile(self.volume.buckets["b"], catalog_of(self.volume))
        return self.listings - before


@pytest.mark.semantics("changes-by-others-show")
@pytest.mark.parametrize("direct", [True, False])
def test_what_a_comparison_costs(
    unheard: tuple[Server, Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    """Everything is listed once when messages have come or gone without a trace, and never where none have."""
    server, client = unheard
    monkeypatch.setattr("natsfs.volume.COUNT_AGAIN", 0.05)
    client.change_bucket("b", allow_direct=direct)
    first = client.put("b", "f", noise(1000))
    client.put("b", "g", noise(1000))

    async def main() -> None:
        async with volume_of(server, tmp_path) as volume:
            reconciled = Reconciled(volume)
            await eventually(lambda: volume.buckets["b"].surplus == 0)
            assert await reconciled.listings_of(3) == 0
            # An update that leaves the message before it.
            await trio.to_thread.run_sync(client.publish_beside, first | {"size": 2000})
            await eventually(lambda: sizes(volume) == {"f": 2000, "g": 1000})
            assert await reconciled.listings_of(3) == 1
            # A purge is found all the same.
            await trio.to_thread.run_sync(
                client.api, "STREAM.PURGE.OBJ_b", {"filter": f"$O.b.M.{encode('g')}"}
            )
            assert await reconciled.listings_of(3) == 1
            assert sizes(volume) == {"f": 2000}
            # One that removes both.
            await trio.to_thread.run_sync(client.publish_meta, first | {"size": 3000})
            await eventually(lambda: sizes(volume) == {"f": 3000})
            assert await reconciled.listings_of(3) == 1
            await trio.to_thread.run_sync(client.api, "STREAM.PURGE.OBJ_b")
            assert await reconciled.listings_of(3) == 1
            assert sizes(volume) == {}
        assert await trio.to_thread.run_sync(client.consumers, "b") == []

    trio.run(main)


@pytest.mark.semantics("changes-by-others-show")
def test_a_purge_beside_as_many_new_messages(
    unheard: tuple[Server, Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of messages does not tell of it, and what is compared every half hour does."""
    server, client = unheard
    first = client.put("b", "f", noise(1000))
    client.put("b", "g", noise(1000))

    async def main() -> None:
        async with volume_of(server, tmp_path) as volume:
            reconciled = Reconciled(volume)
            await eventually(lambda: volume.buckets["b"].surplus == 0)
            await trio.to_thread.run_sync(
                client.api, "STREAM.PURGE.OBJ_b", {"filter": f"$O.b.M.{encode('g')}"}
            )
            await trio.to_thread.run_sync(client.publish_beside, first | {"size": 2000})
            await eventually(lambda: sizes(volume)["f"] == 2000)
            assert await reconciled.listings_of(1) == 0
            assert sizes(volume) == {"f": 2000, "g": 1000}
            monkeypatch.setattr("natsfs.volume.COMPARE", 0.1)
            await trio.sleep(0.1)
            assert await reconciled.listings_of(1) == 1
            assert sizes(volume) == {"f": 2000}

    trio.run(main)


@pytest.mark.semantics("buckets-show-at-once", "settings-show-at-once")
@pytest.mark.parametrize("alone", [False, True])
def test_changes_of_buckets_that_nobody_tells_of(
    unheard: tuple[Server, Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    """The next look at the buckets finds them, which is taken each 30 s."""
    server, client = unheard
    monkeypatch.setattr("natsfs.volume.BUCKET_POLL", 0.2)

    async def main() -> None:
        async with volume_of(server, tmp_path, "b" if alone else None) as volume:
            mounted = volume.buckets["b"]
            catalog = await volume.load(mounted)
            volume.check_writable(catalog)
            await trio.to_thread.run_sync(lambda: client.change_bucket("b", max_bytes=1 << 20))
            await eventually(lambda: mounted.info is not None and mounted.info.max_bytes == 1 << 20)
            await trio.to_thread.run_sync(lambda: client.change_bucket("b", sealed=True))
            await eventually(lambda: catalog.read_only_because is not None)
            with pytest.raises(ReadOnlyBucket):
                volume.check_writable(catalog)
            if not alone:
                # Nobody watches a bucket that was never used.
                await trio.to_thread.run_sync(client.create_bucket, "made")
                await eventually(lambda: set(volume.root.children or ()) == {b"b", b"made"})
                await trio.to_thread.run_sync(client.delete_bucket, "made")
                await eventually(lambda: set(volume.root.children or ()) == {b"b"})
            await trio.to_thread.run_sync(client.delete_bucket, "b")
            await eventually(lambda: catalog.gone)
            assert alone or not volume.root.children

    trio.run(main)


@pytest.fixture
def made_again(unheard: tuple[Server, Client], mount: Mounter) -> Iterator[tuple[Client, Path]]:
    """The mounted bucket has become another one, where a stranger's `f` has the sequence that `f` had."""
    server, client = unheard
    mounted = mount("/b", "purge_grace=0", server=server)
    mounted.allow("[Pp]ermissions [Vv]iolation|re-created or restored|changed meanwhile|are gone|interrupted")
    mounted.allow("replaced by somebody else|could not be|lost its content")
    mounted.allow_failed()
    top = mounted.path
    (top / "f").write_bytes(b"first")
    seq = client.info("b")["state"]["last_seq"]
    for number in range(5):
        (top / f"more{number}").write_bytes(b"more")
    view(top, "g")
    client.delete_bucket("b")
    client.create_bucket("b")
    client.put("b", "f", b"a stranger's")
    assert client.info("b")["state"]["last_seq"] == seq
    yield client, top
    # Whether data was put aside depends on who was first.
    assert [problem for problem in mounted.finish() if not problem.startswith("umount ended")] == []


CHANGES: dict[str, Callable[[Path], object]] = {
    "chmod": lambda top: synced(top / "f", lambda: (top / "f").chmod(0o600)),
    "rename": lambda top: (top / "f").rename(top / "g"),
    "unlink": lambda top: (top / "f").unlink(),
    "write": lambda top: overwrite(top / "f"),
}


def synced(path: Path, change: Callable[[], object]) -> None:
    with opened(path, os.O_RDONLY) as fd:
        change()
        os.fsync(fd)


def overwrite(path: Path) -> None:
    with opened(path, os.O_RDWR) as fd:
        os.pwrite(fd, b"F", 0)


def the_stranger_is_safe(client: Client, top: Path, change: str) -> None:
    """Refused, or done to what is there; and nobody's name leads to content that does not exist."""
    done = True
    try:
        CHANGES[change](top)
    except OSError as error:
        assert error.errno in (errno.ESTALE, errno.ENOENT), error  # noqa: PT017
        done = False
    expected = {"unlink": None, "rename": b"a stranger's", "chmod": b"a stranger's", "write": b"F stranger's"}
    name = "g" if done and change == "rename" else "f"
    found = {name: client.read("b", name) for name in client.names("b") if name in "fg"}
    there = expected[change] if done else b"a stranger's"
    assert found == ({} if there is None else {name: there})
    until(lambda: set(os.listdir(top)) == client.names("b"), 10)
    for name in client.names("b"):
        until(lambda name=name: entry(top / name) == whole(client.read("b", name)), 10)  # type: ignore[misc]


@pytest.mark.semantics("restored-stores")
@pytest.mark.parametrize("change", CHANGES)
def test_a_bucket_made_again_unheard_shows_by_the_next_acknowledgement(
    made_again: tuple[Client, Path], change: str
) -> None:
    """A new file gets a sequence that the mount knows already: from then on nothing known is trusted."""
    client, top = made_again
    (top / "new").write_bytes(b"new")
    assert client.read("b", "new") == b"new"
    the_stranger_is_safe(client, top, change)


@pytest.mark.semantics("restored-stores")
@pytest.mark.parametrize("change", ["chmod", "rename"])
def test_a_bucket_made_again_unheard_falls_silent(made_again: tuple[Client, Path], change: str) -> None:
    """When its watch has missed a heartbeat a change asks the leader first."""
    client, top = made_again
    time.sleep(1.7)  # the watch itself notices after three seconds, and then all is well anyway
    the_stranger_is_safe(client, top, change)


@pytest.mark.semantics("restored-stores")
def test_a_rename_right_into_a_bucket_made_again(made_again: tuple[Client, Path]) -> None:
    """Its new name would lead to content that is not there: it is taken back, and the old name is nobody's prey."""
    client, top = made_again
    the_stranger_is_safe(client, top, "rename")

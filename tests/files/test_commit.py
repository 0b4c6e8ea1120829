"""Commits and renames in all interleavings, without a kernel in between, against a real server."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from natsfs.catalog.inodes import ROOT_INO, Inode
from natsfs.catalog.metadata import Metadata, new_nuid
from natsfs.config import Config, Credentials
from natsfs.errors import Conflict, StoreError
from natsfs.files.files import Files
from natsfs.files.manifest import Manifest
from natsfs.namespace import Caller, Namespace
from natsfs.options import Options
from natsfs.store.publish import Known
from natsfs.store.segments import Kept, Spooled
from natsfs.volume import Volume
from tests.support import Client, Server, noise

CALLER = Caller(os.getuid(), os.getgid(), os.getpid())


@dataclass
class System:
    """One bucket with everything but the kernel."""

    volume: Volume
    files: Files
    names: Namespace

    @property
    def root(self) -> Inode:
        return self.volume.inodes.get(ROOT_INO)

    async def find(self, path: str) -> Inode:
        inode = self.root
        for part in path.split("/"):
            found = await self.names.lookup(inode, part.encode())
            assert found is not None, path
            inode = found
        inode.nlookup += 1
        return inode

    async def create(self, path: str) -> int:
        parent, _, name = path.rpartition("/")
        directory = await self.find(parent) if parent else self.root
        inode = await self.names.create(directory, name.encode(), 0o644, os.O_WRONLY | os.O_CREAT, CALLER)
        inode.nlookup += 1
        fh = await self.files.open(inode, os.O_RDWR)
        await self.files.handle(fh).file.truncate(0)
        return fh

    async def open(self, path: str, flags: int = os.O_RDWR) -> int:
        return await self.files.open(await self.find(path), flags)

    async def close(self, fh: int) -> None:
        try:
            await self.files.flush(fh)
        finally:
            await self.files.release(fh)

    async def rename(self, old: str, new: str) -> None:
        places = []
        for path in (old, new):
            parent, _, name = path.rpartition("/")
            places.append((await self.find(parent) if parent else self.root, name.encode()))
        await self.names.rename(*places[0], *places[1], CALLER)

    async def seen(self, path: str) -> Inode:
        """What the watch brings."""
        with trio.fail_after(5):
            while True:
                try:
                    return await self.find(path)
                except AssertionError:
                    await trio.sleep(0.005)


def run(
    server: Server, bucket: str, folder: Path, work: Callable[[System], Awaitable[None]], **options: Any
) -> list[str]:
    """Returns what could not be saved."""
    config = Config(
        servers=(server.url,),
        bucket=bucket,
        prefix="",
        mountpoint="/nowhere",
        display_source="test",
        credentials=Credentials(),
        options=Options(spool_dir=str(folder / "spool"), **{"timeout": 20.0} | options),
    )

    async def main() -> list[str]:
        with trio.fail_after(90):
            async with trio.open_nursery() as nursery:
                volume = Volume(config, nursery)
                files = Files(volume, nursery)
                await volume.start(nursery)
                await work(System(volume, files, Namespace(volume, files)))
                await files.close()
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await volume.close()
        return files.unsaved

    return trio.run(main)


@pytest.mark.parametrize("seed", range(2))
def test_syncing_while_another_thread_writes(
    nats_server: Server, bucket: str, client: Client, tmp_path: Path, seed: int
) -> None:
    """Every version that was committed is whole, whatever was written while its metadata was on its way."""
    dice = random.Random(seed)
    model = bytearray()

    async def work(system: System) -> None:
        fh = await system.create("f")
        writing = True

        async def write() -> None:
            nonlocal writing
            for number in range(200):
                data = noise(dice.choice([1000, 65536, 300_000]), number)
                at = len(model) if number % 5 else dice.randrange(len(model) + 1)
                assert await system.files.write(fh, at, data) == len(data)
                model[at : at + len(data)] = data
                await trio.sleep(dice.choice([0, 0, 0.001, 0.01]))
            writing = False

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await trio.sleep(0.05)
            while writing:
                await system.files.fsync(fh)
                meta = client.stored(bucket, "f")
                # Counted a little later, so that nothing can be added unnoticed.
                await trio.sleep(0.02)
                assert client.chunks(bucket)[meta["nuid"]] == meta["chunks"]
        await system.close(fh)

    assert run(nats_server, bucket, tmp_path, work) == []
    assert client.read(bucket, "f") == model


@pytest.mark.parametrize("seed", range(3))
def test_changes_to_what_is_being_published_early(
    nats_server: Server, bucket: str, client: Client, tmp_path: Path, seed: int
) -> None:
    """A program writes a body and goes back to its header while the front of the file is on its way."""
    dice = random.Random(seed)
    models: dict[str, bytes] = {}

    async def work(system: System) -> None:
        for number in range(30):
            fh = await system.create(f"f{number}")
            model = bytearray(noise(dice.randrange(1_100_000, 4_000_000), number))
            await system.files.write(fh, 0, bytes(model))
            for _ in range(dice.randrange(6)):
                await trio.sleep(dice.choice([0, 0.0002, 0.0005]))
            for patch in range(1, dice.randrange(2, 4)):
                at = dice.randrange(1_000_000)
                await system.files.write(fh, at, bytes([patch]) * 6)
                model[at : at + 6] = bytes([patch]) * 6
            if number % 5 == 0:
                size = dice.randrange(len(model))
                await system.files.handle(fh).file.truncate(size)
                del model[size:]
            models[f"f{number}"] = bytes(model)
            await system.close(fh)

    run(nats_server, bucket, tmp_path, work)
    for name, model in models.items():
        assert client.read(bucket, name) == model


def test_for_what_a_long_upload_makes_room(
    nats_server: Server, bucket: str, client: Client, tmp_path: Path
) -> None:
    """For names, opened files, small reads and others' changes, and not for what the writer itself does."""

    async def work(system: System) -> None:
        courtesy = system.volume.store.courtesy
        fh = await system.create("f")

        async def counts(call: Awaitable[object], within: float = 0.2) -> bool:
            before = courtesy.count
            await call
            for _ in range(int(within / 0.02)):  # for what the watch brings
                if courtesy.count > before:
                    return True
                await trio.sleep(0.02)
            return False

        assert not await counts(system.files.write(fh, 0, noise(2_000_000)))
        assert not await counts(system.files.fsync(fh))
        assert await counts(system.names.lookup(system.root, b"nothing"))
        assert await counts(system.names.entries(system.root))
        theirs = noise(3_000_000)
        assert await counts(trio.to_thread.run_sync(client.put, bucket, "theirs", theirs), within=10)
        inode = await system.seen("theirs")
        assert await counts(system.files.open(inode, os.O_RDONLY))
        handle = await system.files.open(inode, os.O_RDONLY)
        assert not await counts(system.files.read(handle, 0, 1_000_000))
        assert await counts(system.files.read(handle, 2_000_000, 4096))
        await system.close(fh)

    assert run(nats_server, bucket, tmp_path, work) == []


def test_content_that_builds_on_a_replaced_version_is_refused_and_kept(
    nats_server: Server, bucket: str, client: Client, tmp_path: Path
) -> None:
    client.put(bucket, "f", b"old content")

    async def work(system: System) -> None:
        one, other = await system.open("f"), await system.open("f")
        await system.files.write(one, 0, b"NEW")
        await system.files.write(other, 4, b"NEW")
        client.put(bucket, "f", b"theirs")
        for fh in (one, other):
            # Both have lost something, so both hear of it.
            with pytest.raises(StoreError) as refused:
                await system.files.flush(fh)
            assert refused.value.errno == errno.ESTALE
        for fh in (one, other):
            await system.files.flush(fh)
            await system.files.release(fh)

    unsaved = run(nats_server, bucket, tmp_path, work)
    assert len(unsaved) == 1
    assert client.read(bucket, "f") == b"theirs"
    (kept,) = (tmp_path / "spool" / "failed").glob("*.data")
    assert kept.read_bytes()[:3] == b"NEW"


@pytest.mark.semantics("recover-whole")
def test_what_is_refused_is_kept_whole(
    nats_server: Server, bucket: str, client: Client, tmp_path: Path
) -> None:
    """Of a small file the rest is fetched at the first write: by the time of the commit it is gone from the store."""
    old = noise(300_000)
    client.put(bucket, "f", old)

    async def work(system: System) -> None:
        fh = await system.open("f")
        await system.files.write(fh, 7, b"NEW")
        version = system.files.handle(fh).file.version()
        assert version is not None
        for _ in range(2000):
            if version.layout is not None and not system.volume.reader._missing(version, 0, 3):
                break
            await trio.sleep(0.005)
        client.put(bucket, "f", b"theirs")
        with pytest.raises(StoreError) as refused:
            await system.close(fh)
        assert refused.value.errno == errno.ESTALE

    assert len(run(nats_server, bucket, tmp_path, work)) == 1
    (kept,) = (tmp_path / "spool" / "failed").glob("*.data")
    assert kept.read_bytes() == old[:7] + b"NEW" + old[10:]
    manifest = Manifest.decode(kept.with_suffix(".json").read_text())
    assert manifest.segments == (Spooled(0, 300_000),)
    assert manifest.base is None


def test_what_the_spool_has_no_room_for_is_told(
    nats_server: Server, bucket: str, client: Client, tmp_path: Path
) -> None:
    """Where the rest does not fit, the manifest says which version has it."""
    old = noise(2_000_000)
    client.put(bucket, "f", old)
    nuid = client.stored(bucket, "f")["nuid"]

    async def work(system: System) -> None:
        fh = await system.open("f")
        await system.files.write(fh, 7, b"NEW")
        client.change_bucket(bucket, sealed=True)
        with pytest.raises(StoreError):
            await system.close(fh)

    run(nats_server, bucket, tmp_path, work, spool_size=1_000_000)
    (kept,) = (tmp_path / "spool" / "failed").glob("*.data")
    manifest = Manifest.decode(kept.with_suffix(".json").read_text())
    assert manifest.base is not None
    assert (manifest.base.nuid, manifest.base.size) == (nuid, 2_000_000)
    assert manifest.segments is not None
    assert manifest.segments[-1] == Kept(manifest.segments[-1].start, 2_000_000)
    data = kept.read_bytes()
    for segment in manifest.segments:
        if isinstance(segment, Spooled):
            new = old[:7] + b"NEW" + old[10:]
            assert data[segment.start : segment.end] == new[segment.start : segment.end]


def test_nothing_is_taken_in_after_the_first_commit_failed(
    nats_server: Server, bucket: str, client: Client, tmp_path: Path
) -> None:
    client.change_bucket(bucket, max_bytes=500_000)

    async def work(system: System) -> None:
        fh = await system.create("f")
        await system.files.write(fh, 0, noise(900_000))
        with pytest.raises(StoreError) as full:
            await system.files.fsync(fh)
        assert full.value.errno == errno.ENOSPC
        with pytest.raises(StoreError):
            await system.files.write(fh, 0, b"this would be lost")
        await system.files.release(fh)
        assert await system.names.lookup(system.root, b"f") is None

    assert len(run(nats_server, bucket, tmp_path, work)) == 1


@pytest.mark.semantics("building-on-old-fails")
def test_a_name_that_others_remove_while_it_is_written_comes_back_with_the_new_content(
    nats_server: Server, bucket: str, client: Client, tmp_path: Path
) -> None:
    client.put(bucket, "f", b"old")

    async def work(system: System) -> None:
        fh = await system.open("f")
        file = system.files.handle(fh).file
        await file.truncate(0)
        await system.files.write(fh, 0, b"new")
        client.delete(bucket, "f")
        with trio.fail_after(5):
            while file.inode.node is not None:  # noqa: ASYNC110 - the watch has no event for tests
                await trio.sleep(0.01)
        await system.close(fh)

    assert run(nats_server, bucket, tmp_path, work) == []
    assert client.read(bucket, "f") == b"new"


def test_a_commit_whose_outcome_is_unknown_never_loses_its_chunks(
    fresh_server: Server, tmp_path: Path
) -> None:
    """The server stops in the middle, and takes the metadata after the commit was given up."""
    client = fresh_server.client
    client.create_bucket("b")

    async def work(system: System) -> None:
        for number in range(12):
            fh = await system.create(f"f{number}")
            await system.files.write(fh, 0, noise(200_000, number))
            outcome: list[StoreError] = []

            async def flush(fh: int = fh, outcome: list[StoreError] = outcome) -> None:
                try:
                    await system.files.flush(fh)
                except StoreError as error:
                    outcome.append(error)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(flush)
                await trio.sleep(0.0012 * number)
                fresh_server.pause()
                await trio.sleep(1.6)
                fresh_server.resume()
            await system.files.release(fh)
        await trio.sleep(4)  # the purges have had their turn

    run(fresh_server, "b", tmp_path, work, timeout=1.0, purge_grace=0.1)
    for name in client.names("b"):
        assert client.read("b", name) == noise(200_000, int(name[1:]))


def test_what_was_sent_before_chunks_are_given_up_is_refused_from_then_on(
    nats_server: Server, bucket: str, client: Client, tmp_path: Path
) -> None:
    """A message that is still on its way when nobody waits for it any more must not come to life without chunks."""

    async def work(system: System) -> None:
        volume = system.volume
        fh = await system.create("there")
        await system.close(fh)
        catalog = (await system.find("there")).bucket
        assert catalog is not None
        for name in ("there", "new"):
            subject = catalog.subject_of(name)
            before = catalog.last_seq(subject)
            late = Metadata(name=name, bucket=bucket, nuid=new_nuid(), size=1, chunks=1, subject=subject)
            volume.discard_unless_live(catalog, late.nuid, subject, refused=False)
            with trio.fail_after(10):
                while volume.purges.waiting:  # noqa: ASYNC110 - the queue has no event for tests
                    await trio.sleep(0.01)
            with pytest.raises(Conflict):
                await volume.store.publish(late, Known(before), volume.store.new_op())

    assert run(nats_server, bucket, tmp_path, work, purge_grace=0.1) == []
    assert client.names(bucket) == {"there"}


def test_a_rename_that_leaves_a_directory_empty_beside_the_rename_of_a_directory(
    nats_server: Server, bucket: str, client: Client, tmp_path: Path
) -> None:
    for number in range(20):
        client.put(bucket, f"only{number}/f", b"x")
        client.put(bucket, f"dir{number}/f", b"x")

    async def work(system: System) -> None:
        for number in range(20):
            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(system.rename, f"only{number}/f", f"f{number}")
                    nursery.start_soon(system.rename, f"dir{number}", f"new{number}")

    run(nats_server, bucket, tmp_path, work)
    expected = {f"f{n}" for n in range(20)} | {f"new{n}/f" for n in range(20)}
    assert {name for name in client.names(bucket) if not name.endswith("/")} == expected


@pytest.mark.parametrize("seed", range(3))
def test_renames_while_others_replace_the_old_name(
    nats_server: Server, bucket: str, client: Client, tmp_path: Path, seed: int
) -> None:
    """Whoever comes first: what the other client put is not buried unseen.

    The version that was renamed may lose its chunks: a client that read the old name's metadata before the rename
    purges them afterwards, and nothing can tell it not to.
    """
    dice = random.Random(seed)
    client.put(bucket, "a", b"0")

    async def work(system: System) -> None:
        for number in range(1, 40):
            await system.seen("a")
            newest = str(number).encode()

            async def put(content: bytes = newest) -> None:
                await trio.to_thread.run_sync(client.put, bucket, "a", content)

            async def rename() -> None:
                await trio.sleep(dice.random() * 0.004)
                with contextlib.suppress(StoreError, OSError):
                    await system.rename("a", "b")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(put)
                nursery.start_soon(rename)
            live = {}
            for name in client.names(bucket):
                with contextlib.suppress(AssertionError):
                    live[name] = client.read(bucket, name)
            assert newest in live.values(), f"{newest!r} is lost, there is {live}"
            if "a" not in live:
                client.put(bucket, "a", b"again")

    run(nats_server, bucket, tmp_path, work)


def test_attributes_and_a_rename_at_the_same_time(
    nats_server: Server, bucket: str, client: Client, tmp_path: Path
) -> None:
    client.put(bucket, "a0", b"content")

    async def work(system: System) -> None:
        for number in range(30):
            inode = await system.find(f"a{number}")

            async def change(inode: Inode = inode, number: int = number) -> None:
                await system.names.set_attributes(inode, mode=0o600 + number)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(change)
                nursery.start_soon(system.rename, f"a{number}", f"a{number + 1}")
            assert client.names(bucket) == {f"a{number + 1}"}, "one nuid under two names"

    run(nats_server, bucket, tmp_path, work)
    assert client.read(bucket, "a30") == b"content"
    assert client.stored(bucket, "a30")["metadata"]["mode"] == f"{0o100600 + 29:o}"


def test_a_bucket_that_others_have_just_filled_is_not_removed(
    nats_server: Server, bucket: str, client: Client, tmp_path: Path
) -> None:
    """Also where the name had been deleted before, so that its subject is nothing new."""
    client.put(bucket, "f", b"old")
    client.delete(bucket, "f")

    async def work(system: System) -> None:
        mounted = system.volume.buckets[bucket]
        await system.volume.store.unwatch(bucket)  # as far behind as a watch can be
        client.put(bucket, "f", b"new")
        with pytest.raises(OSError) as refused:
            await system.names._remove_bucket(mounted)
        assert refused.value.errno == errno.ENOTEMPTY

    run(nats_server, bucket, tmp_path, work)
    assert client.read(bucket, "f") == b"new"

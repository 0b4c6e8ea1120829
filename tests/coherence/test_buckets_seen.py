"""What happens to whole buckets shows as soon: purges, removal, settings, expiry, mirrors, leaf nodes."""

from __future__ import annotations

import errno
import json
import os
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.coherence.test_seen_at_once import described, entry, shows, view, whole
from tests.support import (
    Client,
    Mount,
    Mounter,
    Server,
    digest_of,
    encode,
    new_nuid,
    noise,
    opened,
    raises,
    until,
)

SECOND = 1_000_000_000


@pytest.mark.semantics("purges-show-at-once")
@pytest.mark.parametrize("pattern", ["everything", "metadata", "one"])
def test_purge(folders: tuple[Path, Path], client: Client, pattern: str) -> None:
    """Names whose metadata is purged, which no message of the stream tells of, are gone."""
    here, _ = folders
    (here / "d").mkdir()
    for number in range(20):
        (here / f"d/{number}").write_bytes(b"x")
    (here / "f").write_bytes(b"y")
    view(here)
    view(here / "d")
    subjects = {"metadata": f"$O.{here.name}.M.>", "one": f"$O.{here.name}.M.{encode('f')}"}
    client.api(
        f"STREAM.PURGE.OBJ_{here.name}", {"filter": subjects[pattern]} if pattern in subjects else None
    )
    shows(here, {"d": "directory"} if pattern == "one" else {}, "f")
    client.put(here.name, "d/1", b"new")
    until(lambda: entry(here / "d/1") == whole(b"new"))


@pytest.mark.semantics("purges-show-at-once")
@pytest.mark.parametrize("newest", ["only", "version", "tombstone", "after tombstone"])
def test_a_deleted_message(folders: tuple[Path, Path], client: Client, newest: str) -> None:
    """`nats stream rmm` of a name's newest message: what the message before it says shows, and can be changed."""
    here, _ = folders
    view(here, "f")
    first = client.put(here.name, "f", b"first")
    dead = first | {"size": 0, "chunks": 0, "deleted": True}
    second = first | {"nuid": new_nuid(), "size": 3, "digest": digest_of(b"2nd")}
    client.publish_chunk(here.name, second["nuid"], b"2nd")
    if newest == "after tombstone":
        client.publish_meta(dead)
    if newest == "only":
        seq = client.publish_meta(second)
    else:
        seq = client.publish_beside(dead if newest == "tombstone" else second)
    shows(here, {} if newest == "tombstone" else {"f": whole(b"2nd")}, "f")
    client.delete_message(here.name, seq)
    shows(here, {"f": whole(b"first")} if newest in ("version", "tombstone") else {}, "f")
    if newest in ("version", "tombstone"):
        with opened(here / "f", os.O_RDWR) as fd:
            os.pwrite(fd, b"F", 0)
        assert client.read(here.name, "f") == b"First"
    (here / "f").write_bytes(b"goes on")
    assert client.read(here.name, "f") == b"goes on"


@pytest.mark.semantics("buckets-show-at-once")
def test_a_bucket_comes_and_goes(mounts: tuple[Mount, Mount], client: Client) -> None:
    """A bucket that another client makes is a directory, and is none when its stream is deleted."""
    root = mounts[0].path
    assert not (root / "made").exists()
    client.create_bucket("made")
    until(lambda: (root / "made").is_dir())
    assert "made" in os.listdir(root)
    client.put("made", "f", b"1")
    until(lambda: (root / "made/f").exists())
    view(root / "made")
    client.delete_bucket("made")
    until(lambda: not (root / "made").exists())
    assert "made" not in os.listdir(root)


@pytest.mark.semantics("buckets-show-at-once")
@pytest.mark.parametrize("alone", [False, True])
def test_a_bucket_made_again(
    client: Client, bucket: str, mounts: tuple[Mount, Mount], mount: Mounter, alone: bool
) -> None:
    """A bucket that is deleted and created again under its name at once shows what is in the new one, only."""
    if alone:
        mounted = mount(f"/{bucket}")
        folder = mounted.path
    else:
        mounted = mounts[0]
        folder = mounted.path / bucket
        until(folder.is_dir)
    mounted.allow("does not exist any more|re-created or restored")
    (folder / "old").write_bytes(b"old")
    (folder / "both").write_bytes(b"mine")
    view(folder, "new")
    client.delete_bucket(bucket)
    client.create_bucket(bucket)
    client.put(bucket, "new", noise(1000))
    client.put(bucket, "both", b"theirs")
    shows(folder, {"new": whole(noise(1000)), "both": whole(b"theirs")}, "old")
    (folder / "more").write_bytes(b"goes on")
    assert client.read(bucket, "more") == b"goes on"


@pytest.mark.semantics("buckets-show-at-once")
def test_the_mounted_bucket_is_deleted(client: Client, bucket: str, mount: Mounter) -> None:
    """The mount's only bucket goes: everything in it is gone; it comes back with a bucket of the same name."""
    mounted = mount(f"/{bucket}")
    mounted.allow("does not exist any more|re-created or restored")
    (mounted.path / "f").write_bytes(b"x")
    view(mounted.path)
    client.delete_bucket(bucket)
    shows(mounted.path, {}, "f")
    client.create_bucket(bucket)
    client.put(bucket, "g", b"y")
    shows(mounted.path, {"g": whole(b"y")}, "f")


def refusal(path: Path) -> int | None:
    """The error of an attempt to open a file for writing, which changes nothing."""
    try:
        os.close(os.open(path, os.O_WRONLY))
    except OSError as error:
        return error.errno
    return None


@pytest.mark.semantics("settings-show-at-once")
def test_sealing(folders: tuple[Path, Path], mounts: tuple[Mount, Mount], client: Client) -> None:
    """A bucket that is sealed is read-only at once: EROFS before anything is written; reading goes on."""
    here, _ = folders
    mounts[0].allow("read-only")
    mounts[1].allow("read-only")
    (here / "f").write_bytes(b"sealed in")
    client.change_bucket(here.name, sealed=True)

    assert until(lambda: refusal(here / "f")) == errno.EROFS
    for change in (
        lambda: (here / "new").mkdir(),
        lambda: (here / "new").write_bytes(b""),
        lambda: (here / "f").unlink(),
        lambda: (here / "f").rename(here / "g"),
        lambda: (here / "f").chmod(0o600),
    ):
        with raises(errno.EROFS):
            change()
    assert view(here) == {"f": whole(b"sealed in")}


@pytest.mark.semantics("settings-show-at-once")
def test_a_changed_limit(client: Client, bucket: str, mount: Mounter) -> None:
    """A new max_bytes is what df(1) shows; a write over it is ENOSPC at close, and room given later is used."""
    mounted = mount(f"/{bucket}", "purge_grace=0")
    mounted.allow_failed()
    mounted.allow("no space|maximum bytes")
    (mounted.path / "f").write_bytes(noise(10_000))
    assert os.statvfs(mounted.path).f_blocks * 4096 > 1 << 40
    client.change_bucket(bucket, max_bytes=1024 * 1024)
    until(lambda: os.statvfs(mounted.path).f_blocks == 256)
    with raises(errno.ENOSPC):
        (mounted.path / "big").write_bytes(noise(2_000_000))
    assert view(mounted.path) == {"f": whole(noise(10_000))}
    client.change_bucket(bucket, max_bytes=4 * 1024 * 1024)
    (mounted.path / "big").write_bytes(noise(2_000_000))
    assert client.read(bucket, "big") == noise(2_000_000)


@pytest.mark.semantics("expired")
def test_an_expired_object(client: Client, mount: Mounter) -> None:
    """In a bucket with a TTL a name is gone soon after its object has expired, though nothing tells of it."""
    client.create_bucket("brief", max_age=3 * SECOND, duplicate_window=SECOND)
    try:
        mounted = mount("/brief")
        folder = mounted.path
        client.put("brief", "theirs", b"1")
        (folder / "mine").write_bytes(b"2")
        until(lambda: len(os.listdir(folder)) == 2)
        view(folder)
        until(lambda: client.subjects("brief", "M") == {}, 10)
        shows(folder, {}, "theirs", "mine")
    finally:
        client.delete_bucket("brief")
    mounted.allow("does not exist any more")


@pytest.mark.semantics("expired")
@pytest.mark.parametrize("size", [1000, 3_000_000])
def test_content_that_expired_under_its_metadata(client: Client, mount: Mounter, size: int) -> None:
    """chmod renews an object's metadata, not its content: when that has expired open(2) finds no such file."""
    client.create_bucket("renewed", max_age=4 * SECOND, duplicate_window=SECOND)
    try:
        mounted = mount("/renewed")
        mounted.allow("are gone|does not exist any more")
        client.put("renewed", "f", noise(size))
        until(lambda: (mounted.path / "f").exists())
        time.sleep(2)
        (mounted.path / "f").chmod(0o600)
        until(lambda: client.chunks("renewed") == {}, 10)
        assert client.stored("renewed", "f")["size"] == size
        with raises(errno.ENOENT):
            (mounted.path / "f").read_bytes()
    finally:
        client.delete_bucket("renewed")


@contextmanager
def mirror_of(client: Client, bucket: str) -> Iterator[str]:
    """A mirror of a bucket, as a bucket of its own."""
    client.api(
        "STREAM.CREATE.OBJ_mirror",
        {
            "name": "OBJ_mirror",
            "mirror": {
                "name": f"OBJ_{bucket}",
                # Without it the objects would lie under the names of the other bucket, where no client looks.
                "subject_transforms": [{"src": f"$O.{bucket}.>", "dest": "$O.mirror.>"}],
            },
            "storage": "file",
            "allow_direct": True,
            "mirror_direct": False,
            "num_replicas": 1,
        },
    )
    try:
        yield "mirror"
    finally:
        client.delete_bucket("mirror")


@pytest.mark.semantics("mirrors")
def test_a_mirror(client: Client, bucket: str, mount: Mounter) -> None:
    """A mirror of a bucket shows the same objects as soon as they arrive, and is read-only."""
    with mirror_of(client, bucket) as mirror:
        mounted = mount(f"/{mirror}")
        mounted.allow("read-only|does not exist any more")
        view(mounted.path, "f")
        client.put(bucket, "f", noise(400_000))
        shows(mounted.path, {"f": whole(noise(400_000))})
        client.put(bucket, "f", b"new")
        shows(mounted.path, {"f": whole(b"new")})
        with raises(errno.EROFS):
            (mounted.path / "g").write_bytes(b"x")
        client.delete(bucket, "f")
        shows(mounted.path, {}, "f")


@pytest.mark.semantics("mirrors")
def test_changes_of_a_mirrored_bucket(client: Client, bucket: str, mount: Mounter) -> None:
    """natsfs' renames, attributes and removals reach a mirror; what is purged stays until it is purged there."""
    with mirror_of(client, bucket) as mirror:
        source, mounted = mount(f"/{bucket}"), mount(f"/{mirror}")
        mounted.allow("read-only|does not exist any more")
        here, there = source.path, mounted.path
        (here / "a").write_bytes(noise(300_000))
        (here / "d").mkdir()
        (here / "d/e").write_bytes(b"e")
        shows(there, {"a": whole(noise(300_000)), "d": "directory"}, "b", "c")
        ino = (there / "a").stat().st_ino
        (here / "a").rename(here / "b")
        (here / "b").chmod(0o600)
        (here / "d").rename(here / "c")
        shows(there, {"b": whole(noise(300_000)), "c": "directory"}, "a", "d")
        shows(there / "c", {"e": whole(b"e")})
        until(lambda: (there / "b").stat().st_mode & 0o777 == 0o600)
        assert (there / "b").stat().st_ino == ino
        client.publish_meta(client.stored(bucket, "b") | {"description": "new"})
        until(lambda: described(there / "b") == "new")
        (here / "c/e").unlink()
        (here / "c").rmdir()
        shows(there, {"b": whole(noise(300_000))}, "c")
        # Go's rename is a put and a purge: a mirror has both names, each with the content, and keeps the old one.
        client.rename(bucket, "b", "z")
        shows(here, {"z": whole(noise(300_000))}, "b")
        shows(there, {"b": whole(noise(300_000)), "z": whole(noise(300_000))})
        client.delete(bucket, "z")
        shows(here, {}, "z")
        shows(there, {"b": whole(noise(300_000))}, "z")
        client.put(bucket, "g", b"purged")
        shows(there, {"b": whole(noise(300_000)), "g": whole(b"purged")})
        client.api(f"STREAM.PURGE.OBJ_{bucket}")
        shows(here, {}, "g")
        client.put(bucket, "last", b"1")  # it comes behind everything else
        shows(there, {"b": whole(noise(300_000)), "g": whole(b"purged"), "last": whole(b"1")})
        for name in ("b", "g"):
            client.api(f"STREAM.PURGE.OBJ_{mirror}", {"filter": f"$O.{mirror}.M.{encode(name)}"})
        shows(there, {"last": whole(b"1")}, "b", "g")


LEAF = """
server_name: {name}
jetstream {{ domain: {name} }}
accounts {{ A: {{ jetstream: enabled, users: [{{user: u, password: p}}] }} }}
no_auth_user: u
leafnodes {{ {leaf} }}
"""


@contextmanager
def leaf_node() -> Iterator[tuple[Server, Server]]:
    """A hub and a leaf node, each with a JetStream domain of its own."""
    hub = Server(LEAF.format(name="hub", leaf='listen: "127.0.0.1:-1"'))
    leaf: Server | None = None
    try:
        hub.start()
        with urllib.request.urlopen(f"{hub.monitoring}/varz", timeout=10) as answer:
            port = json.load(answer)["leaf"]["port"]
        remote = f'remotes: [{{ url: "nats://u:p@127.0.0.1:{port}", account: A }}]'
        leaf = Server(LEAF.format(name="leaf", leaf=remote))
        leaf.start()
        yield hub, leaf
    finally:
        if leaf is not None:
            leaf.close()
        hub.close()


@pytest.mark.semantics("domains")
def test_a_bucket_of_a_leaf_node(mount: Mounter) -> None:
    """domain=... reaches the buckets of a leaf node through the hub, and all changes of them show as well."""
    with leaf_node() as (hub, leaf):
        there = leaf.client
        there.create_bucket("far")
        there.put("far", "f", noise(300_000))
        hub.client.create_bucket("near")
        mounted = mount("", "domain=leaf,purge_grace=0", server=hub)
        mounted.allow("read-only|does not exist any more|no space|maximum bytes")
        mounted.allow_failed()
        root, folder = mounted.path, mounted.path / "far"
        assert view(root, "made") == {"far": "directory", "made": None}
        assert view(folder, "g") == {"f": whole(noise(300_000)), "g": None}
        there.put("far", "g", b"put there")
        shows(folder, {"f": whole(noise(300_000)), "g": whole(b"put there")})
        there.put("far", "g", b"once more")
        shows(folder, {"f": whole(noise(300_000)), "g": whole(b"once more")})
        (folder / "h").write_bytes(noise(200_000, 1))
        assert there.read("far", "h") == noise(200_000, 1)
        there.rename("far", "g", "i")
        until(lambda: sorted(os.listdir(folder)) == ["f", "h", "i"])
        there.delete("far", "f")
        until(lambda: sorted(os.listdir(folder)) == ["h", "i"])
        # Of purges, and of buckets that come and go, advisories alone tell; elsewhere it takes half a minute or more.
        there.api("STREAM.PURGE.OBJ_far", {"filter": f"$O.far.M.{encode('i')}"})
        shows(folder, {"h": whole(noise(200_000, 1))}, "i")
        there.api("STREAM.PURGE.OBJ_far")
        shows(folder, {}, "h")
        there.change_bucket("far", max_bytes=1024 * 1024)
        until(lambda: os.getxattr(folder, "user.nats.max_bytes") == b"1048576", 5)
        with raises(errno.ENOSPC):
            (folder / "big").write_bytes(noise(2_000_000))
        there.create_bucket("made")
        shows(root, {"far": "directory", "made": "directory"})
        there.put("made", "f", b"1")
        shows(root / "made", {"f": whole(b"1")})
        there.change_bucket("made", sealed=True)
        assert until(lambda: refusal(root / "made/f")) == errno.EROFS
        assert view(root / "made") == {"f": whole(b"1")}
        there.delete_bucket("made")
        shows(root, {"far": "directory"}, "made")
        (root / "ours").mkdir()
        assert sorted(there.buckets()) == ["far", "ours"]
        assert hub.client.buckets() == ["near"]
        assert mounted.finish() == []

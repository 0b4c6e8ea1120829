"""Objects whose chunks do not lie as natsfs would put them."""

from __future__ import annotations

import hashlib
import json
import os
import random
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support import CHUNK, Client, Mounter, encode, new_nuid, noise, opened, split, until

DATA = noise(3_000_017, 9)


def cut(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    """Chunks of these sizes, over and over."""
    chunks, start, number = [], 0, 0
    while start < len(data):
        chunks.append(data[start : start + sizes[number % len(sizes)]])
        start += sizes[number % len(sizes)]
        number += 1
    return chunks


def check(path: Path, data: bytes, seed: int = 0) -> None:
    """At the end, at random, and from start to end; in this order, so that nothing has been cached before."""
    assert path.stat().st_size == len(data)
    generator = random.Random(seed)
    with opened(path, os.O_RDONLY) as fd:
        assert os.pread(fd, 500, max(0, len(data) - 500)) == data[-500:]
        for _ in range(60):
            at, size = generator.randrange(len(data) + 10), generator.randrange(1, 400_000)
            assert os.pread(fd, size, at) == data[at : at + size]
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    "sizes",
    [[50_000], [1], [CHUNK, CHUNK - 1], [100_000, 1, 70_000, CHUNK], [CHUNK, CHUNK, CHUNK, 17]],
    ids=["short", "single bytes", "one short of full", "mixed", "nearly full"],
)
def test_short_chunks(bucket: str, mount: Mounter, client: Client, sizes: list[int]) -> None:
    """Go, Java, Rust and Python publish what their source gave them: chunks of any size below the limit."""
    data = DATA if sizes != [1] else DATA[:800]
    client.put(bucket, "f", cut(data, sizes))
    check(mount(f"/{bucket}").path / "f", data)


@pytest.mark.parametrize("chunks", [0, 1, 8])
def test_the_empty_last_chunk_of_dotnet(bucket: str, mount: Mounter, client: Client, chunks: int) -> None:
    """.NET adds an empty message where the size is a multiple of the chunk size, and leaves out zeros."""
    data = DATA[: chunks * CHUNK]
    meta = {"chunks": chunks, "mtime": None, "size": len(data)}
    nuid = new_nuid()
    for chunk in [*split(data), b""]:
        client.publish_chunk(bucket, nuid, chunk)
    digest = "SHA-256=" + urlsafe_b64encode(hashlib.sha256(data).digest()).decode()
    written = {
        "name": "f",
        "bucket": bucket,
        "nuid": nuid,
        "digest": digest,
        "options": {"max_chunk_size": CHUNK},
    }
    client.publish_meta(written | {key: value for key, value in meta.items() if value})
    path = mount(f"/{bucket}").path / "f"
    if data:
        check(path, data)
    assert path.read_bytes() == data
    with path.open("ab") as file:
        file.write(b"more")
    assert client.read(bucket, "f") == data + b"more"


@pytest.mark.parametrize("writers", [2, 6])
def test_scattered_chunks(bucket: str, mount: Mounter, client: Client, writers: int) -> None:
    """Objects that were put at the same time: their chunks lie between each other."""
    contents = {f"f{number}": noise(2_000_000 + 100_000 * number, number) for number in range(writers)}
    client.put_scattered(bucket, contents, writers)
    root = mount(f"/{bucket}").path
    for number, (name, content) in enumerate(contents.items()):
        check(root / name, content, number)


def test_scattered_and_irregular(bucket: str, mount: Mounter, client: Client) -> None:
    """Both at once."""
    nuid = new_nuid()
    for number, chunk in enumerate(cut(DATA, [60_000, 3, CHUNK])):
        client.publish_chunk(bucket, nuid, chunk)
        if number % 3 == 0:
            client.publish_chunk(bucket, "STRANGER", bytes(1000))
    chunks = len(cut(DATA, [60_000, 3, CHUNK]))
    digest = "SHA-256=" + urlsafe_b64encode(hashlib.sha256(DATA).digest()).decode()
    client.publish_meta(
        {"name": "f", "bucket": bucket, "nuid": nuid, "size": len(DATA), "chunks": chunks, "digest": digest}
    )
    check(mount(f"/{bucket}").path / "f", DATA)


@pytest.mark.parametrize("size", [1000, 512 * 1024, 1_000_000])
def test_other_chunk_sizes(bucket: str, mount: Mounter, client: Client, size: int) -> None:
    """An object with its own max_chunk_size, small or large."""
    data = DATA[:900_001] if size == 1000 else DATA
    client.put(bucket, "f", split(data, size), {"options": {"max_chunk_size": size}})
    check(mount(f"/{bucket}").path / "f", data)


def test_an_object_without_options(bucket: str, mount: Mounter, client: Client) -> None:
    """`options`, `mtime` and `digest` may be missing."""
    meta = client.put(bucket, "f", DATA)
    for key in ("options", "mtime", "digest"):
        del meta[key]
    client.publish_meta(meta)
    check(mount(f"/{bucket}").path / "f", DATA)


def test_metadata_of_many_kinds(bucket: str, mount: Mounter, client: Client) -> None:
    """Unusual but legal metadata: each of them is listed and readable."""
    client.put(
        bucket,
        "digest in other case",
        b"a",
        {"digest": "sha-256=ypeBEsobvcr6wjGzmiPcTaeG7_gUfE5yuYB3ha_uSLs="},
    )
    client.put(bucket, "odd digest", b"b", {"digest": "MD5=abc"})
    client.put(bucket, "unknown keys", b"c", {"revision": 7, "future": {"x": [1]}})
    client.put(bucket, "null values", b"d", {"description": None, "headers": None, "metadata": None})
    client.put(
        bucket, "odd attributes", b"e", {"metadata": {"mode": "rwx", "uid": "-1", "mtime": "yesterday"}}
    )
    client.put(bucket, "mtime empty", b"f", {"mtime": ""})
    mounted = mount(f"/{bucket}")
    mounted.allow("digest that cannot be read")
    found = {path.name: path.read_bytes() for path in mounted.path.iterdir()}
    assert sorted(found.values()) == [b"a", b"b", b"c", b"d", b"e", b"f"]


def test_messages_without_rollup(bucket: str, mount: Mounter, client: Client) -> None:
    """JavaScript's update leaves several messages on one metadata subject: the last one counts."""
    first = client.put(bucket, "f", b"first")
    second = client.put(bucket, "g", b"second!")
    renamed = second | {"name": "f"}
    client.run(client.js.publish(f"$O.{bucket}.M.{encode('f')}", json.dumps(renamed).encode()))
    client.api(f"STREAM.PURGE.OBJ_{bucket}", {"filter": f"$O.{bucket}.M.{encode('g')}"})
    assert client.subjects(bucket, "M") == {f"$O.{bucket}.M.{encode('f')}": 2}
    root = mount(f"/{bucket}").path
    assert os.listdir(root) == ["f"]
    assert (root / "f").read_bytes() == b"second!"
    (root / "f").write_bytes(b"third")
    assert client.read(bucket, "f") == b"third"
    assert first["nuid"] != second["nuid"]


@pytest.mark.semantics("foreign-links")
def test_links(bucket: str, mount: Mounter, client: Client) -> None:
    """A link to an object is a symbolic link that leads to it; writing through it changes its target."""
    client.put(bucket, "d/target", b"content")
    for name, link in (
        ("link", {"bucket": bucket, "name": "d/target"}),
        ("d/up", {"bucket": bucket, "name": "top"}),
    ):
        client.publish_meta(
            {
                "name": name,
                "bucket": bucket,
                "nuid": new_nuid(),
                "size": 0,
                "chunks": 0,
                "options": {"link": link},
            }
        )
    client.put(bucket, "top", b"at the top")
    root = mount(f"/{bucket}").path
    assert os.readlink(root / "link") == "d/target"
    assert (root / "link").read_bytes() == b"content"
    assert (root / "d/up").read_bytes() == b"at the top"
    (root / "link").write_bytes(b"changed")
    assert client.read(bucket, "d/target") == b"changed"
    (root / "link").unlink()
    assert (root / "d/target").read_bytes() == b"changed"


@pytest.mark.semantics("foreign-links")
def test_links_as_each_client_writes_them(bucket: str, mount: Mounter, client: Client) -> None:
    """JavaScript leaves out nuid and sizes; .NET puts the link's own name into a link to a whole bucket."""
    client.create_bucket("linked2")
    try:
        client.put("linked2", "sub/f", b"there")
        client.put(bucket, "d/f", b"here")
        javascript = {
            "name": "d/js",
            "bucket": bucket,
            "options": {"link": {"bucket": bucket, "name": "d/f"}},
        }
        client.run(client.js.publish(f"$O.{bucket}.M.{encode('d/js')}", json.dumps(javascript).encode()))
        for name in ("net", "sub/f"):
            client.publish_meta(
                {
                    "name": name,
                    "bucket": bucket,
                    "nuid": new_nuid(),
                    "options": {"link": {"bucket": "linked2", "name": name}},
                }
            )
        mounted = mount()
        root = mounted.path / bucket
        until(lambda: root.is_dir())
        assert os.readlink(root / "d/js") == "f"
        assert (root / "d/js").read_bytes() == b"here"
        assert os.listdir(root / "net") == ["sub"]
        assert (root / "sub/f").read_bytes() == b"there"
        for name in ("d/js", "net", "sub/f"):
            assert (root / name).lstat().st_size == len(os.readlink(root / name))
        assert mounted.finish() == []
    finally:
        client.delete_bucket("linked2")


@pytest.mark.semantics("foreign-links")
def test_a_link_between_buckets(bucket: str, mount: Mounter, client: Client) -> None:
    """In a mount of all buckets links lead from bucket to bucket, and to a bucket as a whole."""
    client.create_bucket("linked")
    try:
        client.put("linked", "f", b"there")
        for name, link in (("object", {"bucket": "linked", "name": "f"}), ("whole", {"bucket": "linked"})):
            meta = {"name": name, "bucket": bucket, "nuid": new_nuid(), "size": 0, "chunks": 0}
            client.publish_meta(meta | {"options": {"link": link}})
        mounted = mount()
        root = mounted.path / bucket
        until(lambda: root.is_dir())
        assert (root / "object").read_bytes() == b"there"
        assert os.listdir(root / "whole") == ["f"]
        assert mounted.finish() == []
    finally:
        client.delete_bucket("linked")

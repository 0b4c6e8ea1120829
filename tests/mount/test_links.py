"""Symbolic links: which of them other clients can follow, and that their text stays what it was."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import Client, Mounter, Server

LINKS = [
    ("to-file", "d/f", {"bucket": "{bucket}", "name": "d/f"}),
    ("d/beside", "f", {"bucket": "{bucket}", "name": "d/f"}),
    ("d/roundabout", ".././d//f", {"bucket": "{bucket}", "name": "d/f"}),
    ("absolute", "{root}/d/f", {"bucket": "{bucket}", "name": "d/f"}),
    ("to-bucket", "{root}", {"bucket": "{bucket}"}),
    ("d/to-bucket", "..", {"bucket": "{bucket}"}),
    ("to-directory", "d", None),
    ("to-link", "to-file", None),
    ("through-link", "to-bucket/d/f", None),
    ("dangling", "nowhere", None),
    ("below-file", "d/f/x", None),
    ("file-slash", "d/f/", None),
    ("outside", "../../../../../etc/passwd", None),
    ("elsewhere", "/etc/passwd", None),
    ("odd", "é\nx \udcff", None),
]


@pytest.mark.semantics("links-for-others", "readlink-text")
@pytest.mark.parametrize("all_buckets", [False, True])
def test_links_to_objects_and_others(
    nats_server: Server, bucket: str, mount: Mounter, client: Client, tmp_path: Path, all_buckets: bool
) -> None:
    """A target that is an object or a bucket is stored as such a link, every text comes back as it was."""
    client.put(bucket, "d/f", b"content")
    first = mount("" if all_buckets else f"/{bucket}", folder=tmp_path)
    root = first.path / bucket if all_buckets else first.path
    texts = {}
    for name, target, link in LINKS:
        texts[name] = target.replace("{root}", str(root))
        os.symlink(texts[name], root / name)
        stored = client.stored(bucket, name)
        expected = link and {key: value.replace("{bucket}", bucket) for key, value in link.items()}
        assert stored.get("options", {}).get("link") == expected, name
    assert first.finish() == []
    second = mount("" if all_buckets else f"/{bucket}", folder=tmp_path)
    root = second.path / bucket if all_buckets else second.path
    for name, text in texts.items():
        assert os.readlink(root / name) == text
        assert (root / name).lstat().st_size == len(os.fsencode(text))
    assert (root / "d/roundabout").read_bytes() == b"content"
    os.utime(root / "to-file", ns=(5, 7), follow_symlinks=False)
    (root / "to-file").rename(root / "d/moved")
    assert os.readlink(root / "d/moved") == "d/f"
    assert client.stored(bucket, "d/moved")["options"]["link"]["name"] == "d/f"
    assert (root / "d/moved").lstat().st_mtime_ns == 7


@pytest.mark.semantics("links-for-others")
def test_a_link_into_another_bucket(folder: Path, mount: Mounter, client: Client) -> None:
    client.create_bucket("target")
    try:
        client.put("target", "sub/f", b"there")
        root = mount().path
        (root / folder.name / "object").symlink_to("../target/sub/f")
        (root / folder.name / "whole").symlink_to(root / "target")
        link = client.stored(folder.name, "object")["options"]["link"]
        assert link == {"bucket": "target", "name": "sub/f"}
        assert client.stored(folder.name, "whole")["options"]["link"] == {"bucket": "target"}
        assert (root / folder.name / "whole/sub/f").read_bytes() == b"there"
    finally:
        client.delete_bucket("target")

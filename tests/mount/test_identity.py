"""Inode numbers and the times of directories: the same after a remount, and on every mount."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.support import Client, Mounter, until


def numbers(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.lstat().st_ino for path in root.rglob("*")}


def times(root: Path) -> dict[str, tuple[int, int]]:
    status = {str(path.relative_to(root)): path.lstat() for path in root.rglob("*")}
    return {name: (s.st_mtime_ns, s.st_ctime_ns) for name, s in status.items()}


@pytest.mark.semantics("inode-numbers", "times-persist")
def test_inode_numbers_and_times_after_a_remount(
    bucket: str, mount: Mounter, client: Client, tmp_path: Path
) -> None:
    client.put(bucket, "foreign/deep/f", b"x")
    client.put(bucket, "foreign/g", b"x")
    first = mount(f"/{bucket}", folder=tmp_path)
    root = first.path
    for name in ("a/b/c", "kept", "gone/x", "to"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "link").symlink_to("a")
    (root / "a/b/c").rename(root / "a/moved")  # leaves a/b empty
    (root / "kept").rename(root / "to")
    (root / "kept").write_text("a new file under the name of one that was renamed")
    (root / "gone/x").unlink()
    (root / "foreign/g").rename(root / "foreign/h")
    (root / "foreign/h").write_text("new content")
    (root / "a").rename(root / "directory")
    (root / "directory/moved").chmod(0o600)  # must not count as a change of the directory
    os.utime(root / "gone", ns=(1, 2_000_000_000_123_456_789))
    (root / "gone/y").touch()  # newer than the time that lies in the future
    before = numbers(root), times(root)
    assert len(set(before[0].values())) == len(before[0])
    assert before[1]["gone"][0] < 2_000_000_000_000_000_000
    assert first.finish() == []
    time.sleep(0.01)
    root = mount(f"/{bucket}", folder=tmp_path).path
    assert numbers(root) == before[0]
    assert times(root) == before[1]


@pytest.mark.semantics("inode-numbers")
def test_two_mounts_agree_on_inode_numbers(bucket: str, mount: Mounter, client: Client) -> None:
    here, there = mount(f"/{bucket}").path, mount(f"/{bucket}").path
    (here / "d").mkdir()
    (here / "d/f").write_text("x")
    (here / "d/f").rename(here / "d/g")
    client.put(bucket, "foreign", b"1")
    until(lambda: (there / "d/g").exists() and (here / "foreign").exists() and (there / "foreign").exists())
    assert numbers(here) == numbers(there)


@pytest.mark.semantics("inode-numbers")
def test_a_replaced_object_is_another_inode_after_a_remount_too(
    bucket: str, mount: Mounter, client: Client, tmp_path: Path
) -> None:
    client.put(bucket, "f", b"1")
    first = mount(f"/{bucket}", folder=tmp_path)
    before = (first.path / "f").stat().st_ino
    client.put(bucket, "f", b"2")
    until(lambda: (first.path / "f").read_bytes() == b"2")
    after = (first.path / "f").stat().st_ino
    assert after != before
    assert first.finish() == []
    assert (mount(f"/{bucket}", folder=tmp_path).path / "f").stat().st_ino == after

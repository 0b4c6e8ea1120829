"""What a mount does itself: the watch's echo of it costs nothing, and older news of others do not undo it."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from pathlib import Path

import pytest

from tests.coherence.proxy import Proxy
from tests.support import Client, Mount, Mounter, Server, content, encode, noise, opened, until

TELLING = "telling the kernel: "
PAGE = mmap.PAGESIZE
SIZE = 64 * PAGE


def in_memory(path: Path) -> int:
    """How many pages of a file the kernel has."""
    size = path.stat().st_size
    libc = ctypes.CDLL(None, use_errno=True)
    with opened(path, os.O_RDWR) as fd, mmap.mmap(fd, size) as mapped:
        pages = (ctypes.c_ubyte * (size // PAGE))()
        first = ctypes.c_ubyte.from_buffer(mapped)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), pages)
        del first
        assert not failed, os.strerror(ctypes.get_errno())
        return sum(page & 1 for page in pages)


def told(mounted: Mount) -> list[str]:
    """What the kernel was told, from the log."""
    return [line for line in mounted.log.read_text().splitlines() if TELLING in line]


@pytest.mark.semantics("own-changes")
def test_the_kernel_is_told_nothing_of_own_changes(bucket: str, client: Client, mount: Mounter) -> None:
    """Neither by the calls nor by the watch's echo: it keeps the names, the attributes and the pages."""
    mounted = mount(f"/{bucket}", "log_level=debug")
    top = mounted.path
    (top / "d/s").mkdir(parents=True)
    os.listdir(top)
    data = noise(SIZE)
    for name in ("kept", "d/renamed", "d/removed", "d/over", "cut"):
        (top / name).write_bytes(data)
    (top / "d/renamed").rename(top / "d/s/moved")
    (top / "kept").rename(top / "d/over")
    (top / "d/removed").unlink()
    (top / "d/s").rename(top / "e")
    (top / "d/link").symlink_to("over")
    (top / "d/exclusive").touch(exist_ok=False)
    os.setxattr(top / "d/over", "user.colour", b"green")
    with (top / "d/over").open("r+b") as file:
        file.write(bytes(PAGE))
    with (top / "d/over").open("ab") as file:
        file.write(bytes(PAGE))
    os.truncate(top / "cut", PAGE)
    (top / "d/over").chmod(0o600)
    (top / "d/gone").mkdir()
    (top / "d/gone").rmdir()
    until(lambda: client.stored(bucket, "d/over")["metadata"]["mode"].endswith("600"))
    # What the watch tells comes in order: with this all echoes have come.
    client.put(bucket, "last", b"")
    until(lambda: any("'last'" in line for line in told(mounted)))
    assert [line for line in told(mounted) if "ino=1)" not in line and "'last'" not in line] == []
    assert in_memory(top / "d/over") == SIZE // PAGE + 1
    assert in_memory(top / "e/moved") == SIZE // PAGE
    assert (top / "d/over").read_bytes() == bytes(PAGE) + data[PAGE:] + bytes(PAGE)


@pytest.mark.semantics("own-changes")
def test_older_news_of_others_arrive_after_own_changes(
    proxied: tuple[Server, Proxy], bucket: str, client: Client, mount: Mounter
) -> None:
    """They are held on their way to the mount, which sees what it did, in order, and does not go back."""
    server, proxy = proxied
    mounted = mount(f"/{bucket}", server=server)
    mounted.allow(" WARNING ")  # that the watch has heard nothing for long, on a slow machine
    top = mounted.path
    names = ("written", "renamed", "removed", "new")
    for name in names[:3]:
        (top / name).write_text("before")
    (top / "dropped").write_text("before")
    until(lambda: "dropped" in client.names(bucket))
    with proxy.holding(f".M.{encode('first')} ".encode(), answers=True) as hold:
        client.put(bucket, "first", b"")
        assert hold.holds.wait(10)
        for name in names:
            client.put(bucket, name, b"theirs")
        client.delete(bucket, "dropped")
        assert "new" not in os.listdir(top), "the news have come"
        for name in (*names, "dropped"):
            (top / name).write_text(f"my {name}")
            assert content(top / name) == f"my {name}".encode()
        (top / "renamed").rename(top / "to")
        (top / "removed").unlink()
        mine = {name: f"my {name}".encode() for name in ("written", "new", "dropped")}
        mine |= {"to": b"my renamed"}
        absent = dict.fromkeys(("renamed", "removed"))

        def view() -> dict[str, bytes | None]:
            return {name: content(top / name) for name in (*mine, *absent)}

        assert view() == mine | absent
        assert {*os.listdir(top)} == mine.keys()
        stop, seen = threading.Event(), []

        def look() -> None:
            while not stop.is_set():
                seen.append((view(), {*os.listdir(top)} - {"first", "last"}))

        looking = threading.Thread(target=look)
        looking.start()
        try:
            proxy.trickles = True  # else there is no moment between their news and the own echoes
            hold.release()
            until((top / "first").exists, 20)
            client.put(bucket, "last", b"")
            until((top / "last").exists, 20)
        finally:
            proxy.trickles = False
            stop.set()
            looking.join()
    assert seen
    assert all(one == (mine | absent, {*mine}) for one in seen)
    assert client.names(bucket) == {*mine, "first", "last"}
    assert {name: client.read(bucket, name) for name in mine} == mine

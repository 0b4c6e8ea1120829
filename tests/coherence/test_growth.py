"""A file that others append to, and who reads it in that moment."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from tests.coherence.proxy import Proxy
from tests.support import Client, Mounter, Server, opened, until

LARGE = 2 << 20  # bytes; so much is not fetched before an open(2) returns
END, MORE = b"a" * 100, b"b" * 19


def end_of(path: Path) -> bytes:
    with opened(path, os.O_RDONLY) as fd:
        return os.pread(fd, 4096, LARGE)


@pytest.mark.semantics("one-version-or-estale")
def test_a_read_is_under_way_while_the_file_grows(
    bucket: str, client: Client, proxied: tuple[Server, Proxy], mount: Mounter
) -> None:
    """What the read brings ends where the file ended: the kernel must not fill it up to the new end with zeros."""
    server, proxy = proxied
    slow, other = (mount(f"/{bucket}", server=server).path for _ in range(2))
    (other / "f").write_bytes(bytes(LARGE) + END)
    until((slow / "f").exists)
    nuid = client.stored(bucket, "f")["nuid"].encode()
    with opened(slow / "f", os.O_RDONLY) as fd, ThreadPoolExecutor() as threads:
        with proxy.holding(nuid) as hold:
            read = threads.submit(os.pread, fd, 4096, LARGE)
            assert hold.holds.wait(10)
            with (other / "f").open("ab") as file:
                file.write(MORE)
            (other / "later").touch()
            until((slow / "later").exists)
            # The kernel takes a new size at once, and only then waits for the pages that are being read.
            look = threads.submit(os.fstat, fd)
            wait([look], 0.5)
            hold.release()
        assert read.result(20) in (END, END + MORE)
        until(lambda: os.fstat(fd).st_size == LARGE + len(END + MORE))
        assert os.pread(fd, 4096, LARGE) == END + MORE
    assert end_of(slow / "f") == END + MORE

"""The end of a mount while a bucket is being listed, which for a large one takes its time."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from natsfs.store import login
from tests.coherence.proxy import Endless
from tests.support import REPOSITORY, Client, Mounter, Server, until

SOON = 20.0  # seconds; the listing would be waited for as long as `timeout` says
TIMEOUT = "timeout=100"


@pytest.fixture
def behind(nats_server: Server) -> Iterator[Server]:
    """The server, from which no listing comes to an end."""
    proxy = Endless(nats_server.port)
    server = Server()
    server.port, server._process, server._connected = proxy.port, nats_server._process, nats_server.client
    yield server
    proxy.close()


class Listing(threading.Thread):
    """A program that lists a directory; `error` is what it gets."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self._path = path
        self.error: int | None = None
        self.start()

    def run(self) -> None:
        try:
            os.listdir(self._path)
        except OSError as error:
            self.error = error.errno
        else:
            self.error = 0


@contextlib.contextmanager
def mounting(source: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A daemon in the foreground that has not mounted yet."""
    (folder / "mnt").mkdir()
    options = f"{TIMEOUT},spool_dir={folder}/spool"
    command = [sys.executable, "-P", "-m", "natsfs", "mount", "-f", "-o", options]
    with subprocess.Popen(
        [*command, source, folder / "mnt"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    ) as daemon:
        try:
            yield daemon
        finally:
            daemon.kill()


def ends(daemon: subprocess.Popen[str], number: signal.Signals) -> None:
    """It does so when it gets the signal."""
    daemon.send_signal(number)
    text = daemon.communicate(timeout=SOON)[1]
    assert daemon.returncode == 0, text
    assert "Traceback" not in text


def by_signal(number: signal.Signals) -> Callable[[int, Path], None]:
    return lambda pid, path: os.kill(pid, number)


def by_force(pid: int, path: Path) -> None:
    subprocess.run(["umount", "-i", "-f", "-l", path], check=True)


@pytest.mark.semantics("ends-while-listing")
@pytest.mark.parametrize(
    "end",
    [by_signal(signal.SIGTERM), by_signal(signal.SIGINT), by_force],
    ids=["SIGTERM", "SIGINT", "umount -f"],
)
def test_while_a_program_waits_for_a_bucket(
    bucket: str, behind: Server, mount: Mounter, client: Client, end: Callable[[int, Path], None]
) -> None:
    """It gets an error, and so does one that comes behind it; the consumer is gone with the daemon."""
    client.put(bucket, "f", b"data")
    mounted = mount("", TIMEOUT, server=behind)
    mounted.allow(f"bucket {bucket}")
    mounted.allow("fuse_reply_")  # nobody is there any more for the answer
    listings = [Listing(mounted.path / bucket) for _ in range(2)]
    until(lambda: client.consumers(bucket))
    end(mounted.pid, mounted.path)
    mounted.wait(SOON)
    for listing in listings:
        listing.join(SOON)
        assert listing.error in (errno.ENOTCONN, errno.ECONNABORTED)
    assert client.consumers(bucket) == []


@pytest.mark.semantics("ends-while-listing")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_anything_is_mounted(
    bucket: str, behind: Server, client: Client, tmp_path: Path, number: signal.Signals
) -> None:
    """A mount of one bucket has it listed first."""
    client.put(bucket, "f", b"data")
    with mounting(f"{behind.url}/{bucket}", tmp_path) as daemon:
        until(lambda: client.consumers(bucket), 20)
        ends(daemon, number)
    assert client.consumers(bucket) == []
    assert list((tmp_path / "spool").glob("mount-*")) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_it_logs_in(tmp_path: Path, number: signal.Signals) -> None:
    """The server says nothing, and would be waited for."""
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        mounting(f"nats://127.0.0.1:{silent.getsockname()[1]}/b", tmp_path) as daemon,
    ):
        silent.settimeout(SOON)
        connection, _ = silent.accept()
        with connection:
            began = time.monotonic()
            ends(daemon, number)
    assert time.monotonic() - began < 0.75 * login.LIMIT
    assert list((tmp_path / "spool").glob("mount-*")) == []

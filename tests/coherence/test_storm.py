"""Another client changes metadata faster than a mount can follow, under names that the kernel has in its caches."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import Client, Mounter, Server, content, digest_of, encode, new_nuid, until

NAMES = 2000
FILES = 280  # of these have content, so that there is something to read
MESSAGES = 30_000
RATE = 20_000  # messages a second
MEGABYTE = 1024 * 1024
# With it the storm is some 100 MB, which a queue without a bound would hold.
DESCRIPTION = "x" * 3000
# The server lets 32 MB be under way to a consumer; parsed, they take some more.
MEMORY = 72 * MEGABYTE
CATCH_UP = 15.0  # seconds; what the daemon waits for the processor, because of other programs, does not count
ANSWER = 5.0  # seconds for a call that the daemon has to answer; the median of all is some milliseconds


def name_of(number: int) -> str:
    return f"d{number % 7}/f{number}"


def text_of(number: int, version: int) -> bytes:
    return f"{name_of(number)} {version}\n".encode()


class Storm:
    """Puts and deletions, which an own connection sends: a client in Python is not fast enough."""

    def __init__(self, server: Server, bucket: str) -> None:
        self._port = server.port
        chunks: list[bytes] = []
        self._first: list[bytes] = []
        self._rest: list[bytes] = []
        self.live: dict[str, bytes] = {}  # in the end, with the content
        for at in range(NAMES + MESSAGES):
            number, version = at % NAMES, at // NAMES
            name, data = name_of(number), text_of(number, version) if number < FILES else b""
            meta = {"name": name, "bucket": bucket, "nuid": new_nuid(), "size": len(data), "chunks": 0}
            meta["description"] = DESCRIPTION
            self.live[name] = data
            if version and (number + version) % 5 == 0:
                meta |= {"size": 0, "deleted": True}
                del self.live[name]
            elif data:
                meta |= {"chunks": 1, "digest": digest_of(data)}
                chunks.append(f"PUB $O.{bucket}.C.{meta['nuid']} {len(data)}\r\n".encode() + data + b"\r\n")
            # Without rollup, as JavaScript updates: of those that others roll up a server drops what nobody waited for.
            body = json.dumps(meta).encode()
            line = f"PUB $O.{bucket}.M.{encode(name)} {len(body)}\r\n"
            (self._rest if version else self._first).append(line.encode() + body + b"\r\n")
        self._first = chunks + self._first

    def prepare(self) -> None:
        """The content of all versions, and the first of each name."""
        self._send(self._first, 0)

    def rage(self) -> float:
        """At `RATE` if the server takes it; returns how many messages a second it took."""
        return self._send(self._rest, RATE)

    def _send(self, frames: list[bytes], rate: int) -> float:
        with socket.create_connection(("127.0.0.1", self._port)) as connection:
            connection.sendall(b'CONNECT {"verbose":false,"headers":true}\r\n')
            started = time.monotonic()
            for at in range(0, len(frames), 200):
                connection.sendall(b"".join(frames[at : at + 200]))
                if rate:
                    time.sleep(max(0, at / rate - (time.monotonic() - started)))
            connection.sendall(b"PING\r\n")
            said = b""
            while b"PONG" not in said:
                said += connection.recv(4096)
            return len(frames) / (time.monotonic() - started)


def files(top: Path) -> set[str]:
    return {str((Path(where) / name).relative_to(top)) for where, _, names in os.walk(top) for name in names}


def processor(pid: int) -> tuple[float, float]:
    """Seconds that a process' main thread has run, and has waited for a processor."""
    ran, waited, _ = Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()
    return int(ran) / 1e9, int(waited) / 1e9


@contextlib.contextmanager
def meanwhile(*calls: Callable[[], object]) -> Iterator[None]:
    """Each is called again and again, in a thread of its own; the first error of one of them is raised in the end."""
    stop, errors = threading.Event(), []

    def again(call: Callable[[], object]) -> None:
        try:
            while not stop.is_set():
                call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=again, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for error in errors:
        raise error


@pytest.mark.semantics("changes-by-others-show")
def test_a_storm_of_changes(nats_server: Server, bucket: str, client: Client, mount: Mounter) -> None:
    """Programs list, look and read meanwhile and are answered soon; memory stays bounded, and the mount catches up."""
    storm = Storm(nats_server, bucket)
    storm.prepare()
    client.put(bucket, "quiet/f", b"")
    mounted = mount(f"/{bucket}")
    for number in range(NAMES):
        (mounted.path / name_of(number)).stat()
    newest = dict.fromkeys(range(FILES), 0)
    listings: list[int] = []
    readings: list[int] = []
    waits: list[float] = []

    def listing() -> None:
        listings.append(len(files(mounted.path)))

    def reading() -> None:
        number = random.randrange(FILES)
        try:
            data = (mounted.path / name_of(number)).read_bytes()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return
            raise
        version = int(data.split()[1])
        assert data == text_of(number, version)
        assert version >= newest[number], "went back"
        newest[number] = version
        readings.append(version)

    def asking() -> None:
        began = time.monotonic()
        assert not (mounted.path / "quiet" / f"unknown{len(waits)}").exists()  # the kernel has to ask
        os.listxattr(mounted.path / "quiet/f")
        waits.append(time.monotonic() - began)
        time.sleep(0.01)

    for number in range(FILES):
        assert (mounted.path / name_of(number)).read_bytes() == text_of(number, 0)
    before = mounted.memory()
    with meanwhile(listing, reading, asking):
        rate = storm.rage()
        ended, (ran, waited) = time.monotonic(), processor(mounted.pid)
        client.put(bucket, "last", b"")  # stored behind all of them, and told behind them
        until((mounted.path / "last").exists, 100)
        behind = time.monotonic() - ended
        ran, waited = (now - then for now, then in zip(processor(mounted.pid), (ran, waited), strict=True))
    more = mounted.memory() - before
    print(
        f"{rate:.0f} messages/s, {behind:.1f} s behind, of which {ran:.1f} s at work and {waited:.1f} s without a"
        f" processor; {more / MEGABYTE:.1f} MB more; {len(listings)} listings, {len(readings)} readings;"
        f" {len(waits)} calls: p50 {statistics.median(waits) * 1000:.1f} ms, max {max(waits) * 1000:.0f} ms"
    )
    assert rate > RATE / 4
    assert min(len(listings), len(readings), len(waits)) > 2
    assert behind - waited < CATCH_UP
    assert more < MEMORY
    assert statistics.median(waits) < ANSWER / 10
    assert max(waits) < ANSWER
    expected = {*storm.live, "last", "quiet/f"}
    assert client.names(bucket) == expected
    until(lambda: files(mounted.path) == expected, ANSWER)
    for name in map(name_of, range(FILES)):
        until(lambda name=name: content(mounted.path / name) == storm.live.get(name), ANSWER)  # type: ignore[misc]

"""Another client changes metadata faster than a mount can follow."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.support import Client, Mounter, Server, encode, new_nuid, until

NAMES = 2000
MESSAGES = 50_000
RATE = 20_000  # messages a second
MEGABYTE = 1024 * 1024
# The server lets 32 MB be under way to a consumer; parsed, they take some more.
MEMORY = 96 * MEGABYTE


def storm(server: Server, bucket: str) -> float:
    """Puts and deletions of empty objects, at `RATE` if the server takes them; returns how many a second it were.

    A socket and no client: one in Python is not fast enough.
    """
    header = b"NATS/1.0\r\nNats-Rollup: sub\r\n\r\n"
    frames = []
    for number in range(MESSAGES):
        name = f"d{number % 7}/f{number % NAMES}"
        meta = {"name": name, "bucket": bucket, "nuid": new_nuid(), "size": 0, "chunks": 0}
        if number % 3 == 0 and number < MESSAGES - NAMES // 2:
            meta["deleted"] = True
        body = header + json.dumps(meta).encode()
        line = f"HPUB $O.{bucket}.M.{encode(name)} {len(header)} {len(body)}\r\n"
        frames.append(line.encode() + body + b"\r\n")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b'CONNECT {"verbose":false,"headers":true}\r\n')
        started = time.monotonic()
        for at in range(0, MESSAGES, 200):
            connection.sendall(b"".join(frames[at : at + 200]))
            time.sleep(max(0, at / RATE - (time.monotonic() - started)))
        connection.sendall(b"PING\r\n")
        said = b""
        while b"PONG" not in said:
            said += connection.recv(4096)
        return MESSAGES / (time.monotonic() - started)


def files(top: Path) -> set[str]:
    return {str((Path(where) / name).relative_to(top)) for where, _, names in os.walk(top) for name in names}


@pytest.mark.semantics("changes-by-others-show")
def test_a_storm_of_changes(nats_server: Server, bucket: str, client: Client, mount: Mounter) -> None:
    """The daemon's memory stays bounded while it is listed, and afterwards it agrees with a fresh listing."""
    mounted = mount(f"/{bucket}")
    files(mounted.path)
    before = mounted.memory()
    stop = threading.Event()
    listings: list[int] = []

    def listing() -> None:
        while not stop.is_set():
            listings.append(len(files(mounted.path)))

    thread = threading.Thread(target=listing)
    thread.start()
    try:
        rate = storm(nats_server, bucket)
        client.put(bucket, "last", b"")  # is stored behind all that was received before
        ended = time.monotonic()
        expected = client.names(bucket)
        until(lambda: files(mounted.path) == expected, 60)
        behind = time.monotonic() - ended
    finally:
        stop.set()
        thread.join()
    print(
        f"{rate:.0f} messages/s, {behind:.1f} s behind, {(mounted.memory() - before) / MEGABYTE:.1f} MB more"
    )
    assert len(expected) > NAMES // 2
    assert len(listings) > 2
    assert mounted.memory() - before < MEMORY

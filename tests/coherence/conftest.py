"""Several mounts of everything, and the other clients."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.coherence.proxy import Proxy
from tests.coherence.writers import WRITERS, Writer
from tests.interop.clients import javascript_folder
from tests.support import Mount, Server

_numbers = count(1)


@pytest.fixture(scope="module")
def pair(nats_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mount, Mount]]:
    """All buckets of the server, mounted twice for the tests of a module."""
    mounts = [Mount.make(nats_server, tmp_path_factory.mktemp("coherent")) for _ in range(2)]
    yield mounts[0], mounts[1]
    problems = [problem for mount in mounts for problem in mount.finish()]
    assert not problems, "\n".join(problems)


@pytest.fixture
def mounts(pair: tuple[Mount, Mount]) -> Iterator[tuple[Mount, Mount]]:
    """The two mounts; their logs and spools are looked at after each test."""
    yield pair
    problems = [problem for mount in pair for problem in mount.check()]
    assert not problems, "\n".join(problems)


@pytest.fixture
def folders(nats_server: Server, mounts: tuple[Mount, Mount]) -> Iterator[tuple[Path, Path]]:
    """A new bucket, as a directory in each of the two mounts."""
    here, there = (mount.path / f"c{next(_numbers)}" for mount in mounts)
    there = there.with_name(here.name)
    here.mkdir()
    while not there.is_dir():  # until it shows
        pass
    yield here, there
    with contextlib.suppress(RuntimeError):
        nats_server.client.delete_bucket(here.name)


@pytest.fixture(scope="module")
def writers(nats_server: Server) -> Iterator[Callable[[str, Mount], Writer]]:
    """writers(KIND, MOUNT): somebody who writes; only "natsfs" does it through the mount."""
    made: dict[str, Writer] = {}

    def get(kind: str, mount: Mount) -> Writer:
        if kind == "javascript" and javascript_folder() is None:
            message = "node, or the packages of tests/js/package.json in $NATSFS_JS or .venv/js, are missing"
            if os.environ.get("NATSFS_REQUIRE_ALL") == "1":
                pytest.fail(message)
            pytest.skip(message)
        if kind not in made:
            made[kind] = WRITERS[kind](nats_server, mount.path)
        return made[kind]

    yield get
    for writer in made.values():
        writer.close()


@pytest.fixture
def proxied(nats_server: Server) -> Iterator[tuple[Server, Proxy]]:
    """The server behind a proxy, for `mount`."""
    proxy = Proxy(nats_server.port)
    behind = Server()
    behind.port = proxy.port
    behind._process, behind._connected = nats_server._process, nats_server.client
    yield behind, proxy
    proxy.close()

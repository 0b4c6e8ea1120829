"""A private nats-server, buckets, and mounts that are checked and taken down after each test."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support import LIVE, SOON, Client, Mount, Mounter, Server

_numbers = count(1)

# A property says nothing about speed: on a busy machine examples take as long as they take.
settings.register_profile("natsfs", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("natsfs")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fsx-operations", type=int, default=100_000, help="how many random calls test_fsx makes"
    )
    parser.addoption("--fsx-seed", type=int, help="make the calls of a run that failed again")
    parser.addoption(
        "--coherence-seconds",
        type=float,
        default=60.0,
        help="how long the random operations on several mounts go on, one half of it with cut connections"
        " (3600 is a thorough run)",
    )


@pytest.fixture(scope="session")
def nats_server() -> Iterator[Server]:
    """One server for the whole run; tests keep apart by their buckets."""
    server = Server()
    try:
        server.start()
        yield server
    finally:
        for mount in list(LIVE):
            mount.finish()
        server.close()


@pytest.fixture
def fresh_server() -> Iterator[Server]:
    """A server for one test, which may stop and start it."""
    server = Server()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def client(nats_server: Server) -> Client:
    """Another client of the server, one that does not know natsfs."""
    return nats_server.client


@pytest.fixture
def bucket(nats_server: Server, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a new, empty bucket."""
    name = f"b{next(_numbers)}"
    nats_server.client.create_bucket(name)
    yield name
    with contextlib.suppress(RuntimeError):  # the test has deleted it
        nats_server.client.delete_bucket(name)


@pytest.fixture
def mount(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounter]:
    """mount("/BUCKET", "option=value", ...) mounts; server= and folder= choose others than the usual ones.

    Afterwards every mount is taken down, and the test fails if anything of it stays behind or its log has a
    warning that the test did not allow.
    """
    made: list[Mount] = []

    def make(
        source: str = "", *options: str, server: Server | None = None, folder: Path | None = None
    ) -> Mount:
        used = server or request.getfixturevalue("nats_server")
        made.append(Mount.make(used, folder or tmp_path_factory.mktemp("mount"), source, *options))
        return made[-1]

    yield make
    problems = [problem for one in reversed(made) for problem in one.finish()]
    assert not problems, "\n".join(problems)


@pytest.fixture
def root(bucket: str, mount: Mounter) -> Path:
    """A new bucket, mounted alone."""
    return mount(f"/{bucket}").path


@pytest.fixture(scope="module")
def everything(nats_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """All buckets of the server, mounted once for all tests of a module. Use `folder` or `shared` in tests."""
    mount = Mount.make(nats_server, tmp_path_factory.mktemp("everything"))
    yield mount
    problems = mount.finish()
    assert not problems, "\n".join(problems)


@pytest.fixture
def shared(everything: Mount) -> Iterator[Mount]:
    """The module's mount of all buckets; its log and spool are looked at after each test."""
    yield everything
    problems = everything.check()
    assert not problems, "\n".join(problems)


@pytest.fixture
def folder(nats_server: Server, shared: Mount) -> Iterator[Path]:
    """A new bucket in the mount of all buckets: quicker to have than `root`."""
    path = shared.path / f"f{next(_numbers)}"
    path.mkdir()
    yield path
    # A file whose mapping has just gone is committed behind its last user's back; not into a bucket that is gone, too.
    deadline = time.monotonic() + SOON
    while shared.spooled() and time.monotonic() < deadline:
        time.sleep(0.02)
    with contextlib.suppress(RuntimeError):
        nats_server.client.delete_bucket(path.name)

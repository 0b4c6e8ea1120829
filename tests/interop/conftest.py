"""The other clients as fixtures."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.interop.clients import KINDS, Other, javascript_folder
from tests.support import Server


@pytest.fixture(scope="session", params=list(KINDS))
def other(request: pytest.FixtureRequest, nats_server: Server) -> Iterator[Other]:
    """Each official client in turn."""
    if request.param == "javascript" and javascript_folder() is None:
        message = "node, or the packages of tests/js/package.json in $NATSFS_JS or .venv/js, are missing"
        if os.environ.get("NATSFS_REQUIRE_ALL") == "1":
            pytest.fail(message)
        pytest.skip(message)
    client = KINDS[request.param](nats_server.url)
    yield client
    client.close()

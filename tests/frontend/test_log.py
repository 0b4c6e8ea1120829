"""What the daemon's log leaves out."""

from __future__ import annotations

import logging

import pytest

from natsfs.log import is_news


@pytest.mark.parametrize(
    ("name", "call", "error", "told"),
    [
        ("pyfuse3", "release", "No such file or directory", False),
        ("pyfuse3", "release", "Invalid argument", True),
        ("pyfuse3", "write", "No such file or directory", True),
        ("natsfs.fs", "release", "No such file or directory", True),
    ],
)
def test_a_release_that_the_kernel_has_dropped(name: str, call: str, error: str, told: bool) -> None:
    """At the unmount it waits for no answer to it, and there is none to lose: content went with the flush before."""
    message = "fuse_%s(): fuse_reply_* failed with %s"
    record = logging.LogRecord(name, logging.ERROR, "", 0, message, (call, error), None)
    assert is_news(record) is told

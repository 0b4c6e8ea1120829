"""Programs that wait for changes."""

from __future__ import annotations

import ctypes
import os
import select
import struct
import subprocess
import time
from pathlib import Path

import pytest

from tests.coherence.test_seen_at_once import Writers
from tests.support import Mount, until

IN_DELETE_SELF = 0x400


@pytest.fixture(params=["natsfs", "go", "rust", "javascript", "python"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def events(fd: int, limit: float) -> int:
    """The union of the masks of what arrives within `limit` seconds, or until the file is gone."""
    mask, deadline = 0, time.monotonic() + limit
    while not mask & IN_DELETE_SELF and select.select([fd], [], [], max(0, deadline - time.monotonic()))[0]:
        data = os.read(fd, 4096)
        while data:
            _, found, _, length = struct.unpack_from("iIII", data)
            mask |= found
            data = data[16 + length :]
    return mask


@pytest.mark.semantics("inotify")
def test_inotify_of_a_removal(
    folders: tuple[Path, Path], writers: Writers, mounts: tuple[Mount, Mount], kind: str
) -> None:
    """Who watches a file with inotify(7) hears that another client has removed it."""
    here, there = folders
    writer = writers(kind, mounts[1])
    libc = ctypes.CDLL(None, use_errno=True)
    (there / "f").write_bytes(b"x")
    until(lambda: (here / "f").exists())
    # Notifications of one directory come in order: after this the kernel has heard all that there was about "f".
    writer.put(here.name, "g", b"x")
    until(lambda: (here / "g").exists() and (there / "g").exists())
    writer.delete(here.name, "g")
    until(lambda: not (here / "g").exists())
    fd = libc.inotify_init1(os.O_CLOEXEC)
    try:
        assert libc.inotify_add_watch(fd, os.fsencode(here / "f"), IN_DELETE_SELF) > 0
        writer.delete(here.name, "f")
        assert events(fd, 2) & IN_DELETE_SELF
    finally:
        os.close(fd)


@pytest.mark.semantics("tail")
@pytest.mark.parametrize("flag", ["-f", "-F"])
@pytest.mark.parametrize("how", ["close", "fsync"])
def test_tail(folders: tuple[Path, Path], tmp_path: Path, how: str, flag: str) -> None:
    """`tail -f` and `tail -F` print each line that another mount appends to a log once, and none twice."""
    here, there = folders
    (there / "log").write_text("line 0\n")
    until(lambda: (here / "log").exists())
    printed = tmp_path / "printed"
    with printed.open("wb") as output, (tmp_path / "said").open("wb") as said:
        tail = subprocess.Popen(
            ["tail", "-n", "+1", flag, "-s", "0.05", "---disable-inotify", here / "log"],
            stdout=output,
            stderr=said,
        )
        try:
            until(lambda: printed.read_text() == "line 0\n")
            held = os.open(there / "log", os.O_WRONLY | os.O_APPEND)
            for number in range(1, 11):
                line = f"line {number}\n".encode()
                if how == "fsync":
                    os.write(held, line)
                    os.fsync(held)
                else:
                    with (there / "log").open("ab") as log:
                        log.write(line)
                time.sleep(0.1)
            os.close(held)
            expected = "".join(f"line {number}\n" for number in range(11))
            until(lambda: printed.read_text().endswith("line 10\n"))
            assert printed.read_text() == expected
        finally:
            tail.kill()
            tail.wait()

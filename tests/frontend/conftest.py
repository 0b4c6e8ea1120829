"""Running the natsfs command, and nats-servers with special configurations."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from natsfs import mounttable, registry, unmount

ROOT = Path(__file__).parents[2]
START_LIMIT = 20.0


@dataclass(frozen=True, slots=True)
class Result:
    """How a natsfs command ended."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on standard error."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("natsfs: ")
        return lines[0].removeprefix("natsfs: ")


@dataclass(slots=True)
class Natsfs:
    """The command with an environment of its own: all it writes lies below `home`."""

    home: Path
    environ: dict[str, str] = field(default_factory=dict)

    def start(self, *arguments: str | Path, environ: dict[str, str] | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "natsfs", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.home,
            env=self.environ | (environ or {}),
        )

    def __call__(
        self, *arguments: str | Path, environ: dict[str, str] | None = None, limit: float = 60.0
    ) -> Result:
        with self.start(*arguments, environ=environ) as process:
            try:
                out, err = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return Result(process.returncode, out, err)

    def mount(self, source: str, mountpoint: Path, *options: str) -> Result:
        given = [f"spool_dir={self.home}/spool", f"log_file={self.home}/log", *options]
        return self("mount", "-o", ",".join(given), source, mountpoint)


@pytest.fixture
def natsfs(tmp_path: Path) -> Iterator[Natsfs]:
    """Afterwards nothing may be left: no mount, no daemon, no record. It is also taken down if the test fails."""
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("NATS", "XDG_", "NOTIFY", "PYTEST"))
    }
    home = tmp_path / "home"
    home.mkdir()
    yield Natsfs(home, environ | {"HOME": str(home), "PYTHONPATH": str(ROOT)})
    left = leftovers(tmp_path)
    for record in records(tmp_path):
        with contextlib.suppress(OSError):
            os.kill(record.pid, 9)
        registry.remove("/run/natsfs", record.pid)
    for entry in mounts(tmp_path):
        with contextlib.suppress(OSError):
            unmount.detach(entry.mountpoint)
    registry.take_reports(registry.folders(os.getuid()), mountpoint=str(tmp_path / "mnt"))
    assert left == []


def mounts(folder: Path) -> list[mounttable.Entry]:
    return [entry for entry in mounttable.read() if entry.mountpoint.startswith(str(folder))]


def records(folder: Path) -> list[registry.Record]:
    found = registry.records(registry.folders(os.getuid()))
    return [record for _, record in found if record.mountpoint.startswith(str(folder))]


def daemons(folder: Path) -> list[int]:
    """The natsfs daemons whose mount point lies in `folder`."""
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            arguments = (
                Path("/proc", name, "cmdline").read_text(errors="replace").split("\0")
                if name.isdigit()
                else []
            )
            if "daemon" in arguments and any(argument.startswith(str(folder)) for argument in arguments):
                found.append(int(name))
    return found


def leftovers(folder: Path) -> list[str]:
    return [
        *(f"mount {entry.mountpoint}" for entry in mounts(folder)),
        *(f"record of {record.mountpoint}" for record in records(folder)),
        *(f"process {pid}" for pid in daemons(folder)),
    ]


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path


def program(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    assert found is not None, f"{name} is needed for this test"
    return found


@dataclass(slots=True)
class ConfiguredServer:
    """A nats-server of a test's own, on a free port of 127.0.0.1."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[[str], ConfiguredServer]]:
    """Call it with the text of a configuration; `jetstream` of the text decides whether there is JetStream."""
    running: list[ConfiguredServer] = []

    def start(configuration: str) -> ConfiguredServer:
        folder = tmp_path / f"server{len(running)}"
        folder.mkdir()
        (folder / "server.conf").write_text(
            f'listen: "127.0.0.1:-1"\nports_file_dir: "{folder}"\nlog_file: "{folder}/server.log"\n'
            + configuration.replace("STORE", str(folder / "store"))
        )
        process = subprocess.Popen(
            [program("nats-server"), "--config", folder / "server.conf"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        server = ConfiguredServer(process, 0, folder / "server.log")
        running.append(server)
        deadline = time.monotonic() + START_LIMIT
        while not server.port:
            assert process.poll() is None, server.log.read_text() if server.log.exists() else "no log"
            assert time.monotonic() < deadline, "the server does not start"
            for ports in folder.glob("*.ports"):
                with contextlib.suppress(ValueError):
                    server.port = int(json.loads(ports.read_text())["nats"][0].rpartition(":")[2])
            time.sleep(0.02)
        return server

    yield start
    for server in running:
        server.stop()


JETSTREAM = 'jetstream: { store_dir: "STORE" }\n'


@pytest.fixture
def plain_server(start_server: Callable[[str], ConfiguredServer]) -> ConfiguredServer:
    """JetStream, and no authentication."""
    return start_server(JETSTREAM)

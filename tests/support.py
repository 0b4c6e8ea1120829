"""What the tests with a real mount share: a server, a mount with all its checks, and a client that is not natsfs.

The client here speaks the wire format by itself, on nats-py's plain connection, so that a mistake in natsfs' codec
is not repeated by the test that looks for it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import hashlib
import json
import os
import random
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import nats
from nats.aio.client import Client as Connection
from nats.js.errors import NotFoundError

from natsfs.files.spool import SPARES

T = TypeVar("T")

REPOSITORY = Path(__file__).parents[1]
CHUNK = 128 * 1024
START_LIMIT = 20.0
# How soon a change by another client has to be seen. It takes milliseconds; two busy cores take longer.
SOON = 2.0


def program(name: str) -> str:
    """A program that was installed beside Python, or is on PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    assert found is not None, f"{name} is needed for this test"
    return found


def run(
    *command: str | Path, limit: float = 100.0, cwd: Path | None = None, status: int = 0, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run a tool; what it printed is in the failure if it does not end with `status`."""
    done = subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=limit,
        cwd=cwd,
        **more,
    )
    assert done.returncode == status, (
        f"{command} ended with {done.returncode}: {done.stderr[-2000:]} {done.stdout[-2000:]}"
    )
    return done


def until(condition: Callable[[], T], limit: float = SOON, what: str = "") -> T:
    """Ask again until the answer is true; returns it."""
    deadline = time.monotonic() + limit
    while True:
        answer = condition()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {limit:g} s: {what or condition}"
        time.sleep(0.005)


def never(condition: Callable[[], object], during: float, what: str = "") -> None:
    """The condition stays false for some time."""
    deadline = time.monotonic() + during
    while time.monotonic() < deadline:
        assert not condition(), what or condition
        time.sleep(0.02)


def content(path: Path) -> bytes | None:
    """None if there is no such file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def holds(path: Path, data: bytes) -> bool:
    return content(path) == data


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes without repetition, the same ones for the same seed."""
    return hashlib.shake_128(seed.to_bytes(8, "big")).digest(size)


@contextlib.contextmanager
def raises(*numbers: int) -> Iterator[None]:
    """The block fails with one of these errnos."""
    expected = " or ".join(errno.errorcode[number] for number in numbers)
    raised: OSError | None = None
    try:
        yield
    except OSError as error:
        raised = error
    assert raised is not None, f"no error instead of {expected}"
    assert raised.errno in numbers, f"{raised} instead of {expected}"


# --- trees ----------------------------------------------------------------------------------------------------


def snapshot(
    top: Path, *, content: bool = True, directory_times: bool = True
) -> dict[str, tuple[object, ...]]:
    """All that `cp -a` keeps, by path below `top`: type, mode, owner, mtime, and content or target."""
    found: dict[str, tuple[object, ...]] = {}

    def take(path: Path, name: str) -> None:
        status = path.lstat()
        told: tuple[object, ...] = (oct(status.st_mode), status.st_uid, status.st_gid)
        if stat.S_ISDIR(status.st_mode):
            found[name] = (*told, status.st_mtime_ns if directory_times else None)
            for entry in os.listdir(path):
                take(path / entry, f"{name}/{entry}")
        elif stat.S_ISLNK(status.st_mode):
            found[name] = (*told, status.st_mtime_ns, os.readlink(path))
        else:
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if content else None
            found[name] = (*told, status.st_mtime_ns, status.st_size, digest)

    take(top, ".")
    return found


def differences(
    left: dict[str, tuple[object, ...]], right: dict[str, tuple[object, ...]], most: int = 20
) -> list[str]:
    lines = [f"{name}: only left" for name in left.keys() - right.keys()]
    lines += [f"{name}: only right" for name in right.keys() - left.keys()]
    lines += [
        f"{name}: {left[name]} != {right[name]}"
        for name in left.keys() & right.keys()
        if left[name] != right[name]
    ]
    return sorted(lines)[:most]


# --- the server -----------------------------------------------------------------------------------------------


class Server:
    """A nats-server with JetStream on a free port of 127.0.0.1, with its data in a folder of its own.

    `settings` go into its configuration file.
    """

    def __init__(self, settings: str = "") -> None:
        self._settings = settings
        self.port = 0
        self.monitoring = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._connected: Client | None = None

    @cached_property
    def data(self) -> Path:
        """The folder for everything that the server writes."""
        return Path(tempfile.mkdtemp(prefix="natsfs-test-server-"))

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def client(self) -> Client:
        """A plain NATS client, connected when it is first used."""
        if self._connected is None:
            self._connected = Client(self.url)
        return self._connected

    def start(self) -> None:
        """Start, on the same port as before if it ran already."""
        for ports in self.data.glob("*.ports"):
            ports.unlink()
        config = self.data / "server.conf"
        config.write_text(self._settings)
        self._process = subprocess.Popen(
            [
                *(program("nats-server"), "--config", str(config)),
                *("--addr", "127.0.0.1", "--port", str(self.port or -1)),
                *("--http_port", "-1", "--ports_file_dir", str(self.data), "--log", str(self.data / "log")),
                *("--jetstream", "--store_dir", str(self.data / "jetstream")),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_LIMIT
        while True:
            assert self._process.poll() is None, (self.data / "log").read_text()
            assert time.monotonic() < deadline, "the server does not start"
            for path in self.data.glob(f"*_{self.pid}.ports"):
                with contextlib.suppress(ValueError):
                    ports = json.loads(path.read_text())
                    self.port = int(ports["nats"][0].rpartition(":")[2])
                    self.monitoring = ports["monitoring"][0]
                    return
            time.sleep(0.01)

    def pause(self) -> None:
        """Stop it in its tracks: its connections stand, and nothing comes. It has stopped when this returns."""
        os.kill(self.pid, signal.SIGSTOP)
        until(lambda: all(_state(path) == "T" for path in Path(f"/proc/{self.pid}/task").iterdir()), 10)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(20)
            self._process = None

    def close(self) -> None:
        """For good, with all data."""
        if self._connected is not None:
            self._connected.close()
            self._connected = None
        self.stop()
        shutil.rmtree(self.data, ignore_errors=True)
        del self.data

    def has_connection(self, name: str) -> bool:
        """Whether a client whose name begins so is connected."""
        return bool(self._find_connections(name))

    def _find_connections(self, name: str) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.monitoring}/connz", timeout=10) as answer:
            connections = json.load(answer)["connections"]
        return [c for c in connections if str(c.get("name", "")).startswith(name)]

    def _connections(self, name: str) -> list[dict[str, Any]]:
        found = self._find_connections(name)
        assert found, f"there is no connection {name!r}"
        return found

    def received(self) -> int:
        """Messages that natsfs has sent to the server, over all of its connections."""
        return sum(int(c["in_msgs"]) for c in self._connections("natsfs"))

    def chunk_requests(self) -> int:
        """Messages that natsfs has sent on its connections for content."""
        return sum(int(c["in_msgs"]) for c in self._connections("natsfs chunks"))


# --- a client that is not natsfs --------------------------------------------------------------------------------


def encode(name: str) -> str:
    """The last token of a metadata subject (ADR-20)."""
    return base64.urlsafe_b64encode(name.encode()).decode()


def digest_of(data: bytes) -> str:
    return "SHA-256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()


def new_nuid() -> str:
    return secrets.token_hex(11)


def split(data: bytes, size: int = CHUNK) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


class Loop:
    """An asyncio loop in a thread, for clients that must stay connected while a test waits in a system call."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], limit: float = 60.0) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(limit)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


class Client:
    """Another program that uses the same buckets. Objects are written and read message by message."""

    def __init__(self, url: str) -> None:
        self.loop = Loop()
        self.connection: Connection = self.loop.run(self._connect(url))
        self.js = self.connection.jetstream(timeout=20)

    @staticmethod
    async def _connect(url: str) -> Connection:
        async def ignore(error: Exception) -> None:
            """The server is stopped on purpose in some tests."""

        return await nats.connect(
            url, name="test", error_cb=ignore, max_reconnect_attempts=-1, reconnect_time_wait=0.1
        )

    def run(self, work: Coroutine[Any, Any, T], limit: float = 60.0) -> T:
        return self.loop.run(work, limit)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.run(self.connection.close(), 10)
        self.loop.close()

    async def _api(self, subject: str, body: object = None) -> dict[str, Any]:
        payload = b"" if body is None else json.dumps(body).encode()
        answer: dict[str, Any] = json.loads(
            (await self.connection.request(f"$JS.API.{subject}", payload, timeout=20)).data
        )
        if "error" in answer:
            raise RuntimeError(f"{subject}: {answer['error']}")
        return answer

    def api(self, subject: str, body: object = None) -> dict[str, Any]:
        """A request to the JetStream API; an error in the answer is raised."""
        return self.run(self._api(subject, body))

    # Buckets.

    def create_bucket(self, name: str, **settings: object) -> None:
        try:
            self._create_bucket(name, settings)
        except RuntimeError as error:
            # The server has just taken away the folder of all streams, with the last other stream.
            if "error creating store" not in str(error):
                raise
            self._create_bucket(name, settings)

    def _create_bucket(self, name: str, settings: dict[str, object]) -> None:
        self.api(
            f"STREAM.CREATE.OBJ_{name}",
            {
                "name": f"OBJ_{name}",
                "subjects": [f"$O.{name}.C.>", f"$O.{name}.M.>"],
                "retention": "limits",
                "discard": "new",
                "storage": "file",
                "num_replicas": 1,
                "max_consumers": -1,
                "max_msgs": -1,
                "max_bytes": -1,
                "max_age": 0,
                "duplicate_window": 120_000_000_000,
                "allow_rollup_hdrs": True,
                "allow_direct": True,
                **settings,
            },
        )

    def delete_bucket(self, name: str) -> None:
        self.api(f"STREAM.DELETE.OBJ_{name}")

    def change_bucket(self, name: str, **settings: object) -> None:
        config = self.info(name)["config"]
        self.api(f"STREAM.UPDATE.OBJ_{name}", config | settings)

    def info(self, bucket: str) -> dict[str, Any]:
        return self.api(f"STREAM.INFO.OBJ_{bucket}")

    def buckets(self) -> list[str]:
        names = self.api("STREAM.NAMES").get("streams") or []
        return [name.removeprefix("OBJ_") for name in names if name.startswith("OBJ_")]

    def consumers(self, bucket: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.api(f"CONSUMER.LIST.OBJ_{bucket}").get("consumers") or []
        return found

    def subjects(self, bucket: str, under: str) -> dict[str, int]:
        """How many messages each subject below `C` or `M` holds."""
        found: dict[str, int] = {}
        while True:
            answer = self.api(
                f"STREAM.INFO.OBJ_{bucket}",
                {"subjects_filter": f"$O.{bucket}.{under}.>", "offset": len(found)},
            )
            page: dict[str, int] = answer["state"].get("subjects") or {}
            found |= page
            if not page or len(found) >= int(answer.get("total", 0)):
                return found

    def chunks(self, bucket: str) -> dict[str, int]:
        """How many chunks each nuid has, live or not."""
        return {subject.rpartition(".")[2]: n for subject, n in self.subjects(bucket, "C").items()}

    # Objects.

    async def _put(
        self,
        bucket: str,
        name: str,
        chunks: Sequence[bytes],
        meta: dict[str, Any] | None = None,
        nuid: str | None = None,
    ) -> dict[str, Any]:
        nuid = nuid or new_nuid()
        before = await self._meta(bucket, name)
        data = hashlib.sha256()
        for chunk in chunks:
            data.update(chunk)
            await self.js.publish(f"$O.{bucket}.C.{nuid}", chunk)
        written: dict[str, Any] = {
            "name": name,
            "options": {"max_chunk_size": CHUNK},
            "bucket": bucket,
            "nuid": nuid,
            "size": sum(map(len, chunks)),
            "mtime": "0001-01-01T00:00:00Z",
            "chunks": len(chunks),
            "digest": "SHA-256=" + base64.urlsafe_b64encode(data.digest()).decode(),
        } | (meta or {})
        await self._publish_meta(written)
        if before is not None and not before.get("deleted") and before["nuid"] != nuid:
            await self._api(f"STREAM.PURGE.OBJ_{bucket}", {"filter": f"$O.{bucket}.C.{before['nuid']}"})
        return written

    async def _publish_meta(self, meta: dict[str, Any]) -> int:
        subject = f"$O.{meta['bucket']}.M.{encode(meta['name'])}"
        ack = await self.js.publish(subject, json.dumps(meta).encode(), headers={"Nats-Rollup": "sub"})
        return ack.seq

    async def _meta(self, bucket: str, name: str) -> dict[str, Any] | None:
        try:
            message = await self.js.get_last_msg(f"OBJ_{bucket}", f"$O.{bucket}.M.{encode(name)}")
        except NotFoundError:
            return None
        assert message.data is not None
        meta: dict[str, Any] = json.loads(message.data)
        return meta

    def put(
        self,
        bucket: str,
        name: str,
        data: bytes | Sequence[bytes],
        meta: dict[str, Any] | None = None,
        nuid: str | None = None,
    ) -> dict[str, Any]:
        """Put an object as Go does: chunks, metadata, then purge the chunks it replaces."""
        chunks = split(data) if isinstance(data, bytes) else data
        return self.run(self._put(bucket, name, chunks, meta, nuid))

    def put_timed(self, bucket: str, name: str, data: bytes) -> float:
        """As `put`; returns the time when that had returned, by `time.perf_counter`."""

        async def work() -> float:
            await self._put(bucket, name, split(data), None, None)
            return time.perf_counter()

        return self.run(work())

    def put_many(self, bucket: str, names: Iterable[str], data: bytes = b"") -> None:
        async def work() -> None:
            todo = list(names)
            for start in range(0, len(todo), 100):
                await asyncio.gather(
                    *(self._put(bucket, name, split(data)) for name in todo[start : start + 100])
                )

        self.run(work())

    def publish_chunk(self, bucket: str, nuid: str, data: bytes) -> None:
        self.run(self.js.publish(f"$O.{bucket}.C.{nuid}", data))

    def put_scattered(self, bucket: str, contents: dict[str, bytes], seed: int = 0) -> None:
        """Put objects at the same time: their chunks lie between each other, in bursts, too."""
        metas = [
            {
                "name": name,
                "bucket": bucket,
                "nuid": new_nuid(),
                "size": len(content),
                "chunks": len(split(content)),
                "digest": digest_of(content),
                "options": {"max_chunk_size": CHUNK},
            }
            for name, content in contents.items()
        ]
        waiting = [(str(meta["nuid"]), split(contents[str(meta["name"])])) for meta in metas]
        generator = random.Random(seed)
        while left := [one for one in waiting if one[1]]:
            nuid, chunks = generator.choice(left)
            for _ in range(min(generator.choice((1, 1, 2, 5)), len(chunks))):
                self.publish_chunk(bucket, nuid, chunks.pop(0))
        for meta in metas:
            self.publish_meta(meta)

    def publish_meta(self, meta: dict[str, Any]) -> int:
        return self.run(self._publish_meta(meta))

    def publish_beside(self, meta: dict[str, Any]) -> int:
        """As JavaScript's update does: older messages of the name stay."""
        subject = f"$O.{meta['bucket']}.M.{encode(meta['name'])}"
        return self.run(self.js.publish(subject, json.dumps(meta).encode())).seq

    def delete_message(self, bucket: str, seq: int) -> None:
        """`nats stream rmm`."""
        self.api(f"STREAM.MSG.DELETE.OBJ_{bucket}", {"seq": seq})

    def meta(self, bucket: str, name: str) -> dict[str, Any] | None:
        return self.run(self._meta(bucket, name))

    def stored(self, bucket: str, name: str) -> dict[str, Any]:
        """The metadata of a live object."""
        meta = self.meta(bucket, name)
        assert meta is not None, f"{name!r} is not in {bucket}"
        assert not meta.get("deleted"), f"{name!r} is deleted in {bucket}"
        return meta

    def delete(self, bucket: str, name: str) -> None:
        """Delete as Go does: a tombstone with the object's nuid, then purge its chunks."""
        meta = self.stored(bucket, name)
        dead = {k: v for k, v in meta.items() if k != "digest"} | {"size": 0, "chunks": 0, "deleted": True}
        self.publish_meta(dead)
        self.api(f"STREAM.PURGE.OBJ_{bucket}", {"filter": f"$O.{bucket}.C.{meta['nuid']}"})

    def rename(self, bucket: str, old: str, new: str) -> None:
        """Rename as Go does: the same nuid under the new name, and a purge of the old name's metadata."""
        self.publish_meta(self.stored(bucket, old) | {"name": new})
        self.api(f"STREAM.PURGE.OBJ_{bucket}", {"filter": f"$O.{bucket}.M.{encode(old)}"})

    def read(self, bucket: str, name: str) -> bytes:
        """The content, checked against count, size and digest of the metadata."""
        return self.run(self._read(bucket, self.stored(bucket, name)))

    async def _read(self, bucket: str, meta: dict[str, Any]) -> bytes:
        subject, seq, parts = f"$O.{bucket}.C.{meta['nuid']}", 0, []
        while True:
            request = json.dumps({"seq": seq + 1, "next_by_subj": subject}).encode()
            answer = await self.connection.request(f"$JS.API.DIRECT.GET.OBJ_{bucket}", request, timeout=20)
            assert answer.headers is not None
            if answer.headers.get("Status") == "404":
                break
            seq = int(answer.headers["Nats-Sequence"])
            parts.append(answer.data)
        data = b"".join(parts)
        assert len(parts) == meta["chunks"], (
            f"{len(parts)} chunks are stored, the metadata says {meta['chunks']}"
        )
        assert len(data) == meta["size"]
        assert digest_of(data) == meta["digest"]
        return data

    def metas(self, bucket: str) -> dict[str, dict[str, Any]]:
        """The newest metadata of every name, tombstones included."""
        subjects = sorted(self.subjects(bucket, "M"))

        async def last(subject: str) -> dict[str, Any]:
            answer = await self.connection.request(
                f"$JS.API.DIRECT.GET.OBJ_{bucket}.{subject}", b"", timeout=20
            )
            meta: dict[str, Any] = json.loads(answer.data)
            return meta

        async def work() -> dict[str, dict[str, Any]]:
            found = []
            for start in range(0, len(subjects), 500):
                found += await asyncio.gather(*map(last, subjects[start : start + 500]))
            return {meta["name"]: meta for meta in found}

        return self.run(work())

    def names(self, bucket: str) -> set[str]:
        """The names of all live objects, markers included."""
        return {name for name, meta in self.metas(bucket).items() if not meta.get("deleted")}


# --- the mount --------------------------------------------------------------------------------------------------

_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR|CRITICAL) ")
# libfuse says so when a directory that is still in use has gone; the name is invalidated in another way then.
HARMLESS = "fuse: writing device: Directory not empty"
LIVE: list[Mount] = []


def natsfs(*arguments: str | Path, limit: float = 60.0) -> subprocess.CompletedProcess[str]:
    """The natsfs command of this repository."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-P", "-m", "natsfs", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=limit,
        env=os.environ | {"PYTHONPATH": path},
    )


@dataclass
class Mount:
    """A mount with a daemon of its own. `finish` takes it down and tells everything that is not as it should be."""

    server: Server
    path: Path
    source: str
    spool: Path
    log: Path
    pid: int
    _expected: list[re.Pattern[str]] = field(default_factory=list)
    _log_position: int = 0
    _failed_expected: bool = False
    _failed_known: set[Path] = field(default_factory=set)
    _ended: bool = False

    @classmethod
    def make(cls, server: Server, folder: Path, source: str = "", *options: str) -> Mount:
        """Mount `source` (what follows the server in the URL) below `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        path, spool, log = folder / "mnt", folder / "spool", folder / "log"
        with contextlib.suppress(FileExistsError):  # pathlib's exist_ok would look into a dead mount
            path.mkdir()
        position = log.stat().st_size if log.exists() else 0  # of an earlier mount in the same folder
        given = ",".join([f"spool_dir={spool}", f"log_file={log}", "timeout=20", *options])
        done = natsfs("mount", f"{server.url}{source}", path, "-o", given)
        assert done.returncode == 0, f"mounting failed: {done.stderr}{done.stdout}"
        mount = cls(server, path, source, spool, log, _daemon_of(path), _log_position=position)
        LIVE.append(mount)
        return mount

    # What a test may expect.

    def allow(self, pattern: str) -> None:
        """Warnings and errors that match are expected in the log of this test."""
        self._expected.append(re.compile(pattern))

    def allow_failed(self) -> None:
        """Data that was put aside in spool_dir/failed is expected, and that the end of the mount tells of it."""
        self.allow("could not be committed")
        self._failed_expected = True

    # State.

    @property
    def is_running(self) -> bool:
        return _is_running(self.pid)

    @property
    def is_mounted(self) -> bool:
        return str(self.path) in _mounted_paths()

    def memory(self) -> int:
        """The most memory that the daemon has used at a time, in bytes."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]

    def spooled(self) -> list[Path]:
        """The files in the spool that hold something, those of failed commits not included.

        Some empty ones are kept for the next files; more than those would be forgotten ones.
        """
        folder = self.spool / f"mount-{self.pid}"
        files = list(folder.iterdir()) if folder.is_dir() else []
        full = [path for path in files if path.stat().st_size]
        return files if len(files) - len(full) > SPARES else full

    def failed(self) -> list[dict[str, Any]]:
        """The manifests of what was put aside; with key "data" the path of the content."""
        found = []
        for manifest in sorted((self.spool / "failed").glob("*.json")):
            found.append(json.loads(manifest.read_text()) | {"data": manifest.with_suffix(".data")})
        return found

    def complaints(self) -> list[str]:
        """Lines of the log since the last look that no test expected."""
        if not self.log.exists():
            return []
        with self.log.open(errors="surrogateescape") as log:
            log.seek(self._log_position)
            text = log.read()
            self._log_position = log.tell()
        bad: list[str] = []
        expected = True
        for line in text.splitlines():
            if line == HARMLESS:
                continue
            match = _LINE.match(line)
            if match is None:  # a traceback, or another library's output
                if not expected or "Traceback" in line or not bad:
                    bad.append(line)
                continue
            expected = match[1] in ("DEBUG", "INFO") or any(p.search(line) for p in self._expected)
            if not expected:
                bad.append(line)
        return bad

    # The end.

    def umount(self, status: int = 0, limit: float = 60.0) -> subprocess.CompletedProcess[str]:
        """`natsfs umount`: the daemon has ended when it returns."""
        done = natsfs("umount", self.path, limit=limit)
        assert done.returncode == status, f"umount ended with {done.returncode}: {done.stderr}{done.stdout}"
        return done

    def wait(self, limit: float = 20.0) -> None:
        """Until the daemon has ended by itself."""
        until(lambda: not self.is_running, limit, "the daemon ends")

    def check(self) -> list[str]:
        """After a test in which the mount goes on."""
        problems = [f"log: {line}" for line in self.complaints()]
        if not self.is_running:
            problems.append("the daemon has ended")
        deadline = time.monotonic() + SOON
        while self.spooled() and time.monotonic() < deadline:
            time.sleep(0.02)  # the kernel tells of the last close behind the caller's back
        problems += [f"spool file {path} stays" for path in self.spooled()]
        problems += self._check_failed()
        self._expected.clear()
        return problems

    def _check_failed(self) -> list[str]:
        """What is new there, so that one test's failure is not that of all that follow."""
        found = set((self.spool / "failed").glob("*")) - self._failed_known
        self._failed_known |= found
        return (
            [] if self._failed_expected else [f"in spool_dir/failed: {path.name}" for path in sorted(found)]
        )

    def finish(self) -> list[str]:
        """Unmount, by force if need be, and look for what stays behind."""
        if self._ended:
            return []
        self._ended = True
        problems: list[str] = []
        if self.is_mounted:
            try:
                done = natsfs("umount", self.path, limit=60)
                expected = 1 if self._failed_expected else 0
                if done.returncode != expected or (expected and "not saved" not in done.stderr):
                    problems.append(f"umount ended with {done.returncode}: {done.stderr.strip()}")
            except subprocess.TimeoutExpired:
                problems.append("umount hangs")
        elif self.is_running:
            # umount came from elsewhere, or a signal; the daemon may still be saving.
            with contextlib.suppress(AssertionError):
                self.wait()
        problems += self._end_by_force()
        if self in LIVE:
            LIVE.remove(self)
        problems += [f"log: {line}" for line in self.complaints()]
        problems += self._check_failed()
        for path in self.spool.rglob("*") if self.spool.exists() else ():
            if path.is_file() and "failed" not in path.parts and not path.name.startswith("purges-"):
                problems.append(f"in the spool: {path.relative_to(self.spool)}")
        problems += self._left_on_server()
        return problems

    def _end_by_force(self) -> list[str]:
        problems = []
        if self.is_running:
            problems.append(f"the daemon {self.pid} is still there")
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, number)
                with contextlib.suppress(AssertionError):
                    self.wait(10)
                if not self.is_running:
                    break
        if self.is_mounted:
            problems.append(f"{self.path} is still mounted")
            subprocess.run(
                ["umount", "-l", self.path] if os.getuid() == 0 else ["fusermount3", "-u", "-z", self.path],
                check=False,
                capture_output=True,
            )
        return problems

    def _left_on_server(self) -> list[str]:
        """A consumer that delivers to nobody, or any at all when no mount is left."""
        if self.server._process is None:
            return []
        others = any(mount.server._process is self.server._process for mount in LIVE)  # also behind a proxy
        left = []
        for bucket in self.server.client.buckets():
            for consumer in self.server.client.consumers(bucket):
                if consumer["name"].startswith("natsfs") and not (others and consumer.get("push_bound")):
                    left.append(f"consumer {consumer['name']} of bucket {bucket} stays on the server")
        return left


class Mounter(Protocol):
    """The fixture `mount`."""

    def __call__(
        self, source: str = "", *options: str, server: Server | None = None, folder: Path | None = None
    ) -> Mount: ...


def _daemon_of(path: Path) -> int:
    """The process whose arguments say that it serves this mount point."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                arguments = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
                if b"daemon" in arguments and os.fsencode(path) in arguments:
                    return int(name)
    raise AssertionError(f"no daemon serves {path}")


def _state(process: Path) -> str:
    """Of a process or a thread, by its folder in /proc; X if it is not there any more."""
    try:
        return (process / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _is_running(pid: int) -> bool:
    return _state(Path(f"/proc/{pid}")) not in "ZX"


def _mounted_paths() -> set[str]:
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as mounts:
        return {line.split(" ")[1] for line in mounts}


@contextlib.contextmanager
def opened(path: Path, flags: int, mode: int = 0o644) -> Iterator[int]:
    """A file descriptor for the time of a block."""
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)

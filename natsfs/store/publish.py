"""Writing: metadata by compare-and-swap, and chunks through a window of unacknowledged bytes."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from nats.aio.msg import Msg

from natsfs.catalog.attributes import format_time
from natsfs.catalog.metadata import Metadata, encode, new_nuid
from natsfs.errors import Conflict, Corrupt, TooLarge, Unreachable
from natsfs.store.connection import ApiError, Connection, api_error, persist
from natsfs.store.fetch import Fetcher
from natsfs.store.layout import Layout
from natsfs.store.segments import Kept, Segment, Spooled, Zeros
from natsfs.store.watch import OP_HEADER

log = logging.getLogger(__name__)

# Bytes of chunks that may be unacknowledged at a time. The server refuses input that arrives faster than it stores
# (error 10167 from 128 MB on); beyond 4 MiB nothing is gained.
WINDOW = 4 * 1024 * 1024
BLOCK = 1024 * 1024  # bytes read from the spool, and digested, at a time
# An upload older than this has its chunks counted before its metadata is published.
PROOF_AGE = 60.0
_HEADERS_ROOM = 4096


@dataclass(frozen=True, slots=True)
class Uploaded:
    nuid: str
    size: int
    chunks: int
    chunk_size: int
    digest: str


class Base:
    """Where `Kept` segments come from: an immutable version and its layout."""

    def __init__(self, fetcher: Fetcher, meta: Metadata, layout: Layout) -> None:
        self._fetcher = fetcher
        self._meta = meta
        self._layout = layout

    async def read(self, start: int, end: int) -> bytes:
        layout = self._layout
        first, last = layout.index(start), layout.index(end - 1)
        chunks = await self._fetcher.chunks(
            self._meta.bucket, self._meta.nuid, layout, first, last - first + 1
        )
        skip = start - layout.start(first)
        return b"".join(chunks)[skip : skip + end - start]


def _pread(fd: int, start: int, end: int) -> bytes:
    data = os.pread(fd, end - start, start)
    if len(data) != end - start:
        raise Corrupt(f"the spool file is shorter than what was written to it: {len(data)} bytes at {start}")
    return data


class Upload:
    """The chunks of one new version, in order, under one nuid.

    Any failure ends it: chunks are ordered by their arrival, so one that was refused cannot be sent again behind
    its successors. The owner starts another upload from the spool, which has everything.
    """

    def __init__(
        self, connection: Connection, bucket: str, chunk_size: int, limit: float, pool: ThreadPoolExecutor
    ) -> None:
        self.nuid = new_nuid()
        self.position = 0  # bytes of content taken in
        self.stored = 0  # bytes of content acknowledged
        self._connection = connection
        self._subject = f"$O.{bucket}.C.{self.nuid}"
        self._chunk_size = min(chunk_size, connection.max_payload - _HEADERS_ROOM)
        self._limit = limit
        self._pool = pool
        self._sha = hashlib.sha256()
        self._rest = b""
        self._flying: deque[tuple[asyncio.Future[Msg], int]] = deque()
        self._flying_bytes = 0
        self._last_seq = 0
        self._chunks = 0
        self.started = time.monotonic()
        self._generation = connection.generation

    async def append(self, segments: list[Segment], fd: int, base: Base | None) -> None:
        """Take in `segments`, which follow on what was taken in before, and publish every full chunk."""
        loop = asyncio.get_running_loop()
        await self._connection.up(self._limit)
        async for block in self._blocks(segments, fd, base):
            self.position += len(block)
            if len(block) <= 16384:
                self._sha.update(block)
                await self._publish_full(block)
            else:
                digested = loop.run_in_executor(self._pool, self._sha.update, block)
                try:
                    await self._publish_full(block)
                finally:
                    await digested

    async def _blocks(self, segments: list[Segment], fd: int, base: Base | None) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        for segment in segments:
            for start in range(segment.start, segment.end, BLOCK):
                end = min(start + BLOCK, segment.end)
                match segment:
                    case Spooled():
                        if end - start <= 65536:
                            yield _pread(fd, start, end)
                        else:
                            yield await loop.run_in_executor(self._pool, _pread, fd, start, end)
                    case Zeros():
                        yield bytes(end - start)
                    case Kept():
                        assert base is not None
                        yield await base.read(start, end)

    async def _publish_full(self, block: bytes) -> None:
        size = self._chunk_size
        view = memoryview(block)
        if self._rest:
            take = min(size - len(self._rest), len(view))
            self._rest += view[:take]
            view = view[take:]
            if len(self._rest) < size:
                return
            await self._publish(self._rest)
            self._rest = b""
        while len(view) >= size:
            await self._publish(view[:size])
            view = view[size:]
        self._rest = bytes(view)

    async def _publish(self, chunk: bytes | memoryview) -> None:
        while self._flying_bytes + len(chunk) > WINDOW and self._flying:
            await self._reap()
        future = await self._connection.send(self._subject, chunk)
        self._flying.append((future, len(chunk)))
        self._flying_bytes += len(chunk)
        self._chunks += 1
        while self._flying and self._flying[0][0].done():
            await self._reap()

    async def _reap(self) -> None:
        """Take the oldest acknowledgement."""
        future, size = self._flying[0]
        try:
            reply = await asyncio.wait_for(future, self._limit)
        except TimeoutError:
            raise Unreachable(f"no acknowledgement of a chunk within {self._limit:.0f} s") from None
        self._flying.popleft()
        self._flying_bytes -= size
        ack = json.loads(reply.data)
        if "error" in ack:
            raise api_error(ack["error"])
        if ack["seq"] <= self._last_seq:
            raise Corrupt("chunks were stored out of order")
        self._last_seq = ack["seq"]
        self.stored += size

    async def finish(self) -> Uploaded:
        """Publish the last, short chunk and wait for every acknowledgement."""
        if self._rest:
            await self._publish(self._rest)
            self._rest = b""
        while self._flying:
            await self._reap()
        digest = base64.urlsafe_b64encode(self._sha.digest()).decode()
        return Uploaded(self.nuid, self.position, self._chunks, self._chunk_size, f"SHA-256={digest}")

    @property
    def needs_proof(self) -> bool:
        """Whether chunks that were acknowledged may be gone by now: it took long, or the server went away meanwhile."""
        return time.monotonic() - self.started > PROOF_AGE or self._connection.generation != self._generation

    async def settle(self) -> None:
        """Wait until the server has answered for every chunk, whatever it says.

        A purge travels on another connection than the chunks: one that is still on its way would be stored behind it.
        """
        if self._flying:
            await asyncio.wait([future for future, _ in self._flying], timeout=self._limit)
            self._flying.clear()

    @property
    def stored_any(self) -> bool:
        return self._chunks > 0


class Publisher:
    """Metadata messages and purges."""

    def __init__(self, connection: Connection, api_prefix: str, fetcher: Fetcher, limit: float) -> None:
        self._connection = connection
        self._api = api_prefix
        self._fetcher = fetcher
        self._limit = limit
        self._echoes: dict[str, asyncio.Future[int]] = {}

    @property
    def limit_of_metadata(self) -> int:
        """Bytes that the body of a metadata message may have."""
        return self._connection.max_payload - _HEADERS_ROOM

    def echo(self, op: str, seq: int) -> None:
        """The watcher has seen the own message `op`: as good as its acknowledgement, and often earlier."""
        future = self._echoes.get(op)
        if future is not None and not future.done():
            future.set_result(seq)

    async def metadata(
        self,
        meta: Metadata,
        expected: int,
        op: str,
        *,
        replaces: str | None = None,
        generation: int | None = None,
    ) -> int:
        """Publish a metadata message if its subject's last sequence is `expected`; returns its own sequence.

        `replaces` is the nuid of the live object that has this sequence, if one has, and `generation` the connection's
        generation in which that was learnt. After a reconnect the store may be an older one, in which the sequence has
        been given to somebody else's object: then the leader is asked before anything is sent.

        A lost acknowledgement is settled by what the leader holds, so the answer is always definite, or `Unreachable`
        after the time limit. Raises `Conflict` with the sequence that is there instead.
        """
        body = encode(meta, mtime=format_time(time.time_ns()))
        if len(body) > self.limit_of_metadata:
            raise TooLarge(
                f"the metadata of {meta.name!r} has {len(body)} bytes, more than a message may have"
            )
        headers = {
            "Nats-Rollup": "sub",
            "Nats-Expected-Last-Subject-Sequence": str(expected),
            OP_HEADER: op,
        }
        echoed: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._echoes[op] = echoed
        try:
            tried = False

            async def attempt() -> int:
                nonlocal tried
                await self._connection.up(self._limit)
                again = tried
                if again or generation not in (None, self._connection.generation):
                    stored = await self._settle(meta, expected, op, replaces)
                    if stored is not None:
                        return stored
                tried = True
                acked = await self._connection.send(meta.subject, body, headers)
                either: list[asyncio.Future[Any]] = [acked, echoed]
                await asyncio.wait(either, timeout=min(self._limit, 10), return_when=asyncio.FIRST_COMPLETED)
                if echoed.done():
                    acked.cancel()
                    return echoed.result()
                if not acked.done():
                    acked.cancel()
                    raise Unreachable(f"no acknowledgement for the metadata of {meta.name!r}")
                ack = json.loads(acked.result().data)
                if "error" not in ack:
                    return int(ack["seq"])
                error = api_error(ack["error"])
                if again and isinstance(error, Conflict):
                    # The attempt before may have been what this one met: reads do not wait for what was sent before.
                    stored = await self._settle(meta, expected, op, replaces)
                    if stored is not None:
                        return stored
                raise error

            seq: int = await persist(attempt, self._limit)
            return seq
        finally:
            del self._echoes[op]

    async def _settle(self, meta: Metadata, expected: int, op: str, replaces: str | None) -> int | None:
        """Whether a message whose acknowledgement was lost was stored, by the word of the leader.

        Raises `Conflict` if it was not, and the name holds something else than what it was to replace.
        """
        message = await self._fetcher.leader_get(meta.bucket, {"last_by_subj": meta.subject})
        if message is None:
            if expected == 0:
                return None
            raise Conflict("the name was purged meanwhile", 0)
        if f"{OP_HEADER}: {op}".encode() in base64.b64decode(message.get("hdrs") or ""):
            return int(message["seq"])
        there = int(message["seq"])
        if there != expected or (replaces is not None and _nuid(message) != replaces):
            raise Conflict("the name was changed meanwhile", there)
        return None

    async def prove(self, bucket: str, uploaded: Uploaded) -> bool:
        """Whether every chunk of an upload is (still) stored, by the word of the leader."""
        subject = f"$O.{bucket}.C.{uploaded.nuid}"

        async def attempt() -> dict[str, object]:
            return await self._connection.api(
                f"{self._api}.STREAM.INFO.OBJ_{bucket}", {"subjects_filter": subject}, min(self._limit, 10)
            )

        info = await persist(attempt, self._limit)
        return bool((info["state"].get("subjects") or {}).get(subject, 0) == uploaded.chunks)

    async def purge(self, bucket: str, subject: str, up_to: int | None) -> None:
        """Remove the messages of a subject, those after sequence `up_to` excepted."""
        body: dict[str, object] = {"filter": subject}
        if up_to is not None:
            body["seq"] = up_to + 1

        async def attempt() -> dict[str, object]:
            return await self._connection.api(
                f"{self._api}.STREAM.PURGE.OBJ_{bucket}", body, min(self._limit, 10)
            )

        await persist(attempt, self._limit)


def _nuid(message: dict[str, Any]) -> str:
    """Of the object that a metadata message from the leader describes; empty where there is none."""
    try:
        data = json.loads(base64.b64decode(message.get("data") or ""))
    except ValueError:
        return ""
    return "" if not isinstance(data, dict) or data.get("deleted") is True else str(data.get("nuid") or "")


async def paced(attempt: Callable[[], Awaitable[int]], limit: float) -> int:
    """Repeat what the server refused for coming too fast (error 10167)."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limit
    delay = 0.05
    while True:
        try:
            return await attempt()
        except ApiError as error:
            if error.err_code != 10167 or loop.time() > deadline:
                raise
        await asyncio.sleep(delay)
        delay = min(delay * 2, 2.0)

"""Writing: metadata by compare-and-swap, and chunks through a window of unacknowledged bytes."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from natsfs.catalog.attributes import format_time
from natsfs.catalog.metadata import Metadata, encode, new_nuid
from natsfs.errors import Conflict, Corrupt, TooLarge, Unreachable
from natsfs.store.fetch import Fetcher
from natsfs.store.jetstream import NOT_BEHIND, TOO_FAST, ApiError, api_error
from natsfs.store.lanes import Courtesy, Long
from natsfs.store.layout import Layout
from natsfs.store.segments import Kept, Read, Segment, Spooled, Zeros
from natsfs.store.watch import OP_HEADER
from natsfs.store.wire import Answer, Wire, both, persist

log = logging.getLogger(__name__)

# Bytes of chunks that may be unacknowledged at a time. The server refuses input that arrives faster than it stores
# (error 10167 from 128 MB on); beyond 4 MiB nothing is gained.
WINDOW = 4 * 1024 * 1024
BLOCK = 1024 * 1024  # bytes read from the spool, and digested, at a time
THREAD = 512 * 1024  # bytes of a block that are digested in a thread
# An upload older than this has its chunks counted before its metadata is published.
PROOF_AGE = 60.0
HEADERS_ROOM = 4096  # bytes of a message that are not its body


# The acknowledgement of a stored message; every other form is left to the JSON parser.
_STORED = re.compile(rb'\{"stream":"[^"\\]+", ?"seq":(\d+)\}')


@dataclass(frozen=True, slots=True)
class Uploaded:
    """The content of a new version. `content` is its only chunk where that has still to go, with the metadata."""

    nuid: str
    size: int
    chunks: int
    chunk_size: int
    digest: str
    content: bytes | None = None


IN_DOUBT = -1  # in place of a generation


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a subject whose message is to be replaced.

    `seq` is its last sequence, 0 if it holds nothing; `nuid` that of the live object there, empty if there is none,
    None if that does not matter; `generation` the connection's in which this was learnt, None if it was this moment,
    `IN_DOUBT` if the stream may be another one since.
    """

    seq: int
    nuid: str | None = None
    generation: int | None = None


def small(content: bytes, chunk_size: int) -> Uploaded:
    """A version of one chunk, which is stored by `Publisher.object`."""
    return Uploaded(new_nuid(), len(content), 1, chunk_size, digest_text(hashlib.sha256(content)), content)


def digest_text(sha: hashlib._Hash) -> str:
    return f"SHA-256={base64.urlsafe_b64encode(sha.digest()).decode()}"


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


def spooled(read: Read, start: int, end: int) -> bytes:
    """Raises `Corrupt` if the spool file has less."""
    data = read(start, end)
    if len(data) != end - start:
        raise Corrupt(f"the spool file is shorter than what was written to it: {len(data)} bytes at {start}")
    return data


class Upload:
    """The chunks of one new version, in order, under one nuid.

    Any failure ends it: chunks are ordered by their arrival, so one that was refused cannot be sent again behind
    its successors. The owner starts another upload from the spool, which has everything.
    """

    def __init__(self, wire: Wire, bucket: str, chunk_size: int, limit: float, courtesy: Courtesy) -> None:
        self.nuid = new_nuid()
        self.position = 0  # bytes of content taken in
        self.stored = 0  # bytes of content acknowledged
        self._wire = wire
        self._subject = f"$O.{bucket}.C.{self.nuid}"
        self._chunk_size = chunk_size
        self._limit = limit
        self._sha = hashlib.sha256()
        self._rest = b""
        self._flying: deque[tuple[Answer, int]] = deque()
        self._flying_bytes = 0
        self._last_seq = 0
        self._chunks = 0
        self.started = time.monotonic()
        self._long = Long(courtesy)
        self._generation = wire.generation

    async def append(self, segments: list[Segment], read: Read, base: Base | None) -> None:
        """Take in `segments`, which follow on what was taken in before, and publish every full chunk."""
        await self._wire.up(self._limit)
        for segment, start in [(s, start) for s in segments for start in range(s.start, s.end, BLOCK)]:
            block = await self._block(segment, start, min(start + BLOCK, segment.end), read, base)
            self.position += len(block)
            if len(block) < THREAD:
                self._sha.update(block)
                await self._publish_full(block)
            else:
                # The digest of a large block is worth a thread: hashlib lets go of the interpreter meanwhile.
                await both(
                    partial(trio.to_thread.run_sync, self._sha.update, block),
                    partial(self._publish_full, block),
                )
                if rest := self._long.rest(time.monotonic(), len(block)):
                    await trio.sleep(rest)

    @staticmethod
    async def _block(segment: Segment, start: int, end: int, read: Read, base: Base | None) -> bytes:
        match segment:
            case Spooled():
                return spooled(read, start, end)
            case Zeros():
                return bytes(end - start)
            case Kept():
                assert base is not None
                return await base.read(start, end)

    async def _publish_full(self, block: bytes) -> None:
        size = self._chunk_size
        view = memoryview(block)
        chunks: list[bytes | memoryview] = []
        if self._rest:
            take = min(size - len(self._rest), len(view))
            self._rest += view[:take]
            view = view[take:]
            if len(self._rest) < size:
                return
            chunks.append(self._rest)
            self._rest = b""
        full = len(view) // size * size
        chunks += [view[start : start + size] for start in range(0, full, size)]
        self._rest = bytes(view[full:])
        await self._publish(chunks)

    async def _publish(self, chunks: list[bytes | memoryview]) -> None:
        """As many at a time as the window has room for: a call for each chunk is dear."""
        at = 0
        while at < len(chunks):
            while self._flying and self._flying_bytes + len(chunks[at]) > WINDOW:
                await self._reap()
            stop, room = at + 1, WINDOW - self._flying_bytes - len(chunks[at])
            while stop < len(chunks) and len(chunks[stop]) <= room:
                room -= len(chunks[stop])
                stop += 1
            answers = await self._wire.send(*((self._subject, chunk, None) for chunk in chunks[at:stop]))
            for answer, chunk in zip(answers, chunks[at:stop], strict=True):
                self._flying.append((answer, len(chunk)))
                self._flying_bytes += len(chunk)
            self._chunks += stop - at
            at = stop
        while self._flying and self._flying[0][0].arrived:
            await self._reap()

    async def _reap(self) -> None:
        """Take the oldest acknowledgement."""
        answer, size = self._flying[0]
        reply = await answer.get(self._limit, "acknowledgement of a chunk")
        self._flying.popleft()
        self._flying_bytes -= size
        stored = _STORED.fullmatch(reply.data)
        if stored is not None:
            seq = int(stored[1])
        else:
            ack = json.loads(reply.data)
            if "error" in ack:
                raise api_error(ack["error"])
            seq = int(ack["seq"])
        if seq <= self._last_seq:
            raise Corrupt("chunks were stored out of order")
        self._last_seq = seq
        self.stored += size

    async def finish(self) -> Uploaded:
        """Publish the last, short chunk and wait for every acknowledgement."""
        if self._rest:
            await self._publish([self._rest])
            self._rest = b""
        while self._flying:
            await self._reap()
        return Uploaded(self.nuid, self.position, self._chunks, self._chunk_size, digest_text(self._sha))

    @property
    def needs_proof(self) -> bool:
        """Whether chunks that were acknowledged may be gone by now: it took long, or the server went away meanwhile."""
        return time.monotonic() - self.started > PROOF_AGE or self._wire.generation != self._generation

    async def settle(self) -> None:
        """Wait until the server has answered for every chunk, whatever it says.

        A purge travels on another connection than the chunks: one that is still on its way would be stored behind it.
        """
        with trio.move_on_after(self._limit):
            for answer, _ in self._flying:
                await answer.settled(self._limit)
        self._flying.clear()

    @property
    def stored_any(self) -> bool:
        return self._chunks > 0


class Publisher:
    """Metadata messages and purges."""

    def __init__(self, wire: Wire, api_prefix: str, fetcher: Fetcher, limit: float) -> None:
        self._wire = wire
        self._api = api_prefix
        self._fetcher = fetcher
        self._limit = limit

    @property
    def limit_of_metadata(self) -> int:
        """How many bytes the body of a metadata message may have."""
        return self._wire.max_payload - HEADERS_ROOM

    async def metadata(self, meta: Metadata, known: Known, op: str) -> int:
        """Publish a metadata message in place of what is `known` of its subject; returns its own sequence.

        A lost acknowledgement is settled by what the leader holds, so the answer is always definite, or `Unreachable`
        after the time limit. Raises `Conflict` with the sequence that is there instead.
        """
        body, headers = self._message(meta, known.seq, op)
        tried = again = False

        async def attempt() -> int:
            nonlocal tried, again
            await self._wire.up(self._limit)
            again = tried
            if again or self._is_old(known):
                stored = await self._settle(meta, known, op)
                if stored is not None:
                    return stored
            tried = True
            (answer,) = await self._wire.send((meta.subject, body, headers))
            what = f"acknowledgement for the metadata of {meta.name!r}"
            ack = json.loads((await answer.get(min(self._limit, 10), what)).data)
            if "error" not in ack:
                return int(ack["seq"])
            error = api_error(ack["error"])
            if again and isinstance(error, Conflict):
                # The attempt before may have been what this one met: reads do not wait for what was sent before.
                stored = await self._settle(meta, known, op)
                if stored is not None:
                    return stored
            raise error

        try:
            return await persist(attempt, self._limit)
        except Conflict as conflict:
            conflict.doubtful = again
            raise

    def _message(self, meta: Metadata, expected: int, op: str) -> tuple[bytes, dict[str, str]]:
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
        return body, headers

    async def object(self, meta: Metadata, content: bytes, known: Known, op: str) -> int:
        """Publish an object of one chunk in one round trip: the metadata is refused where the chunk was.

        It says that the stream's last message has to be the chunk. Where somebody else's came between, it is sent again
        behind the chunk's acknowledgement. After any error but `Conflict` the chunk may be stored or not: another
        attempt needs another nuid.
        """
        if self._is_old(known):
            await self._settle(meta, known, op)
        body, headers = self._message(meta, known.seq, op)
        chunk = (f"$O.{meta.bucket}.C.{meta.nuid}", content, {"Nats-Msg-Id": meta.nuid})
        await self._wire.up(self._limit)
        stored, published = await self._wire.send(
            chunk, (meta.subject, body, {**headers, "Nats-Expected-Last-Msg-Id": meta.nuid})
        )
        limit = min(self._limit, 10)
        what = f"acknowledgement for the metadata of {meta.name!r}"
        try:
            ack = json.loads((await published.get(limit, what)).data)
            if "error" not in ack:
                return int(ack["seq"])
            chunk_ack = json.loads((await stored.get(limit, "acknowledgement of a chunk")).data)
        except Unreachable:
            seq = await self._settle(meta, known, op)
            if seq is None:
                raise
            return seq
        if "error" in chunk_ack:
            raise api_error(chunk_ack["error"])
        error = api_error(ack["error"])
        if isinstance(error, ApiError) and error.err_code in (NOT_BEHIND, TOO_FAST):
            return await paced(lambda: self.metadata(meta, known, op), self._limit)
        raise error

    def _is_old(self, known: Known) -> bool:
        """After a reconnect the store may be an older one, where the sequence was given to somebody else's object."""
        return known.generation not in (None, self._wire.generation)

    async def _settle(self, meta: Metadata, known: Known, op: str) -> int | None:
        """Whether a message whose acknowledgement was lost was stored, by the word of the leader.

        Raises `Conflict` if it was not, and the name holds something else than what it was to replace.
        """
        message = await self._fetcher.leader_get(meta.bucket, {"last_by_subj": meta.subject})
        if message is None:
            if known.seq == 0:
                return None
            raise Conflict("the name was purged meanwhile", 0)
        if f"{OP_HEADER}: {op}".encode() in base64.b64decode(message.get("hdrs") or ""):
            return int(message["seq"])
        there = int(message["seq"])
        if there != known.seq or (known.nuid is not None and _nuid(message) != known.nuid):
            raise Conflict("the name was changed meanwhile", there)
        return None

    async def prove(self, bucket: str, uploaded: Uploaded | Metadata) -> bool:
        """Whether every chunk of a version is (still) stored, by the word of the leader."""
        subject = f"$O.{bucket}.C.{uploaded.nuid}"

        async def attempt() -> dict[str, Any]:
            body = {"subjects_filter": subject}
            return await self._wire.api(f"{self._api}.STREAM.INFO.OBJ_{bucket}", body, min(self._limit, 10))

        info = await persist(attempt, self._limit)
        return bool((info["state"].get("subjects") or {}).get(subject, 0) == uploaded.chunks)

    async def purge(self, bucket: str, subject: str, up_to: int | None) -> None:
        """Remove the messages of a subject, those after sequence `up_to` excepted."""
        body: dict[str, object] = {"filter": subject}
        if up_to is not None:
            body["seq"] = up_to + 1

        async def attempt() -> dict[str, Any]:
            return await self._wire.api(f"{self._api}.STREAM.PURGE.OBJ_{bucket}", body, min(self._limit, 10))

        await persist(attempt, self._limit)


def _nuid(message: dict[str, Any]) -> str:
    """Of the object that a metadata message from the leader describes; empty where there is none."""
    try:
        data = json.loads(base64.b64decode(message.get("data") or ""))
    except ValueError:
        return ""
    return "" if not isinstance(data, dict) or data.get("deleted") is True else str(data.get("nuid") or "")


async def paced(attempt: Callable[[], Awaitable[int]], limit: float) -> int:
    """Repeat what the server refused for coming too fast."""
    deadline = trio.current_time() + limit
    delay = 0.05
    while True:
        try:
            return await attempt()
        except ApiError as error:
            if error.err_code != TOO_FAST or trio.current_time() > deadline:
                raise
        await trio.sleep(delay)
        delay = min(delay * 2, 2.0)

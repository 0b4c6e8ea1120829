"""Reading chunks: batched direct get, the proof of an object's layout, and leader reads."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio

from natsfs.catalog.attributes import parse_time
from natsfs.catalog.metadata import Metadata
from natsfs.errors import ChunksGone, Corrupt, StoreError, Unreachable
from natsfs.store.frames import Message
from natsfs.store.jetstream import ApiError, NoResponders
from natsfs.store.lanes import is_quick
from natsfs.store.layout import Layout, irregular, prove_uniform, uniform
from natsfs.store.wire import Waiter, Wire, both, persist

# An object of so many chunks is read whole by the request that learns its layout.
WHOLE = 8
# The server disconnects a client with 64 MiB of unread direct-get data; stay well below.
BUDGET = 16 * 1024 * 1024
BATCH_BYTES = 4 * 1024 * 1024
# For so many seconds a replica is thought to lack the last chunks of an object. (Milliseconds were seen.)
SETTLED = 60
SCAN_DELAYS = (0.05, 0.2, 0.5, 1.0, 2.0)  # seconds from one scan that shows too little to the next


@dataclass(slots=True)
class Chunk:
    subject: bytes
    seq: int
    data: bytes
    pending: int  # how many later messages the subject has; -1 if that is not known


def _gone(what: str) -> ChunksGone:
    return ChunksGone(f"chunks of {what} are gone: the object was replaced, deleted or has expired")


class Budget:
    """Bytes that may be outstanding on a connection, handed out first come, first served."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._free = total
        self._turn = trio.Lock()
        self._returned = trio.Event()

    @asynccontextmanager
    async def take(self, amount: int) -> AsyncIterator[None]:
        amount = min(amount, self._total)
        async with self._turn:
            while self._free < amount:
                self._returned = trio.Event()
                await self._returned.wait()
            self._free -= amount
        try:
            yield
        finally:
            self._free += amount
            self._returned.set()


# Lengths and sequences of all messages of a subject in a bucket, without their content.
Scan = Callable[[str, str], Awaitable[tuple[list[int], list[int]]]]
# A request for messages of a bucket, over a wire.
Get = Callable[[Wire, str, dict[str, Any]], Awaitable[list[Chunk]]]


class Fetcher:
    def __init__(self, quick: Wire, bulk: Wire, api_prefix: str, limit: float, scan: Scan) -> None:
        """Reads that bring little, and what the leader is asked about metadata, take `quick`; the others `bulk`."""
        self._quick = quick
        self._bulk = bulk
        self._scan = scan
        self._api = api_prefix
        self._limit = limit
        self._budget = Budget(BUDGET)
        self._outstanding = 0  # bytes of chunks that `quick` has to bring
        self._no_direct: set[str] = set()  # buckets whose streams do not allow direct get

    # --- requests ---------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _lane(self, expected: int) -> AsyncIterator[Wire]:
        """The wire for requests that bring `expected` bytes in all, when there is room for them."""
        if is_quick(expected, self._outstanding):
            self._outstanding += expected
            try:
                yield self._quick
            finally:
                self._outstanding -= expected
        else:
            async with self._budget.take(expected):
                yield self._bulk

    async def _batch(self, wire: Wire, bucket: str, request: dict[str, Any]) -> list[Chunk]:
        """One direct get; what is missing is simply not in the answer."""
        subject = f"{self._api}.DIRECT.GET.OBJ_{bucket}"
        chunks: list[Chunk] = []
        one = request.get("next_by_subj") or request.get("last_by_subj")
        wanted = {subject.encode() for subject in request.get("multi_last") or [one]}
        batch = "batch" in request
        stream = f"OBJ_{bucket}".encode()
        ended = trio.Event()
        failure: StoreError | None = None
        progress = 0

        def handler(result: Message | StoreError) -> None:
            nonlocal failure, progress
            progress += 1
            status = None
            if isinstance(result, StoreError):
                failure = result
            elif (status := result.status) is None:
                found = result.header(b"Nats-Subject")
                if found is None or found not in wanted:
                    failure = Corrupt(f"{subject} answered with another subject")
                else:
                    seq = int(result.header(b"Nats-Sequence") or 0)
                    pending = int(result.header(b"Nats-Num-Pending") or 0)
                    if result.header(b"Nats-Stream") != stream:
                        pending = -1  # a mirror answers, which has what it has
                    chunks.append(Chunk(found, seq, result.data, pending))
                    if batch:
                        return
            elif status == 503:
                failure = NoResponders(f"nobody answers on {subject}")
            elif status not in (204, 404):
                failure = Corrupt(f"{subject}: {status} {result.description}")
            ended.set()

        await wire.up(self._limit)
        reply = wire.register(Waiter(handler, subject))
        try:
            await wire.publish(subject, json.dumps(request).encode(), reply)
            while not ended.is_set():
                seen = progress
                with trio.move_on_after(min(self._limit, 10)):
                    await ended.wait()
                if progress == seen and not ended.is_set():
                    raise Unreachable(f"no answer on {subject}")
        finally:
            wire.unregister(reply)
        if failure is not None:
            raise failure
        return chunks

    async def leader_get(self, bucket: str, request: dict[str, Any]) -> dict[str, Any] | None:
        """STREAM.MSG.GET, answered by the stream's leader: the last word on what is stored. None: nothing is."""
        return await self._leader_get(self._quick, bucket, request)

    async def _leader_get(self, wire: Wire, bucket: str, request: dict[str, Any]) -> dict[str, Any] | None:
        async def attempt() -> dict[str, Any]:
            subject = f"{self._api}.STREAM.MSG.GET.OBJ_{bucket}"
            return await wire.api(subject, request, min(self._limit, 10))

        try:
            data = await persist(attempt, self._limit)
        except ApiError as error:
            if error.code == 404:
                return None
            raise
        message: dict[str, Any] = data["message"]
        return message

    async def _get(self, wire: Wire, bucket: str, request: dict[str, Any]) -> list[Chunk]:
        """Direct get, repeated over lost connections; where the stream does not allow it, from the leader."""

        async def attempt() -> list[Chunk] | None:
            try:
                return await self._batch(wire, bucket, request)
            except NoResponders:
                subject = f"{self._api}.STREAM.INFO.OBJ_{bucket}"
                info = await self._quick.api(subject, None, min(self._limit, 10))
                if info["config"].get("allow_direct"):
                    raise
                self._no_direct.add(bucket)
                return None

        found: list[Chunk] | None = None
        if bucket not in self._no_direct:
            found = await persist(attempt, self._limit)
        return await self._from_leader(wire, bucket, request) if found is None else found

    async def _from_leader(self, wire: Wire, bucket: str, request: dict[str, Any]) -> list[Chunk]:
        """What a batched direct get would return, read one by one from the leader, without pending counts."""
        chunks: list[Chunk] = []
        single = {key: value for key, value in request.items() if key not in ("batch", "max_bytes")}
        for _ in range(request.get("batch", 1)):
            message = await self._leader_get(wire, bucket, single)
            if message is None:
                break
            data = base64.b64decode(message.get("data") or "")
            chunks.append(Chunk(message["subject"].encode(), message["seq"], data, -1))
            single["seq"] = message["seq"] + 1
        return chunks

    # --- layout -----------------------------------------------------------------------------------------------

    async def layout(self, meta: Metadata) -> tuple[Layout, list[bytes]]:
        """Prove where the chunks of a version lie. Small objects come with all their chunks at once.

        Raises `ChunksGone` if they are not there (replaced, deleted, expired) and `Corrupt` if they cannot be
        this version's.
        """
        subject = f"$O.{meta.bucket}.C.{meta.nuid}"
        if not meta.size:
            return Layout(0, 0, meta.chunk_size, first=0), []
        for authority in (self._get, self._from_leader):
            found = await self._layout(meta, subject, authority)
            if found is not None:
                return found
            # A replica that lags shows fewer chunks: only the leader may say that they are gone.
        raise _gone(f"{meta.name!r}")

    async def _layout(self, meta: Metadata, subject: str, get: Get) -> tuple[Layout, list[bytes]] | None:
        bucket = meta.bucket
        if meta.chunks <= WHOLE and meta.size <= BATCH_BYTES:
            batch = meta.chunks + 2
            async with self._lane(meta.size) as wire:
                chunks = await get(wire, bucket, {"seq": 1, "next_by_subj": subject, "batch": batch})
            layout = irregular(meta.size, [len(c.data) for c in chunks], [c.seq for c in chunks])
            if layout is not None:
                return layout, [c.data for c in chunks if c.data]
            if len(chunks) < batch:
                return None
        first: list[Chunk] = []
        last: list[Chunk] = []

        async def ask(wire: Wire, into: list[Chunk], request: dict[str, Any]) -> None:
            into += await get(wire, bucket, request)

        async with self._lane(min(meta.size, 2 * meta.chunk_size)) as wire:
            await both(
                lambda: ask(wire, first, {"seq": 1, "next_by_subj": subject, "batch": 1}),
                lambda: ask(wire, last, {"last_by_subj": subject}),
            )
        if not first or not last:
            return None
        total = first[0].pending + 1 or await self._count(bucket, subject)
        has_counts = min(first[0].pending, last[0].pending) >= 0
        is_mirrors = not has_counts and get == self._get and bucket not in self._no_direct
        if not is_mirrors and prove_uniform(
            meta.size, meta.chunks, meta.chunk_size, total, len(last[0].data)
        ):
            layout = uniform(meta.size, meta.chunks, meta.chunk_size, first[0].seq, last[0].seq)
            # A short chunk is the last one. A full one may be any, where whoever answered lacks those behind it.
            if layout.first is not None and meta.size % meta.chunk_size:
                return layout, []
            is_sure = has_counts and not await self._may_lack_the_end(meta)
            if not is_sure and layout.first is not None:
                by_leader = await self._from_leader(self._bulk, bucket, {"last_by_subj": subject})
                is_sure = [chunk.seq for chunk in by_leader] == [last[0].seq]
            if is_sure:
                return layout, []
        lengths, seqs = await self._scan_whole(bucket, subject)
        layout = irregular(meta.size, lengths, seqs)
        return None if layout is None else (layout, [])

    async def _may_lack_the_end(self, meta: Metadata) -> bool:
        """Whether a replica may still have to get a version's last chunks.

        Then it takes another one for the last, and counts too few behind each.
        """
        info = await self._info(meta.bucket)
        age = (parse_time(info.get("ts", "")) or meta.time_ns) - meta.time_ns  # by the servers' clocks
        return int(info["config"].get("num_replicas", 1)) > 1 and age < SETTLED * 10**9

    async def _count(self, bucket: str, subject: str) -> int:
        """How many messages a subject has, by the word of the leader."""
        info = await self._info(bucket, {"subjects_filter": subject})
        return int((info["state"].get("subjects") or {}).get(subject, 0))

    async def _info(self, bucket: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        async def attempt() -> dict[str, Any]:
            return await self._quick.api(f"{self._api}.STREAM.INFO.OBJ_{bucket}", body, min(self._limit, 10))

        return await persist(attempt, self._limit)

    async def _scan_whole(self, bucket: str, subject: str) -> tuple[list[int], list[int]]:
        """A scan that shows all that the leader has: the consumer may be at a replica that lags."""
        for delay in SCAN_DELAYS:
            lengths, seqs = await self._scan(bucket, subject)
            if len(seqs) >= await self._count(bucket, subject):
                return lengths, seqs
            await trio.sleep(delay)
        raise Unreachable(f"no replica shows all messages of {subject}")

    async def _place_all(self, bucket: str, subject: str, layout: Layout) -> None:
        """Learn where each of the scattered chunks lies. Raises `ChunksGone` if there are not as many as there were."""
        lengths, seqs = await self._scan_whole(bucket, subject)
        present = [seq for length, seq in zip(lengths, seqs, strict=True) if length]
        if len(present) != layout.count:
            raise _gone(subject)
        layout.place(present)

    # --- chunks -----------------------------------------------------------------------------------------------

    async def chunks(
        self,
        bucket: str,
        nuid: str,
        layout: Layout,
        index: int,
        count: int,
        sent: Callable[[], None] | None = None,
    ) -> list[bytes]:
        """`count` chunks from chunk `index` on. Raises `ChunksGone` or `Corrupt`.

        `sent` is called when there is room for them, before the server is asked.
        """
        subject = f"$O.{bucket}.C.{nuid}"
        count = min(count, layout.count - index)
        need = layout.start(index + count) - layout.start(index)
        async with self._lane(need) as wire:
            if sent is not None:
                sent()
            for attempt in (self._get, self._from_leader):
                seq = layout.seq(index)
                if seq is None:
                    seq = await self._find(wire, bucket, subject, layout, index)
                request: dict[str, Any] = {"seq": seq, "next_by_subj": subject}
                # The server counts what follows for a batch, also for one of a single message. Among contiguous
                # chunks the sequence says which one it is.
                if count > 1 or layout.first is None:
                    request["batch"] = count
                found = await attempt(wire, bucket, request)
                data = [chunk for chunk in found if chunk.data]
                if len(data) < count and len(found) == count and layout.starts is not None:
                    # Empty messages among irregular chunks take room in the batch.
                    request = {"seq": found[-1].seq + 1, "next_by_subj": subject, "batch": count}
                    data += [chunk for chunk in await attempt(wire, bucket, request) if chunk.data][
                        : count - len(data)
                    ]
                # Where one does not agree, earlier ones are gone (a limit on age takes them one by one), so it is
                # another chunk; or a replica that lags has counted too few behind it.
                if len(data) == count and all(
                    layout.agrees(index + place, chunk.seq, chunk.pending) for place, chunk in enumerate(data)
                ):
                    break
                if layout.first is None and attempt == self._get:
                    # The leader tells no counts.
                    await self._place_all(bucket, subject, layout)
            else:
                raise _gone(subject)
        for place, chunk in enumerate(data):
            if len(chunk.data) != layout.length(index + place):
                raise Corrupt(
                    f"chunk {index + place} of {nuid} has {len(chunk.data)} bytes, not {layout.length(index + place)}"
                )
            layout.learn(index + place, chunk.seq)
        return [chunk.data for chunk in data]

    async def single(self, metas: list[Metadata]) -> dict[str, tuple[Layout, bytes]]:
        """By nuid the content of versions of one bucket that have one chunk each, as far as it is found at once.

        Nobody waits for it, so nothing is repeated. That a chunk is the whole version is for its digest to prove.
        """
        bucket = metas[0].bucket
        if bucket in self._no_direct:
            return {}
        wanted = {f"$O.{bucket}.C.{meta.nuid}".encode(): meta for meta in metas}
        request = {"multi_last": [subject.decode() for subject in wanted], "batch": len(wanted)}
        async with self._lane(sum(meta.size for meta in metas)) as wire:
            chunks = await self._batch(wire, bucket, request)
        found: dict[str, tuple[Layout, bytes]] = {}
        for chunk in chunks:
            meta = wanted[chunk.subject]
            layout = irregular(meta.size, [len(chunk.data)], [chunk.seq])
            if layout is not None:
                found[meta.nuid] = layout, chunk.data
        return found

    async def _find(self, wire: Wire, bucket: str, subject: str, layout: Layout, index: int) -> int:
        """The sequence of a chunk among scattered ones: the rank of any chunk is told by its pending count."""
        ceiling: int | None = None
        for step in range(200):
            known = layout.seq(index)
            if known is not None:
                return known
            probe = layout.guess(index, step, ceiling)
            found = await self._get(wire, bucket, {"seq": probe, "next_by_subj": subject, "batch": 1})
            if not found or found[0].pending < 0:
                break
            rank = layout.count - 1 - found[0].pending
            if not 0 <= rank < layout.count:
                break
            layout.learn(rank, found[0].seq)
            # Everything from the probe to what it found belongs to others.
            if rank > index:
                ceiling = probe
        # Without pending counts (no direct get) the scan tells all there is to know.
        await self._place_all(bucket, subject, layout)
        known = layout.seq(index)
        assert known is not None
        return known
